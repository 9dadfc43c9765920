"""Whether a configuration fits, answered from recordings: one for each that needs memory in its own way. No torch here.

A recording tells for every micro-batch at once; what changes no memory (loader workers) shares it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..configuration import LARGEST, Configuration
from ..plan import PeakRow, Plan
from ..reporting.what_if import Table, table_of
from ..simulation.solver import CAPACITY_MARGIN, Split, split_within
from ..units import show_bytes

Recorded = dict[str, Any]  # as JSON: what a study keeps


@dataclass(frozen=True)
class Answer:
    """What a recording says of a configuration.

    Attributes:
        split: The micro-batches of a window; empty where not even the smallest fits.
        fits: Whether it fits.
        peak_bytes: What the process comes to; 0 where that isn't known.
        why: Why it doesn't fit, in words; empty where it does.
    """

    split: Split = ()
    fits: bool = False
    peak_bytes: int = 0
    why: str = ""


class Memory:
    """Answers, and the recordings they rest on.

    Args:
        record: Records a configuration in a process of its own.
        known: A recording made before, by its key; None where there is none.
        keep: Called with each new one.

    Attributes:
        asked: How many questions were answered.
        recorded: How many recordings were made for them.
    """

    def __init__(
        self,
        record: Callable[[Configuration], Recorded],
        known: Callable[[str], Recorded | None],
        keep: Callable[[str, Recorded], None],
    ) -> None:
        self._record, self._find, self._keep = record, known, keep
        self._known: dict[str, Recorded] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self.asked = self.recorded = 0

    def add(self, configuration: Configuration, recorded: Recorded) -> None:
        """A recording that was made already."""
        self._known[_key(configuration)] = recorded

    def answer(self, configuration: Configuration, samples: int) -> Answer:
        """Whether a window of so many samples fits in that configuration."""
        self.asked += 1
        return answer_from(self.recording(configuration), configuration.micro_batch, samples)

    @property
    def missing_bytes(self) -> int:
        """What the configuration that lacks least lacks; at least 1."""
        return min((told["missing_bytes"] for told in self._known.values() if told.get("missing_bytes")), default=1)

    def recording(self, configuration: Configuration) -> Recorded:
        """The recording that stands for it, made now if there is none."""
        key = _key(configuration)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # the same one is recorded once, others at the same time
            if key not in self._known:
                found = self._find(key)
                if found is None:
                    found = self._record(configuration)
                    self.recorded += 1
                    self._keep(key, found)
                self._known[key] = found
            return self._known[key]


def _key(configuration: Configuration) -> str:
    return json.dumps(configuration.of_memory(), sort_keys=True)


def recorded_plan(plan: Plan) -> Recorded:
    """What of a plan is needed to answer for every micro-batch."""
    table = table_of(plan)
    assert table is not None
    return {
        "why": "",
        "split": list(plan.split),
        "peak_bytes": plan.predicted_peak_bytes,
        "budget_bytes": plan.budget.bytes,
        "table": asdict(table) | {"chosen": None},
    }


def answer_from(recorded: Recorded, micro_batch: int | str, samples: int) -> Answer:
    """Reads an answer off a recording.

    The recording's own split is the fewest steps that fit, by the solver; with more steps the table of peaks decides.
    """
    if recorded["why"]:
        return Answer(why=recorded["why"])
    fewest, usable = tuple(recorded["split"]), int(recorded["budget_bytes"] * (1 - CAPACITY_MARGIN))
    table = Table(**{**recorded["table"], "rows": tuple(PeakRow(**row) for row in recorded["table"]["rows"])})
    split = fewest if micro_batch == LARGEST else split_within(samples, int(micro_batch), table.least)
    if split == fewest:
        return Answer(split, True, recorded["peak_bytes"])
    peak = table.peak_bytes(split)
    if peak is not None and peak <= usable and len(split) >= len(fewest):
        return Answer(split, True, peak)
    needs = f"{show_bytes(peak)} (predicted)" if peak is not None else "more than any size that was looked at"
    return Answer(
        split,
        False,
        peak or 0,
        f"micro-batches of {split[0]} need {needs}, and {show_bytes(usable)} can be used, the budget less 2 %; "
        f"{len(fewest)} steps of at most {fewest[0]} fit",
    )
