"""Find where larger micro-batches stop being faster, and how certainly.

The knee is the smallest micro-batch whose optimizer step takes at most 1 % longer than the fastest one's. Sizes are
compared round by round: each round times all of them in turn, so that noise affects all sizes equally. The median of
the ratios comes with a confidence interval; what it doesn't decide is reported as undecided. No torch here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import Plan, TimedSize
from ..units import show_bytes

KNEE_TOLERANCE = 0.01  # of the fastest time
CONFIDENCE = 0.95


@dataclass(frozen=True)
class SizeComparison:
    """Compare one size's times with those of the fastest.

    Attributes:
        timed: The size.
        ratio: Its time over the fastest's, the median over rounds.
        low: Lower end of the median's 95 % confidence interval; None with too few rounds.
        high: Its upper end.
    """

    timed: TimedSize
    ratio: float
    low: float | None
    high: float | None

    def is_within(self, tolerance: float) -> bool:
        """Return whether it takes at most that fraction longer, with confidence."""
        return self.high is not None and self.high <= 1 + tolerance

    def is_beyond(self, tolerance: float) -> bool:
        """Return whether it takes more than that fraction longer, with confidence."""
        return self.low is not None and self.low > 1 + tolerance


@dataclass(frozen=True)
class Knee:
    """Hold the knee and the comparisons behind it.

    Attributes:
        timed: The smallest size within 1 % of the fastest, by the medians.
        fastest: The fastest size, by the medians.
        compared: Every size compared with it, ascending.
        candidates: The sizes that may be the knee, by the intervals.
        rounds: Number of rounds.
    """

    timed: TimedSize
    fastest: TimedSize
    compared: tuple[SizeComparison, ...]
    candidates: tuple[int, ...]
    rounds: int

    @property
    def is_sure(self) -> bool:
        """Whether the rounds determine the size."""
        return self.candidates == (self.timed.micro_batch,) and self.compared[0].low is not None


def knee(times: Sequence[TimedSize], tolerance: float = KNEE_TOLERANCE) -> Knee | None:
    """Return the smallest micro-batch about as fast as the fastest."""
    if not times:
        return None
    ordered = sorted(times, key=lambda timed: timed.micro_batch)
    fastest = min(ordered, key=lambda timed: timed.step_seconds)
    compared = tuple(_compare(timed, fastest) for timed in ordered)
    found = next(each for each in compared if each.ratio <= 1 + tolerance)
    candidates = []
    for each in compared:
        if not each.is_beyond(tolerance):
            candidates.append(each.timed.micro_batch)
        if each.is_within(tolerance):
            break
    return Knee(found.timed, fastest, compared, tuple(candidates), min(timed.windows for timed in ordered))


def _compare(timed: TimedSize, fastest: TimedSize) -> SizeComparison:
    pairs = list(zip(timed.round_seconds, fastest.round_seconds, strict=False))
    if not pairs:
        return SizeComparison(timed, timed.step_seconds / fastest.step_seconds, None, None)
    ratios = [own / best for own, best in pairs]
    low, high = interval(ratios) or (None, None)
    return SizeComparison(timed, statistics.median(ratios), low, high)


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return the values between which the median lies with that confidence.

    The median is below the j-th smallest of n values with the probability that fewer than j of n coins show heads
    (order statistics; Conover, Practical Nonparametric Statistics, 3.2).

    Returns:
        The tightest such pair; None if the extremes don't reach the confidence (fewer than 6 values for 95 %).
    """
    ordered, n = sorted(values), len(values)
    below, least = 0.0, 0
    for j in range(1, n // 2 + 1):
        below += math.comb(n, j - 1) / 2**n  # fewer than j heads
        if 2 * below > 1 - confidence:
            break
        least = j
    return (ordered[least - 1], ordered[n - least]) if least else None


def freed_bytes(plan: Plan, micro_batch: int) -> int | None:
    """Return the predicted decrease of a plan's peak with smaller micro-batches."""
    rows = {row.micro_batch: row for row in plan.memory.peaks}
    if micro_batch not in rows or plan.micro_batch not in rows:
        return None
    samples = sum(plan.split)
    own, other = (rows[n].peak_bytes(-(-samples // n)) for n in (plan.micro_batch, micro_batch))
    return int((1 + plan.memory.malloc_overhead) * (own - other))


def describe(plan: Plan) -> str | None:
    """Describe the knee in one line; None without times."""
    found = knee(plan.timing.timed_sizes)
    if found is None:
        return None
    size, rounds = found.timed.micro_batch, f"{found.rounds} round{'s' * (found.rounds > 1)}"
    if not found.is_sure:
        what = _undecided(found, rounds)
    elif size == found.fastest.micro_batch:
        what = f"{size}, which is the fastest; smaller ones timed take over 1 % longer ({rounds})"
    else:
        own = next(each for each in found.compared if each.timed is found.timed)
        assert own.low is not None and own.high is not None
        what = (
            f"{size} is the smallest micro-batch within 1 % of the fastest, {found.fastest.micro_batch}: "
            f"{_percent(own.ratio)}, between {_percent(own.low)} and {_percent(own.high)} with 95 % ({rounds})"
        )
    return what + _freed(plan, size)


def _undecided(found: Knee, rounds: str) -> str:
    size = found.timed.micro_batch
    if not all(each.timed.round_seconds for each in found.compared):
        return f"{size} by medians, but the sizes were not timed in turn, so a difference of 1 % can't be resolved"
    if all(each.low is None for each in found.compared):
        return f"{size} by {rounds} of timing, too few to resolve 1 %"
    if len(found.candidates) == len(found.compared):
        return f"no difference that could be measured between {_listed(found.candidates)} ({rounds})"
    others = _listed([n for n in found.candidates if n != size])
    return f"{size} by the medians of {rounds}; noise leaves {others} possible"


def _listed(sizes: Sequence[int]) -> str:
    *most, last = (f"{n:,}" for n in sizes)
    return f"{', '.join(most)} and {last}" if most else last


def _freed(plan: Plan, size: int) -> str:
    if size == plan.micro_batch:
        return ""
    freed = freed_bytes(plan, size)
    if freed is None or freed <= 0:
        return ""
    return f"; {size} would free {show_bytes(freed)} (predicted)"


def _percent(ratio: float) -> str:
    return f"{round(100 * (ratio - 1), 1) or 0.0:+.1f} %"  # no -0.0
