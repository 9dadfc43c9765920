"""Make one table of all rows, and write it for benchmarks/results."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables

from . import verdicts
from .rows import DONE, FINAL, Row, by_trial
from .schedule import TITLES

COLUMNS = (
    "part", "what", "predicted GiB", "measured GiB", "off %", "largest", "true largest", "OOMs", "retries", "passes",
    "s", "verdict",
)  # fmt: skip
BESIDE = ("card", "kind", "driver", "torch", "cuda", "cudnn", "python")
STEP_NAMES = {"d": ("window", "after OOM"), "e": ("Runner", "knee", "copies")}


def lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the table's lines: at least one for each trial."""
    trials, found = by_trial(rows), []
    for part in TITLES:
        for (own, model), steps in trials.items():
            if own != part:
                continue
            others = {each: trials[each, model] for each in TITLES if (each, model) in trials}
            made = verdicts.PARTS[part](steps, others)
            final = steps.get(FINAL, {})
            if final.get("status", DONE) != DONE:
                made.append({"verdict": _ended(final)})
            elif "skipped" in steps:
                made.append({"verdict": f"skipped: {steps['skipped']['why']}"})
            for index, line in enumerate(made):
                names = STEP_NAMES.get(part, ())
                more = line.get("what") or (names[index] if index < len(names) and len(made) > 1 else "")
                what = (more or model) if part == "g" else f"{model}, {more}" if more else model
                found.append({column: "" for column in COLUMNS} | line | {"part": part, "what": what})
    return found


def _ended(final: Row) -> str:
    """Return why a trial is not whole, in words."""
    return f"{'' if final['status'] == 'skipped' else verdicts.FAULT}{final['status']}: {final['why']}"


def faults(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the lines that are not as predicted."""
    return [line for line in lines(rows) if str(line["verdict"]).startswith(verdicts.FAULT)]


def as_text(rows: Sequence[Row], seconds: float | None = None) -> str:
    """Return the whole report as Markdown."""
    if not rows:
        return "no rows"
    beside, found = rows[-1], lines(rows)
    wrong = [line for line in found if str(line["verdict"]).startswith(verdicts.FAULT)]
    skipped = [line for line in found if str(line["verdict"]).startswith("skipped")]
    took = f", {seconds / 60:.1f} minutes" if seconds is not None else ""
    count = f"{len(found)} lines, {len(wrong)} not as predicted, {len(skipped)} skipped"
    words = [
        f"# On {beside['card']}: {beside['kind']}",
        f"`python -m benchmarks.on_gpu`: driver {beside['driver']}, torch {beside['torch']} (CUDA {beside['cuda']}, "
        f"cuDNN {beside['cudnn']}), Python {beside['python']}{took}. {count}. "
        "Of (b), what --gpu predicts stands beside the card's own plan; of (c), what budgets assume beside what NVML "
        "shows; of (f), what the finder chose beside the true largest. docs/on-gpu.md explains it.",
        *[f"- ({part}) {title}" for part, title in TITLES.items()],
    ]
    table = tables.markdown([{column: _cell(line[column]) for column in COLUMNS} for line in found])
    return "\n\n".join([*words[:2], "\n".join(words[2:]), table]) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def write(path: Path, rows: Sequence[Row], seconds: float | None = None) -> str:
    """Write the table as .md and .csv; return it."""
    text = as_text(rows, seconds)
    path.with_suffix(".md").write_text(text)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *BESIDE], lineterminator="\n")
        writer.writeheader()
        for line in lines(rows):
            writer.writerow(line | {key: rows[-1].get(key, "") for key in BESIDE})
    return text
