"""End the exactness test after a given time.

What a test costs isn't known before: in double precision on the host, the convolutions of a small U-Net on large images
take minutes, where a window on the GPU takes a second. So each operator looks at the clock, and the one that finds the
time over ends the test. On a GPU it waits for the device first: thousands of kernels may be queued.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..devices.registry import get_device
from ..torch_compat import TorchDispatchMode

LEAST_SECONDS = 20.0  # a plan's test may take as long as planning took, or this
# A test is one traced forward, and four windows of forward and backward, which cost about three forwards each: where
# the first forward takes more than its part, the rest would take too long.
TRACED_PART = 1 / 13
DOUBLE_PART = 1 / 2  # of the time, for a test in double precision; the other half is for one in the model's own


class OutOfTime(Exception):
    """Report that the test's time is over."""


@dataclass(frozen=True)
class TimeLimit:
    """Hold when the test has to end.

    Attributes:
        seconds: How long the test may take; infinite for as long as it needs.
        ends: When that is over, by the monotonic clock.
    """

    seconds: float
    ends: float

    @classmethod
    def of(cls, seconds: float | None) -> TimeLimit:
        """Return the limit that begins now; None for no limit."""
        allowed = float("inf") if seconds is None else seconds
        return cls(allowed, time.monotonic() + allowed)

    def held(self, device: torch.device, part: float = 1.0) -> AbstractContextManager[object]:
        """Make operators raise `OutOfTime` after a part of what is left.

        Args:
            device: Where the operators run.
            part: Of the time that is left now.
        """
        if self.ends == float("inf"):
            return nullcontext()
        now = time.monotonic()
        return _Clock(now + part * (self.ends - now), get_device(device).synchronize)


class _Clock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Look at the clock after each operator."""

    supports_higher_order_operators = True

    def __init__(self, ends: float, synchronize: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ends, self.synchronize = ends, synchronize

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.synchronize()
        if time.monotonic() > self.ends:
            raise OutOfTime
        return out
