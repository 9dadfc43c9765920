"""Order free blocks of one size, by torch's version. No torch here.

Each stream's free blocks are a set ordered by stream, size and a third key (c10/cuda/CUDACachingAllocator.cpp); the
first that is large enough is taken. The third key changed twice:

    up to 2.11      address                                 `BlockComparatorSize`
    2.12            a counter for each new block            `BlockComparatorRegistrationCounter`, pytorch pull 178362
    2.13 and later  a counter for each new segment,         `BlockComparatorSizeCounterAddress`, pytorch pull 183591
                    then the address
"""

from __future__ import annotations

import re
from typing import Literal, get_args

TieRule = Literal["lowest address", "oldest block", "oldest segment"]
LOWEST_ADDRESS, OLDEST_BLOCK, OLDEST_SEGMENT = TIE_RULES = get_args(TieRule)
LATEST_KNOWN = (2, 15)
_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.\d+)*(?:\+(?:cpu|cu\d+))?")  # as download.pytorch.org builds them


def minor_version(version: str) -> tuple[int, int] | None:
    """Return a torch version's major and minor number, if it has them."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def tie_rule_of(version: str) -> TieRule | None:
    """Return the rule of a release of torch.

    Args:
        version: `torch.__version__`.

    Returns:
        The rule; None for what was not read or measured: a release after 2.15, a nightly, a vendor's or an own build.
    """
    release = _RELEASE.fullmatch(version)
    if release is None:
        return None
    minor = int(release[1]), int(release[2])
    if minor > LATEST_KNOWN:
        return None
    if minor <= (2, 11):
        return "lowest address"
    return "oldest block" if minor == (2, 12) else "oldest segment"


class Ranks:
    """Number blocks in the order in which equal ones are taken.

    Under "lowest address" a block's rank is its address; under "oldest segment" a position in an imaginary row of all
    segments, in the order in which they were made; under "oldest block" a counter.

    Attributes:
        rule: Which of the three.
        by_block: Whether each block has a counter of its own.
        by_address: Whether a rank is an address.
    """

    __slots__ = ("_next", "by_address", "by_block", "rule")

    def __init__(self, rule: TieRule) -> None:
        self.rule = rule
        self.by_address, self.by_block = rule == LOWEST_ADDRESS, rule == OLDEST_BLOCK
        self._next = 1

    def of_segment(self, address: int, span: int) -> int:
        """Return the rank of a new segment's first block."""
        if self.by_address:
            return address
        rank = self._next
        self._next += 1 if self.by_block else span
        return rank

    def of_block(self) -> int:
        """Return a new block's counter."""
        self._next += 1
        return self._next - 1
