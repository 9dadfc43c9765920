"""Windows by their sizes alone: how a million micro-batches are weighed without making one.

A table of peaks sees of a window its first, second and last size and whether there is a second; so of all numbers of
steps only some hundreds to thousands can differ. `what_if.js` walks the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..simulation.solver import repeated_sizes


@dataclass(frozen=True)
class Shape:
    """A window of micro-batches.

    Attributes:
        runs: (how many, samples) of each size of micro-batch, largest first.
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
        """Samples in the second; where there is one micro-batch only, in that."""
        return self.runs[0 if self.runs[0][0] > 1 else -1][1]

    @property
    def last(self) -> int:
        """Samples in the last."""
        return self.runs[-1][1]


def balanced_shape(samples: int, steps: int) -> Shape:
    """Gives the shape of simulation/solver.py's `balanced`."""
    size, larger = divmod(samples, steps)
    return Shape(((larger, size + 1), (steps - larger, size)) if larger else ((steps, size),))


def uneven_shapes(samples: int, steps: int, *, least: int, most: int) -> Iterator[Shape]:
    """Gives the shapes of simulation/solver.py's `uneven`, in its order."""
    for size in repeated_sizes(samples, steps, min_size=least, max_size=most):
        yield Shape(((steps - 1, size), (1, samples - size * (steps - 1))))


def differing_steps(samples: int, fewest: int, most: int) -> Iterator[int]:
    """Gives the numbers of steps, ascending, whose windows differ in size from those of fewer steps.

    Balanced windows with the same smallest size differ only where one larger micro-batch is left, or none: the last two
    numbers asked about below. One size repeated and a rest comes with just one number of steps for each size, the first
    whose smallest size in balance is below it. That makes less than four times the root of `samples`.
    """
    steps = fewest
    while steps <= most:
        yield steps
        size = samples // steps
        one_larger, even = (samples - 1) // size, samples // size
        steps = next(each for each in (one_larger, even, even + 1) if each > steps)
