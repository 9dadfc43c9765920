"""The micro-batches of one optimizer step, as they were loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import tree

if TYPE_CHECKING:
    from ..workload import Batch


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step, on the host.

    Attributes:
        pieces: The micro-batches, in the loader's order.
        sizes: Samples in each.
        samples: The index of each sample, piece after piece; empty where it isn't known.
        origin: What the indices count: "the dataset", say.
        load: Loads samples by their indices, where pieces can't be cut; None where they can.
        digest: Of all the window's samples, those of other ranks included; 0 on one rank.
    """

    pieces: tuple[Batch, ...]
    sizes: tuple[int, ...]
    samples: Sequence[Any] = ()
    origin: str = ""
    load: Callable[[Sequence[Any]], Batch] | None = None
    digest: int = 0

    def samples_of(self, index: int) -> Sequence[Any]:
        """Return the indices of one piece's samples."""
        start = sum(self.sizes[:index])
        return self.samples[start : start + self.sizes[index]]

    def only(self, indices: Sequence[int]) -> Window:
        """Return the window with these pieces only."""
        pieces, sizes = ([each[i] for i in indices] for each in (self.pieces, self.sizes))
        return Window(
            tuple(pieces), tuple(sizes), [s for i in indices for s in self.samples_of(i)], self.origin, self.load,
            self.digest,
        )  # fmt: skip


def widest_first(window: Window) -> Window:
    """Return the window with its largest micro-batches first.

    Only where they differ in width. On a device with a caching allocator the others are then served from what these
    leave.
    """
    leaves = [tree.tensors(piece) for piece in window.pieces]
    if len({tuple(leaf.shape[1:] for leaf in each) for each in leaves}) < 2:
        return window
    elements = [sum(leaf.numel() for leaf in each) for each in leaves]
    return window.only(sorted(range(len(elements)), key=lambda index: -elements[index]))
