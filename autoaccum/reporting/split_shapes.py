"""Represent windows by their sizes, without creating every micro-batch.

A window's peak in the table depends on its first, second and last size and on whether it has a second, so of all step
counts only hundreds to thousands can differ. `what_if.js` visits the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..simulation.solver import repeated_sizes


@dataclass(frozen=True)
class Shape:
    """A window of micro-batches.

    Attributes:
        runs: (count, samples) of each size of micro-batch, largest first.
    """

    runs: tuple[tuple[int, int], ...]

    @property
    def steps(self) -> int:
        """Accumulation steps."""
        return sum(count for count, _ in self.runs)

    @property
    def samples(self) -> int:
        """Samples in the window."""
        return sum(count * size for count, size in self.runs)

    @property
    def first(self) -> int:
        """Samples in the first micro-batch."""
        return self.runs[0][1]

    @property
    def second(self) -> int:
        """Samples in the second micro-batch, or in the only one."""
        return self.runs[0 if self.runs[0][0] > 1 else -1][1]

    @property
    def last(self) -> int:
        """Samples in the last micro-batch."""
        return self.runs[-1][1]


def balanced_shape(samples: int, steps: int) -> Shape:
    """Return the shape of simulation/solver.py's `balanced`."""
    size, larger = divmod(samples, steps)
    return Shape(((larger, size + 1), (steps - larger, size)) if larger else ((steps, size),))


def uneven_shapes(samples: int, steps: int, *, least: int, most: int) -> Iterator[Shape]:
    """Yield the shapes of simulation/solver.py's `uneven`, in its order."""
    for size in repeated_sizes(samples, steps, min_size=least, max_size=most):
        yield Shape(((steps - 1, size), (1, samples - size * (steps - 1))))


def differing_steps(samples: int, fewest: int, most: int) -> Iterator[int]:
    """Yield, ascending, the step counts whose windows differ from those of fewer.

    Balanced windows with the same smallest size differ only if one larger micro-batch remains, or none: the first two
    candidates below. A window of one repeated size and a rest exists for just one step count per size, the first whose
    smallest balanced size is below it. In total these are less than four times the square root of `samples`.
    """
    steps = fewest
    while steps <= most:
        yield steps
        size = samples // steps
        one_larger, even = (samples - 1) // size, samples // size
        steps = next(each for each in (one_larger, even, even + 1) if each > steps)
