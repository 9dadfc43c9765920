"""Give out addresses as a driver does. No torch here.

The nearest gap to one end that is large enough: from the bottom up, or, as on a GPU under Linux, from the top down (the
driver reserves ranges by `mmap`, which begins at the top; docs/ground-truth.md). Not modelled: a GPU puts what is
smaller than 32 MiB into such ranges of 32 MiB, and fills these from the bottom up.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

PAGE_BYTES = 2 << 20  # the driver's granularity


def edge_of(used: Iterable[tuple[int, int]], down: bool, otherwise: int) -> int:
    """Return where addresses begin: at the bottom or at the top.

    Args:
        used: Ranges in use, as (address, bytes); nothing is taken to be free before the first of them.
        down: Whether later addresses lie below earlier ones.
        otherwise: The edge where nothing is in use.
    """
    if down:
        return max((address + size for address, size in used), default=otherwise)
    return min((address for address, _ in used), default=otherwise)


class Addresses:
    """Hold which addresses are in use.

    Args:
        edge: Where addresses begin: their lower end, or, where they go down, their upper.
        down: Whether later addresses lie below earlier ones.
        used: Ranges in use, as (address, bytes).

    Attributes:
        down: As given.
    """

    def __init__(self, edge: int, down: bool, used: Iterable[tuple[int, int]] = ()) -> None:
        self.down, self._edge = down, edge
        self._gaps: list[tuple[int, int]] = []  # distance from the edge and bytes, nearest first
        self._reach = 0  # beyond it nothing is in use
        self._sizes: dict[int, int] = {}
        placed = sorted((self._distance(address, size), address, size) for address, size in used)
        for distance, address, size in placed:
            if distance > self._reach:
                self._gaps.append((self._reach, distance - self._reach))
            self._sizes[address] = size
            self._reach = max(self._reach, distance + size)

    def take(self, size: int) -> int:
        """Return the address of the nearest gap of at least `size` bytes."""
        size = -(-size // PAGE_BYTES) * PAGE_BYTES
        for place, (distance, room) in enumerate(self._gaps):
            if room >= size:
                self._gaps[place : place + 1] = [(distance + size, room - size)] if room > size else []
                break
        else:
            distance = self._reach
            self._reach += size
        address = self._edge - distance - size if self.down else self._edge + distance
        self._sizes[address] = size
        return address

    def give(self, address: int) -> None:
        """Return a range to the driver."""
        size = self._sizes.pop(address)
        distance = self._distance(address, size)
        place = bisect_left(self._gaps, (distance, 0))
        if place < len(self._gaps) and distance + size == self._gaps[place][0]:
            size += self._gaps.pop(place)[1]
        if place and sum(self._gaps[place - 1]) == distance:
            distance, before = self._gaps.pop(place - 1)
            size += before
        if distance + size == self._reach:
            self._reach = distance
        else:
            insort(self._gaps, (distance, size))

    def _distance(self, address: int, size: int) -> int:
        return self._edge - address - size if self.down else address - self._edge
