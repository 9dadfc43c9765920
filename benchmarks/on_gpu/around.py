"""Find the largest size that fits, around a guess.

No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

BEYOND = 2  # sizes above the first that fails which have to fail too: fitting isn't monotone


@dataclass
class Found:
    """What trying showed.

    Attributes:
        largest: The largest size that fitted; None where none did.
        fails: The smallest size above it that failed; None where none was tried.
        tried: Each tried size, and whether it fitted.
        is_complete: False where time ran out, so that `largest` is only a lower bound.
    """

    largest: int | None = None
    fails: int | None = None
    tried: dict[int, bool] = field(default_factory=dict)
    is_complete: bool = False


def largest_around(fits: Callable[[int], bool], start: int, may_go_on: Callable[[], bool], least: int = 1) -> Found:
    """Search from a guess by growing strides, then by halves.

    Args:
        fits: Whether a size fits; called once for each.
        start: The guess.
        may_go_on: Whether there is time for another size.
        least: The smallest size that can be trained.
    """
    found = Found()

    def works(n: int) -> bool:
        if n not in found.tried:
            found.tried[n] = fits(n)
        return found.tried[n]

    low, high = (start, None) if works(start) else (None, start)
    stride = 1
    while low is not None and high is None and may_go_on():
        low, high = (low + stride, None) if works(low + stride) else (low, low + stride)
        stride *= 2
    while low is None and high is not None and high > least and may_go_on():
        lower = max(least, high - stride)
        low, high = (lower, high) if works(lower) else (None, lower)
        stride *= 2
    while low is not None and high is not None and high - low > 1 and may_go_on():
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    beyond = high
    while low is not None and high is not None and high - low == 1 and beyond is not None and may_go_on():
        beyond += 1
        if beyond > high + BEYOND - 1:
            found.is_complete = True
            break
        if works(beyond):
            low, high = beyond, beyond + 1
            if not works(high):
                beyond = high
    if low is None and high is not None and high <= least:
        found.is_complete = True
    found.largest = low
    found.fails = min((n for n, worked in found.tried.items() if not worked and (low is None or n > low)), default=None)
    return found
