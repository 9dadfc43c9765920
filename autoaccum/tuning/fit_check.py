"""Decide from recordings whether a configuration fits. No torch here.

One recording answers for every micro-batch, and for all configurations that differ only in what uses no memory (loader
workers).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..configuration import LARGEST, Configuration
from ..plan import PeakRow, Plan
from ..reporting.what_if import Table, table_of
from ..simulation.solver import CAPACITY_MARGIN, Split, split_within
from ..units import show_bytes

Recorded = dict[str, Any]  # JSON values, as a study stores them


@dataclass(frozen=True)
class FitAnswer:
    """Whether a configuration fits, and with which split.

    Attributes:
        split: Samples in each micro-batch of a window; empty if not even the smallest fits.
        fits: Whether it fits.
        peak_bytes: Predicted peak of the process; 0 if unknown.
        why: Why it doesn't fit; empty if it fits.
    """

    split: Split = ()
    fits: bool = False
    peak_bytes: int = 0
    why: str = ""


class FitChecker:
    """Answer whether configurations fit, recording each kind once.

    Args:
        record: Records a configuration in a new process.
        load: Returns an earlier recording by its key; None if there is none.
        store: Called with the key and values of each new recording.

    Attributes:
        questions: How many questions were answered.
        recordings: How many recordings were made for them.
    """

    def __init__(
        self,
        record: Callable[[Configuration], Recorded],
        load: Callable[[str], Recorded | None],
        store: Callable[[str, Recorded], None],
    ) -> None:
        self._record, self._load, self._store = record, load, store
        self._known: dict[str, Recorded] = {}
        self.questions = self.recordings = 0

    def add(self, configuration: Configuration, recorded: Recorded) -> None:
        """Add a recording that exists already."""
        self._known[_key(configuration)] = recorded

    def answer(self, configuration: Configuration, samples: int) -> FitAnswer:
        """Return whether a window of that many samples fits in a configuration."""
        self.questions += 1
        return answer_from(self.recording(configuration), configuration.micro_batch, samples)

    @property
    def missing_bytes(self) -> int:
        """The bytes missing in the closest configuration; at least 1."""
        return min((each["missing_bytes"] for each in self._known.values() if each.get("missing_bytes")), default=1)

    def recording(self, configuration: Configuration) -> Recorded:
        """Return a configuration's recording, made now if there is none."""
        key = _key(configuration)
        if key not in self._known:
            found = self._load(key)
            if found is None:
                found = self._record(configuration)
                self.recordings += 1
                self._store(key, found)
            self._known[key] = found
        return self._known[key]


def _key(configuration: Configuration) -> str:
    return json.dumps(configuration.of_memory(), sort_keys=True)


def recorded_plan(plan: Plan) -> Recorded:
    """Return the parts of a plan that answer for every size."""
    table = table_of(plan)
    assert table is not None
    return {
        "why": "",
        "split": list(plan.split),
        "peak_bytes": plan.predicted_peak_bytes,
        "budget_bytes": plan.memory.budget.bytes,
        "table": asdict(table) | {"chosen": None},
    }


def answer_from(recorded: Recorded, micro_batch: int | str, samples: int) -> FitAnswer:
    """Read an answer from a recording.

    The recording's own split has the fewest steps that fit, by the solver; for more steps the table of peaks decides.
    """
    if recorded["why"]:
        return FitAnswer(why=recorded["why"])
    fewest, usable = tuple(recorded["split"]), int(recorded["budget_bytes"] * (1 - CAPACITY_MARGIN))
    table = Table(**{**recorded["table"], "rows": tuple(PeakRow(**row) for row in recorded["table"]["rows"])})
    split = fewest if micro_batch == LARGEST else split_within(samples, int(micro_batch), table.least)
    if split == fewest:
        return FitAnswer(split, True, recorded["peak_bytes"])
    peak = table.peak_bytes(split)
    if peak is not None and peak <= usable and len(split) >= len(fewest):
        return FitAnswer(split, True, peak)
    needs = f"{show_bytes(peak)} (predicted)" if peak is not None else "more than the largest size examined"
    return FitAnswer(
        split,
        False,
        peak or 0,
        f"micro-batches of {split[0]} need {needs}, and {show_bytes(usable)} can be used, the budget less 2 %; "
        f"{len(fewest)} steps of at most {fewest[0]} fit",
    )
