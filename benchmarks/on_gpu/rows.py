"""Keep rows as lines of JSON, written at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

Row = dict[str, Any]
FINAL = "final"  # a step: the trial is over
DONE, FAILED, SKIPPED, STOPPED = "done", "failed", "skipped", "stopped"


@dataclass
class Rows:
    """Rows of a run, in a file.

    Attributes:
        path: The file; a run that was killed leaves every row that was known.
        facts: What is written beside each figure: the card, its driver, torch's version.
        rows: All rows, those of an earlier run included where it is resumed.
    """

    path: Path
    facts: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, row: Row) -> Row:
        """Append a row to the file at once."""
        whole = {**row, **self.facts}
        with self._lock:
            self.rows.append(whole)
            with self.path.open("a") as file:
                file.write(json.dumps(whole) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return whole

    def steps(self, part: str, model: str) -> dict[str, Row]:
        """Return a trial's rows by step; of several the last."""
        return {row["step"]: row for row in self.rows if (row["part"], row["model"]) == (part, model)}

    def is_done(self, part: str, model: str) -> bool:
        """Return whether a trial ended well, and needs no repetition."""
        return self.steps(part, model).get(FINAL, {}).get("status") == DONE


def read(path: Path) -> list[Row]:
    """Read a file's rows, without a line that was cut off."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def by_trial(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Group rows by part and model, then by step.

    Of several runs of a trial the last counts.
    """
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["part"], row["model"]), {})[row["step"]] = row
    return found
