"""Where larger micro-batches stop being faster. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from ..plan import TimedSize

WITHIN = 0.01


def knee(times: Sequence[TimedSize], within: float = WITHIN) -> TimedSize | None:
    """The smallest micro-batch whose optimizer step takes at most that part longer than the fastest; None of none."""
    if not times:
        return None
    best = min(timed.step_seconds for timed in times)
    return min(
        (timed for timed in times if timed.step_seconds <= (1 + within) * best), key=lambda timed: timed.micro_batch
    )
