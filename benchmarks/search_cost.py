"""Compare batch size finders on a virtual GPU: `python -m benchmarks.search_cost`.

For each case the truth is found by training in fresh processes; then each finder (the real packages, one process each)
searches on the same model and the same virtual GPU; then a fresh process trains at what it found. It writes
benchmarks/results/<today>-search-cost.md and .csv, and the tables of docs/search-cost.md. The packages come with
`pip install '.[peers]'`; what is missing is skipped, by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import tables
from .peers import trials
from .peers.cases import CASES, SMALL
from .tables import Row

Ask = Callable[..., dict[str, Any]]

HEADS = {
    "found": "found",
    "of_safe": "/ safe",
    "of_trains": "/ largest",
    "afresh": "trains afresh",
    "passes": "forward / backward",
    "samples": "samples",
    "ooms": "OOMs",
    "host_seconds": "host s",
    "changed": "changed",
}


def compared(ask: Ask, finder: str, true: dict[str, int]) -> Row:
    """Return what a finder found, and its costs."""
    answer = ask("search", finder)
    found = answer.get("found")
    row: Row = {"found": found or _last_line(answer.get("failed", "not for this model"))}
    if found:
        row |= {"of_safe": f"{found / true['safe']:.3f}", "of_trains": f"{found / true['trains']:.3f}"}
        row |= {"afresh": verdict(ask("check", found))}
        if "Lightning" in finder:
            row["afresh"] += f"; in its own loop: {verdict(ask('check', found, 0.0, True))}"
    row |= {kind: answer.get(kind, 0) for kind in ("forward", "backward", "samples", "ooms")}
    if "seconds" in answer:
        row |= {"host_seconds": f"{answer['seconds']:.1f}", "changed": ", ".join(answer["changed"]) or "nothing"}
    return row


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def verdict(answer: dict[str, Any]) -> str:
    """Whether it trained, in words."""
    if "failed" in answer:
        return _last_line(answer["failed"])
    if not answer["trains"]:
        return "OOM"
    return "yes, with retries in each window" if any(answer["retries"][2:]) else "yes"


def case_table(name: str, rows: Sequence[Row]) -> str:
    """One case's rows, as Markdown."""
    true = rows[0]
    words = f"Truth: {true['safe']} safe, {true['trains']} the largest that trains."
    lines = []
    for row in rows:
        row = row | {"passes": f"{row['forward']} / {row['backward']}"}
        lines.append({"finder": row["finder"]} | {head: row.get(key, "") for key, head in HEADS.items()})
    return f"### {name}\n\n{words}\n\n{tables.markdown(lines)}\n"


def summary(rows: Sequence[Row]) -> str:
    """One line a finder, over all cases."""
    lines = []
    for finder in dict.fromkeys(row["finder"] for row in rows):
        tried = [row for row in rows if row["finder"] == finder]
        found = [row for row in tried if "of_safe" in row]
        fits = [row for row in found if row["afresh"].startswith("yes")]
        line = {"finder": finder, "version": tried[0]["version"], "found something": f"{len(found)} of {len(tried)}"}
        if found:
            line |= {
                "/ safe": _range([float(row["of_safe"]) for row in found], 3),
                "/ largest": _range([float(row["of_trains"]) for row in found], 3),
                "trains afresh": f"{len(fits)} of {len(found)}",
                "forward passes": _range([row["forward"] for row in found]),
                "samples": _range([row["samples"] for row in found]),
                "OOMs": _range([row["ooms"] for row in found]),
                "host s": _range([float(row["host_seconds"]) for row in found], 1),
                "changed": ", ".join(_changes(found)) or "nothing",
            }
        lines.append(line)
    return tables.markdown(lines)


def _changes(rows: Sequence[Row]) -> list[str]:
    """Each kind of change once, in the order in which they came."""
    kinds = dict.fromkeys(kind for row in rows for kind in row["changed"].split(", "))
    return [kind for kind in kinds if kind != "nothing"]


def _range(values: Sequence[float], digits: int = 0) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    if low == high:
        return f"{low:.{digits}f}"
    return f"{low:.{digits}f} to {high:.{digits}f} (median {middle:.{digits}f})"


def compare(name: str, finders: dict[str, str], say: Callable[[str], None]) -> list[Row]:
    """One case's rows.

    Args:
        name: The case's.
        finders: Names of finders, each with its package's version.
        say: Called with the progress, in words.
    """
    rows = []
    with trials.Server(name) as ask:
        say(f"{name}: the truth")
        true = ask("truth")
        if "failed" in true:
            raise RuntimeError(f"{name}: the truth can't be found: {true['failed']}")
        for finder, version in finders.items():
            say(f"{name}: {finder}")
            about = {"case": name, "finder": finder, "version": version, "trains": true["trains"], "safe": true["safe"]}
            rows.append(about | compared(ask, finder, true))
            say(json.dumps(rows[-1]))
    return rows


def page(rows: Sequence[Row], missing: Sequence[str]) -> str:
    """Render the summary and each case's table, with the versions."""
    cases = dict.fromkeys(row["case"] for row in rows)
    versions = tables.installed(["torch", "torchvision", "transformers"])
    words = [
        "*Real allocator on a virtual GPU*: kernels compute nothing and take no time, so seconds are the host's. Made "
        f"by `python -m benchmarks.search_cost` with {', '.join(f'{name} {v}' for name, v in versions.items())}.",
        *([f"Skipped, since their packages aren't installed: {', '.join(missing)}."] if missing else []),
        f"## All cases\n\n{summary(rows)}",
        "## Case by case",
    ]
    each = [case_table(case, [row for row in rows if row["case"] == case]) for case in cases]
    return "\n\n".join([*words, *each])


def available(finders: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the installed finders with versions, and the others."""
    from .peers.finders import FINDERS

    versions = tables.installed(FINDERS[name].package for name in finders)
    there = {name: versions[FINDERS[name].package] for name in finders if FINDERS[name].package in versions}
    return there, [name for name in finders if name not in there]


def main() -> None:
    """Run the command line."""
    from .peers.finders import FINDERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="its rows are made anew; left out: all")
    parser.add_argument("--finder", action="append", choices=list(FINDERS), help="leave out: all that are installed")
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    finders, missing = available(args.finder or list(FINDERS))
    for name in missing:
        say(f"{name}: skipped, since {FINDERS[name].package} isn't installed")
    asked = args.case or [name for name in CASES if name != SMALL]
    rows = [row for row in tables.read_results("search-cost") if row["case"] not in asked]
    for case in asked:
        rows = sorted([*rows, *compare(case, finders, say)], key=lambda row: list(CASES).index(row["case"]))
        if not (args.no_write or args.finder):
            say(f"wrote {write(rows, missing)}, its .csv, and docs/search-cost.md")
    print(page(rows, missing))


def write(rows: Sequence[Row], missing: Sequence[str]) -> Path:
    """Write the rows so far; docs/search-cost.md gets the summary alone."""
    text = page(rows, missing)
    tables.write_between_marks(tables.DOCS / "search-cost.md", text.partition("## Case by case")[0])
    return tables.write_results("search-cost", f"# What a search finds and costs\n\n{text}", rows)


if __name__ == "__main__":
    main()
