"""Whether a window took more than the plan reckoned with; said once.

What a process took *before* a window is no matter of the plan: loading data, or another library's start, may have had
its peak then. The kernel and torch keep a peak of the whole life only, and neither should be set back, since others may
read it. But a peak that *grew during a window* was that window's. So only such ones count: the watch can miss a
drift below an older peak, and never blames a window for what came before it.
"""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import torch

from ..plan import Plan
from ..planning.growth import at_run_time
from ..units import show_bytes

log = logging.getLogger("autoaccum")

DRIFTS_BEYOND = 1.02  # as much as a verification may differ


class PeakMonitor:
    """Compares the peak of each window with the plan."""

    def __init__(self, device: torch.device, plan: Plan) -> None:
        self.device, self.plan = device, plan
        self.told = False
        self._before_bytes = 0

    def begin(self) -> None:
        """Before a window."""
        self._before_bytes = 0 if self.told else self._peak_bytes()

    def end(self) -> None:
        """After it; says so where it was the first to take more than was planned."""
        if self.told:
            return
        peak = self._peak_bytes()
        if peak <= self._before_bytes or peak <= DRIFTS_BEYOND * self._planned_bytes():
            return
        taken = peak - self._shared_bytes()
        if taken > DRIFTS_BEYOND * self._planned_bytes():
            self.told = True
            log.warning(
                "A window came to %s %s; the plan reckoned with %s. %s",
                show_bytes(taken),
                "in memory" if self.device.type == "cpu" else "reserved",
                show_bytes(self._planned_bytes()),
                at_run_time(self.plan) or "Longer samples, data loading, workers' threads or other code take the rest.",
            )

    def _peak_bytes(self) -> int:
        """The most of the process's life: resident, or reserved on the GPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _planned_bytes(self) -> int:
        """What the plan has for the same: on both sides the base is part of it, the model above all."""
        return self.plan.predicted_peak_bytes

    def _shared_bytes(self) -> int:
        """Resident pages of files and of shared memory: libraries, mapped data sets. The plan's bytes are private."""
        if self.device.type == "cuda":
            return 0
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(words[1]) * 1024 for words in lines if words and words[0] in ("RssFile:", "RssShmem:"))
