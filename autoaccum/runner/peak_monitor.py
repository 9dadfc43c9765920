"""Warn once where a window uses more memory than the plan predicts.

Memory used *before* a window isn't the plan's: loading data, or another library's start, may have had its peak then.
The kernel and torch keep one peak for the whole life of the process, and neither should be reset, since others may read
it. But a peak that *grew during a window* was that window's. So only such peaks count: the monitor can miss an excess
below an older peak, and never blames a window for what came before it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ..devices.registry import get_device
from ..plan import Plan
from ..planning.growth import at_run_time
from ..units import show_bytes

log = logging.getLogger("autoaccum")

TOLERATED_FACTOR = 1.02  # as much as a verification may differ


class PeakMonitor:
    """Compare the peak of each window with the plan.

    Attributes:
        warned: Whether a window was above the plan, and a warning given.
    """

    def __init__(self, device: torch.device, plan: Plan) -> None:
        self.device, self.plan = device, plan
        self.warned = False
        self._before_bytes = 0

    def begin(self) -> None:
        """Note the peak before a window."""
        self._before_bytes = 0 if self.warned else self._peak_bytes()

    def end(self) -> None:
        """Compare the peak after a window; warn once of an excess."""
        if self.warned:
            return
        peak = self._peak_bytes()
        if peak <= self._before_bytes or peak <= TOLERATED_FACTOR * self._planned_bytes():
            return
        used_bytes = peak - self._shared_bytes()
        if used_bytes > TOLERATED_FACTOR * self._planned_bytes():
            self.warned = True
            log.warning(
                "A window used %s %s; the plan predicts %s. %s",
                show_bytes(used_bytes),
                "of memory" if self.device.type == "cpu" else "of reserved memory",
                show_bytes(self._planned_bytes()),
                at_run_time(self.plan) or "Longer samples, data loading, workers' threads or other code use the rest.",
            )

    def _peak_bytes(self) -> int:
        """Return the process's highest resident or reserved bytes.

        Reserved on a GPU.
        """
        return get_device(self.device).lifetime_peak_bytes()

    def _planned_bytes(self) -> int:
        """Return the plan's figure for the same.

        Both include what is there before a window, the model above all.
        """
        return self.plan.predicted_peak_bytes

    def _shared_bytes(self) -> int:
        """Return resident bytes of files and of shared memory.

        The plan's private bytes don't include them.
        """
        if self.device.type == "cuda":
            return 0
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(words[1]) * 1024 for words in lines if words and words[0] in ("RssFile:", "RssShmem:"))
