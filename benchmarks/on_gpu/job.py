"""Describe what a trial's process is asked for, and how it answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

ROW = "ROW "


@dataclass(frozen=True)
class Job:
    """One trial.

    Attributes:
        part: Its part, a key of `trial.PARTS`.
        model: The model's name, or the part's own word.
        card: Facts about the card (card.py).
        known: Rows of an earlier run of this trial that was cut off, by step: their work isn't repeated.
        ends: When the trial is stopped, in seconds of the machine's monotonic clock.
    """

    part: str
    model: str
    card: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)
    ends: float = float("inf")

    @property
    def is_virtual(self) -> bool:
        """Whether the card is a virtual GPU."""
        return bool(self.card.get("virtual"))

    @property
    def seconds_left(self) -> float:
        """Seconds until the trial is stopped."""
        return self.ends - time.monotonic()

    def to_json(self) -> str:
        """Return the job as an argument of the trial's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what `to_json` returned."""
        return cls(**json.loads(text))

    def emit(self, step: str, **figures: Any) -> dict[str, Any]:
        """Print a row for the process that started this one."""
        row = {"part": self.part, "model": self.model, "step": step, **figures}
        print("\n" + ROW + json.dumps(row), flush=True)
        return row
