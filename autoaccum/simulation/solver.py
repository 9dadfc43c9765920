"""Find the smallest number of accumulation steps whose window fits.

It uses a target, a test of whether a split fits, and a lower bound of a micro-batch's bytes; no models, no devices, no
torch. It does not assume that "fits" is monotone: near an allocator's capacity it isn't, neither in the micro-batch nor
in the capacity.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CAPACITY_MARGIN = 0.02  # fraction of the capacity that may be missing later
MAX_UNEVEN_SIZES = 64  # tried for a number of steps whose balanced split doesn't fit

Split = tuple[int, ...]
Fits = Callable[[Split], bool]
Floor = Callable[[int], int]


@dataclass(frozen=True)
class Solution:
    """Hold the split that was found.

    Attributes:
        split: Samples in each micro-batch, largest first; its length is the number of accumulation steps.
        tried: Number of tested splits.
    """

    split: Split
    tried: int


def balanced(samples: int, steps: int) -> Split:
    """Split samples into micro-batches that differ by at most one.

    Larger ones first.

    Args:
        samples: At least `steps`.
        steps: At least 1.

    Returns:
        `steps` sizes that sum to `samples`.
    """
    if not 1 <= steps <= samples:
        raise ValueError(f"{samples} samples can't be split into {steps} micro-batches of at least one.")
    size, larger = divmod(samples, steps)
    return (size + 1,) * larger + (size,) * (steps - larger)


def steps_with_largest(samples: int, size: int) -> range:
    """Return the step counts whose balanced split has `size` as its largest."""
    if not 1 <= size <= samples:
        return range(0)
    fewest = -(-samples // size)
    return range(fewest, samples + 1 if size == 1 else -(-samples // (size - 1)))


def uniform_sizes(samples: int, *, min_size: int = 1, max_size: int | None = None) -> list[int]:
    """Return the micro-batches that divide the samples evenly, largest first."""
    most = min(max_size or samples, samples)
    small = [size for size in range(1, math.isqrt(samples) + 1) if samples % size == 0]
    return sorted(
        {size for each in small for size in (each, samples // each) if min_size <= size <= most}, reverse=True
    )


def split_within(samples: int, micro_batch: int, min_size: int = 1) -> Split:
    """Return the balanced split with fewest micro-batches of at most `micro_batch`.

    If that would make micro-batches smaller than `min_size`, use fewer steps, so that sizes exceed `micro_batch`.
    """
    steps = -(-samples // min(micro_batch, samples))
    return balanced(samples, min(steps, max(1, samples // min_size)))


def split_like(planned: Split, samples: int, min_size: int = 1) -> Split:
    """Cut an epoch's last samples by a plan's split.

    Args:
        planned: The plan's split.
        samples: Samples in the window.
        min_size: The smallest micro-batch allowed.
    """
    if samples == sum(planned):
        return planned  # which was verified; another of the same largest micro-batch may not fit
    if not is_even(planned):
        return repeated_within(samples, planned[0], min_size)  # sizes just below it don't fit
    return split_within(samples, planned[0], min_size)


def is_even(split: Split) -> bool:
    """Return whether sizes differ by at most one."""
    return max(split) - min(split) <= 1


def uneven(samples: int, steps: int, *, min_size: int = 1, max_size: int | None = None) -> Iterator[Split]:
    """Yield splits that repeat one size and end with a smaller rest.

    Args:
        samples: Samples in the window.
        steps: At least 2.
        min_size: The smallest micro-batch allowed, the rest included.
        max_size: The largest allowed; sizes stay within 5/4 of the balanced split's.

    Yields:
        At most `MAX_UNEVEN_SIZES` + 1 splits; none if `steps` exceeds the size, where one more step costs little.
    """
    for size in repeated_sizes(samples, steps, min_size=min_size, max_size=max_size):
        yield (size,) * (steps - 1) + (samples - size * (steps - 1),)


def repeated_sizes(samples: int, steps: int, *, min_size: int = 1, max_size: int | None = None) -> Iterator[int]:
    """Yield the sizes that `uneven` repeats."""
    even = -(-samples // steps)
    largest = min(max_size or samples, (samples - min_size) // (steps - 1), even + -(-even // 4))
    for size in range(even, largest + 1, 1 + even // (4 * MAX_UNEVEN_SIZES)):
        if size - (samples - size * (steps - 1)) > 1:
            yield size


def repeated_within(samples: int, size: int, min_size: int = 1) -> Split:
    """Repeat `size`, then a remainder of at least `min_size`.

    It is topped up from the one before.
    """
    whole, rest = divmod(samples, size)
    if not rest or not whole:
        return (size,) * whole or (samples,)
    lacking = max(0, min_size - rest)
    if size - lacking < min_size:
        return split_within(samples, size, min_size)
    return (*(size,) * (whole - 1), size - lacking, rest + lacking)


def rank_share(target_batch: int, world_size: int, rank: int) -> int:
    """Return the samples of an effective batch that one rank trains."""
    return balanced(target_batch, world_size)[rank]


def smallest_steps(
    fits: Fits,
    floor: Floor,
    *,
    samples: int,
    budget_bytes: int,
    min_size: int = 1,
    max_size: int | None = None,
    later_floor: Floor | None = None,
) -> Solution | None:
    """Find the smallest number of steps for which a split fits.

    For each k the balanced split is tried first, then splits that repeat one size and end with the rest, the most even
    first: with a caching allocator 129 + 129 + 129 + 125 may fit where 128 four times leaves unusable gaps. A repeated
    size must fit as a window of two, which is tested once for all k.

    Args:
        fits: Whether the window of a split fits.
        floor: Lower bound of the bytes of a window with a micro-batch of that size, not decreasing. It only saves
            tests: a k whose largest micro-batch exceeds the budget by it is skipped.
        samples: Samples in the window.
        budget_bytes: Compared with the floor.
        min_size: The smallest micro-batch allowed (2 where batch statistics are taken).
        max_size: The largest micro-batch allowed.
        later_floor: The same for a later micro-batch, when gradients exist. If these are large and samples small, it
            saves hundreds of tests.

    Returns:
        The solution; None if no k fits.
    """

    def within_reach(k: int) -> bool:
        if floor(-(-samples // k)) > budget_bytes:
            return False
        second = -(-(samples - 1) // k)  # balanced(samples, k)[1]
        return later_floor is None or k == 1 or later_floor(second) <= budget_bytes

    tried = 0

    def fits_counted(split: Split) -> bool:
        nonlocal tried
        tried += 1
        return fits(split)

    @functools.cache
    def repeats(n: int) -> bool:
        above = floor(n) > budget_bytes or (later_floor is not None and later_floor(n) > budget_bytes)
        return not above and fits_counted((n, n))

    min_size = min(min_size, samples)
    last, start = samples // min_size, max(1, -(-samples // (max_size or samples)))
    if start == 1 <= last and within_reach(1) and fits_counted((samples,)):
        return Solution((samples,), tried)  # a special case: it has no later micro-batches
    for k in range(_first_below(within_reach, max(start, 2), last), last + 1):
        others = (split for split in uneven(samples, k, min_size=min_size, max_size=max_size) if repeats(split[0]))
        for split in itertools.chain([balanced(samples, k)], others):
            if fits_counted(split):
                return Solution(split, tried)
    return None


def fewest_equal_steps(
    fits: Fits,
    floor: Floor,
    *,
    samples: int,
    budget_bytes: int,
    min_size: int = 1,
    max_size: int | None = None,
) -> Solution | None:
    """Find the fewest steps of one micro-batch size, without a rest.

    Args:
        fits: As above.
        floor: As above.
        samples: Samples in the window.
        budget_bytes: As above.
        min_size: The smallest micro-batch allowed.
        max_size: The largest allowed.

    Returns:
        The solution; None if no divisor of the samples fits.
    """
    tried = 0
    for size in uniform_sizes(samples, min_size=min_size, max_size=max_size):
        if floor(size) > budget_bytes:
            continue
        split = (size,) * (samples // size)
        tried += 1
        if fits(split):
            return Solution(split, tried)
    return None


def largest_micro_batch(fits: Fits, floor: Floor, *, budget_bytes: int, max_size: int, steps: int = 2) -> int:
    """Find the largest micro-batch that fits; 0 if none does.

    Args:
        fits: As above.
        floor: As above; with `steps` above 1, that of a later micro-batch saves the most tests.
        budget_bytes: As above.
        max_size: Upper end of the search.
        steps: Micro-batches in the window: 1 and 2 differ by the gradients; beyond 2 little changes.
    """
    # The first size, from 1 up, whose floor is above the budget; everything from there on is out of reach.
    size = _first_below(lambda n: floor(n) > budget_bytes, 1, max_size + 1) - 1
    while size > 0 and not fits((size,) * steps):
        size -= 1
    return size


def _first_below(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the first number in [low, high) that satisfies a monotone condition."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
