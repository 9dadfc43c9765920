"""The table of `truth.py`, and the shares that were exact."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MOST_PASSES, MOST_SAMPLES = 10, 3.0  # of recording; samples in chosen micro-batches
LEFT_OUT = ("number", "predicted", "measured", "fits fresh", "fits here", "fits here, state kept", "truth_seconds")

COLUMNS = """\
- `true k`, `true largest`: found by trying, see `benchmarks/truth_search.py`; `k`, `largest`: the plan's. Both numbers
  have to be the same for a line to be *exact*.
- `without retries`, `expandable`: the largest micro-batch for which the allocator never gives its cache back, as it is
  set and with `expandable_segments`; *exact* where it fits in a fresh process and none of the next six sizes does.
- `safe`: the plan's windows fit in a fresh process and in the one that searched, with optimizer state dropped and kept,
  at the capacity and at 2 % less.
- `ooms`: allocations that failed even after a retry while planning, three plans together.
- `passes`, `samples / micro-batch`: forward/backward passes of recording, and their samples in chosen micro-batches."""


def report(lines: list[dict[str, Any]], *, asked: int, write: bool) -> None:
    """Print the table, and how many cases were exact.

    Args:
        lines: A line for each case that was run.
        asked: How many cases there are.
        write: Whether to write it to `RESULTS`.
    """
    import pandas

    table = pandas.DataFrame(sorted(lines, key=lambda line: int(line["number"])))
    failed = table["failed"].notna() if "failed" in table else pandas.Series(False, index=table.index)
    done = table[~failed]
    of_chance = done["case"].str.startswith("generated")
    texts = []
    if len(table) < asked:
        texts.append(f"{len(table)} of {asked} cases were run, by number: {', '.join(map(str, table['number']))}.\n")
    for title, part in (("combinations", done[~of_chance]), ("generated models", done[of_chance])):
        if len(part):
            texts.append(_shares(title, part))
    if failed.any():
        texts.append(f"- failed: {', '.join(table[failed]['case'])}")
    text = (
        f"# Plans against the truth, {datetime.date.today()}\n\n*Real allocator on a virtual GPU*, torch "
        f"{torch.__version__}, by `python -m benchmarks.truth --write`: kernels compute nothing, the allocator is "
        "PyTorch's own.\n\n" + "\n".join(filter(None, texts)) + f"\n\n{COLUMNS}\n"
    )
    markdown = text + "\n" + _markdown(table[[name for name in table if name not in LEFT_OUT]]) + "\n"
    print(markdown)
    if write:
        RESULTS.mkdir(exist_ok=True)
        stem = f"{datetime.date.today()}-truth"
        (RESULTS / f"{stem}.md").write_text(markdown)
        table.to_csv(RESULTS / f"{stem}.csv", index=False)


def _shares(title: str, part: Any) -> str:
    """How many of them were exact, and how the others were wrong."""

    def share(count: int) -> str:
        return f"{count} ({100 * count / len(part):.0f} %)"

    k, largest = part["exact"].eq(True), part["largest exact"].eq(True)
    here = part["binds"].fillna("").str.endswith("this process")
    words = {
        "exact": share((k & largest).sum()),
        "smallest k exact": share(k.sum()),
        "largest micro-batch exact": share(largest.sum()),
        "not safe": part["safe"].eq(False).sum(),
        "largest too high": part["largest too high"].eq(True).sum(),
        "OOMs": f"{part['ooms'].sum():.0f}",
        "largest without retries exact": share(part["without retries is"].eq("exact").sum()),
        "largest with expandable segments exact": share(part["expandable is"].eq("exact").sum()),
        f"more than {MOST_PASSES} passes": (part["passes"] > MOST_PASSES).sum(),
        f"more than {MOST_SAMPLES:g} x the micro-batch in samples": (
            part["samples / micro-batch"] > MOST_SAMPLES
        ).sum(),
        "more than one verification": (part["verifications"] > 1).sum(),
        "bound by what the process had before": here.sum(),
    }
    return f"- {len(part)} {title}: " + "; ".join(f"{name} {value}" for name, value in words.items()) + "."


def _markdown(frame: Any) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return "" if value != value else f"{value:g}"
        return str(value).replace("\n", " ")

    rows = [list(frame.columns), ["---"] * len(frame.columns), *([cell(v) for v in row] for row in frame.values)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
