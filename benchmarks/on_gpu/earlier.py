"""Rank trials by what was measured on a real card before.

A run on a real card has minutes. What no card has measured yet comes first, then what wasn't as predicted, then what
was. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from . import verdicts
from .rows import DONE, FINAL, Row, by_trial, read
from .schedule import MEASURED, NEW, NOT_AS_PREDICTED, Trial

Key = tuple[str, str]  # part and model
T = TypeVar("T", bound=Trial)


def real_rows(folders: Iterable[Path]) -> list[Row]:
    """Return the rows of real cards in folders, the oldest first."""
    paths = {path.resolve() for folder in folders for path in folder.glob("*-on-gpu.jsonl")}
    return [row for path in sorted(paths, key=lambda each: each.name) for row in read(path) if not row.get("virtual")]


def ranks(rows: Sequence[Row]) -> dict[Key, int]:
    """Return the rank of each trial that has rows; others are new."""
    trials, found = by_trial(rows), {}
    for (part, model), steps in trials.items():
        if part not in verdicts.PARTS:
            continue
        others = {each: trials[each, model] for each in verdicts.PARTS if (each, model) in trials}
        found[part, model] = _rank(part, steps, others)
    return found


def _rank(part: str, steps: Mapping[str, Row], others: Mapping[str, Mapping[str, Row]]) -> int:
    if steps.get(FINAL, {}).get("status") != DONE or "skipped" in steps:
        return NEW
    lines = verdicts.PARTS[part](steps, others)
    wrong = not lines or any(str(line["verdict"]).startswith(verdicts.FAULT) for line in lines)
    incomplete = not steps.get("truth", {}).get("complete", True)
    return NOT_AS_PREDICTED if wrong or incomplete else MEASURED


def in_order(trials: Sequence[Trial], rows: Sequence[Row]) -> list[Trial]:
    """Return ranked trials, those not measured on a real card first."""
    known = ranks(rows)
    ranked = [each.ranked(known.get((each.part, each.model), NEW)) for each in trials]
    return sorted(ranked, key=lambda each: each.rank)
