"""Run the project's benchmarks, one part after the other.

`python -m benchmarks [--quick] [--only PART] [--against OLD.json]`.

Writes benchmarks/results/<date>-<machine>.json, .md and .html, and each part's rows as .csv. Each figure says how it
was obtained and how far its repeats spread; --against compares two runs, and warns where a figure is too unstable to
compare.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoaccum.reporting import table_page
from autoaccum.reporting.kinds import Kind
from autoaccum.reporting.table_page import Section, Sheet
from benchmarks.figures import Change, Figure, compare, read_figure

from .parts import PARTS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CHANGES = ("figure", "before", "now", "change", "verdict")


def machine() -> dict[str, str]:
    """Return what the figures are measured on."""
    import torch

    processor = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in processor if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": f"{model}, {len(os.sched_getaffinity(0))} usable cores, {memory / 2**30:.1f} GiB",
        "GPU": gpu,
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "commit": _commit(),
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
    }


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def run_part(name: str, *, quick: bool) -> dict[str, Any]:
    """Run one part in a separate process; its progress goes to stderr."""
    command = [sys.executable, "-m", "benchmarks.parts", name, *(["--quick"] if quick else [])]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = out.stdout.strip().splitlines()
    if out.returncode == 0 and lines:
        part: dict[str, Any] = json.loads(lines[-1])
        return part
    empty: dict[str, Any] = {"rows": [], "figures": [], "notes": [], "kinds": [], "lead": "", "seconds": 0.0}
    return empty | {"name": name, "title": name, "skipped": f"failed with exit code {out.returncode}", "failed": True}


def results(names: list[str], *, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the results after each part, as they are written to JSON.

    The last ones are complete.
    """
    header = {"kind": "autoaccum benchmarks", "schema_version": 1, "date": str(datetime.date.today()), "quick": quick}
    facts, parts = machine(), []
    for number, name in enumerate(names, 1):
        print(f"-- {name} ({number} of {len(names)})", file=sys.stderr, flush=True)
        parts.append(run_part(name, quick=quick))
        yield header | {"machine": facts, "parts": list(parts), "left": names[number:]}


def figures_of(run: dict[str, Any]) -> list[Figure]:
    """Every figure of a run, its part before its name."""
    found = []
    for part in run["parts"]:
        for each in part["figures"]:
            found.append(read_figure(each | {"name": f"{part['name']}: {each['name']}"}))
    return found


def changes_since(old: dict[str, Any], run: dict[str, Any]) -> list[Change]:
    """Compare the figures of the parts that both runs ran."""
    ran = {part["name"] for part in run["parts"] if not part["skipped"]}
    return compare(figures_of(old | {"parts": [part for part in old["parts"] if part["name"] in ran]}), figures_of(run))


def warnings_of(run: dict[str, Any], changes: list[Change]) -> list[str]:
    """Return what a reader should not rely on."""
    unstable = [figure for figure in figures_of(run) if figure.is_unstable]
    warned = [
        f"unstable: {figure.name}: {_shown(figure)}, {figure.low:.3g} to {figure.high:.3g} in {figure.repeats} repeats"
        for figure in unstable
    ]
    warned += [
        f"too unstable to compare: {change.name}: {change.difference}"
        for change in changes
        if change.verdict == "unstable"
    ]
    warned += [f"changed: {change.name}: {change.difference}" for change in changes if change.verdict == "changed"]
    warned += [f"{part['name']} {part['skipped']}" for part in run["parts"] if part.get("failed")]
    return warned + ([f"not run yet: {', '.join(run['left'])}"] if run.get("left") else [])


def page(run: dict[str, Any], changes: list[Change], against: str | None, command: str) -> Sheet:
    """Build the report of the results."""
    parts = run["parts"]
    ran = [part for part in parts if not part["skipped"]]
    count = sum(len(part["figures"]) for part in ran)
    unstable = sum(figure.is_unstable for figure in figures_of(run))
    left_out = len(parts) - len(ran)
    skipped = f", {left_out} {'was' if left_out == 1 else 'were'} skipped or failed" if left_out else ""
    minutes = sum(part["seconds"] for part in ran) / 60
    answer = (
        f"{_counted(len(ran), 'benchmark')} ran in {_counted(max(1, round(minutes)), 'minute')}{skipped}; of "
        f"{_counted(count, 'figure')} {unstable} {'is' if unstable == 1 else 'are'} unstable: repeats spread by more "
        "than 10 %."
    )
    sections = [_section(part) for part in parts]
    if against is not None:
        sections.insert(0, _changes(changes, against))
    sections.append(_figures(run))
    return Sheet(
        what="autoaccum benchmarks",
        title=f"{run['date']}{', quick' if run['quick'] else ''}",
        answer=answer,
        sections=tuple(sections),
        facts=tuple(run["machine"].items()),
        notes=tuple(warnings_of(run, changes)),
        command=command,
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _section(part: dict[str, Any]) -> Section:
    rows = part["rows"]
    head = list(dict.fromkeys(column for row in rows for column in row))
    notes = [*part["notes"], *([f"Skipped: {part['skipped']}."] if part["skipped"] else [])]
    notes += [f"Took {part['seconds']:.0f} s."] if rows else []
    numbers = [column for column in head if all(isinstance(row.get(column, 0), (int, float)) for row in rows)]
    return Section(
        name=part["name"],
        title=part["title"],
        lead=part["lead"],
        head=tuple(head),
        rows=tuple(tuple(_cell(row.get(column)) for column in head) for row in rows),
        numbers=frozenset(numbers),
        kinds=tuple(kind for kind in Kind if kind.value in part["kinds"]),
        notes=tuple(notes),
    )


def _figures(run: dict[str, Any]) -> Section:
    rows = [
        (figure.name, _shown(figure), f"{figure.low:.4g} to {figure.high:.4g}", str(figure.repeats), figure.kind,
         "unstable" if figure.is_unstable else "")
        for figure in figures_of(run)
    ]  # fmt: skip
    lead = "What --against compares: the median of the repeats, their lowest and highest, and how each was obtained."
    head = ("figure", "value", "lowest to highest", "repeats", "kind", "stability")
    return Section("figures", "Figures", lead, head, tuple(rows), frozenset({"value", "repeats"}))


def _changes(changes: list[Change], against: str) -> Section:
    rows = tuple(
        (change.name, _shown(change.old), _shown(change.new), change.difference, change.verdict)
        for change in sorted(changes, key=lambda change: ("changed", "unstable").count(change.verdict), reverse=True)
    )
    count = {
        verdict: sum(change.verdict == verdict for change in changes) for verdict in ("changed", "unstable", "same")
    }
    lead = (
        f"Against {against}: {count['changed']} changed, {count['same']} the same, {count['unstable']} too unstable to "
        "compare. Figures with repeats have changed where their ranges don't overlap; others where they differ by over "
        "2 %; a time that was taken once is not compared."
    )
    return Section("changes", "Compared with an earlier run", lead, CHANGES, rows, frozenset({"before", "now"}))


def _shown(figure: Figure | None) -> str:
    return "\u2013" if figure is None else f"{figure.value:.4g} {figure.unit}"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def write(run: dict[str, Any], changes: list[Change], against: str | None, stem: Path, command: str) -> None:
    """Write the report in three forms, and each part's rows as CSV."""
    import pandas

    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n")
    made = page(run, changes, against, command)
    for suffix in (".md", ".html"):
        stem.with_suffix(suffix).write_text(table_page.render(made, suffix))
    for part in run["parts"]:
        if part["rows"]:
            rows = pandas.DataFrame(part["rows"])
            rows.to_csv(stem.with_name(f"{stem.name}-{part['name']}.csv"), index=False, float_format="%.5g")


def read(path: Path) -> dict[str, Any]:
    """Read an earlier run's JSON."""
    try:
        run: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} can't be read: {error}") from None
    if run.get("kind") != "autoaccum benchmarks":
        raise SystemExit(f"{path} is not a result of `python -m benchmarks`.")
    return run


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes: few models, few repeats")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="this part; may be given several times")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="compare with an earlier run")
    parser.add_argument("--name", default=platform.machine(), help="what to call this machine in the files' names")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    args = parser.parse_args()
    old = read(args.against) if args.against else None
    names = args.only or list(PARTS)
    today = str(datetime.date.today())
    stem = args.results / "-".join([today, args.name, *(["quick"] if args.quick else []), *(args.only or [])])
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    for run in results(names, quick=args.quick):  # after each part, so that none is lost where a later one is
        changes = changes_since(old, run) if old is not None else []
        write(run, changes, args.against and args.against.name, Path(f"{stem}.json").with_suffix(""), command)
    print(Path(f"{stem}.md").read_text())
    for text in warnings_of(run, changes):
        print(f"warning: {text}", file=sys.stderr)
    print(f"wrote {stem}.json, .md, .html and .csv", file=sys.stderr)
    sys.exit(any(part.get("failed") for part in run["parts"]))


if __name__ == "__main__":
    main()
