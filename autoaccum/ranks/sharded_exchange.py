"""What a window exchanges where forward and backward are collectives (FSDP2).

Every rank runs as many micro-batches as the others: one that has fewer repeats a batch with a loss of 0. FSDP2 reduces
gradients itself, in each backward, and divides their sum by the number of ranks, or by what was set. The loss is
multiplied by that, so that the sum is the large batch's; where modules divide by different numbers, the gradients of
the few are multiplied after the last backward. No rank can start its window over, as the others are in its
collectives: a rank that fails ends all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .ending import Ending
from .exchange import Exchange
from .reduction import Reduction
from .words import TITLES, Control, Kind, failed_rank


class ShardedExchange(Exchange):
    """The exchange of a rank of a sharded model.

    Args:
        control: The words.
        buffers: What every rank takes from the first one.
        divisor: What FSDP2 divides sums of gradients by.
        others: Parameters whose gradients it divides by something else, and what they are multiplied by for that.

    Attributes:
        passes: Micro-batches that every rank runs of this window.
    """

    in_step = True

    def __init__(
        self,
        control: Control,
        buffers: Sequence[torch.Tensor],
        divisor: float,
        others: Sequence[tuple[torch.Tensor, float]] = (),
    ) -> None:
        super().__init__(control, Reduction([], buffers))
        self.loss_factor = divisor
        self._others = others
        self.passes = 0
        self._ending = Ending(control)
        self._spare: Any = None

    def begin(self, digest: int = 0) -> None:
        """Begin a window; it is never this rank's alone."""
        super().begin(digest)
        self.is_private = False

    def count(self, count: Any, samples: int, passes: int = 0) -> tuple[float | None, int]:
        """Return what all ranks count, and settle how many micro-batches run."""
        if self._totals is None:
            self.passes = passes
            self.digests = (*self.digests[:2], passes)
        return super().count(count, samples, passes)

    def level(self, pieces: Sequence[Any], sizes: Sequence[int]) -> tuple[Sequence[Any], Sequence[int]]:
        """Return as many micro-batches as others; further ones have size 0.

        Raises:
            RanksFailed: This rank had no batch yet that it could repeat.
        """
        if pieces:
            self._spare = pieces[-1]
        missing = self.passes - len(pieces)
        if missing and self._spare is None:
            raise failed_rank(self.control.rank, TITLES[Kind.COUNT], _NOTHING_YET, self.control.rank)
        return (*pieces, *[self._spare] * missing), (*sizes, *[0] * missing)

    def reduce(self, wide: Sequence[torch.Tensor], loss: torch.Tensor, calls: Sequence[int] = ()) -> torch.Tensor:
        """Return the window's loss; gradients are reduced already.

        Raises:
            RanksFailed: A rank failed.
        """
        found = super().reduce(wide, loss, calls)
        for parameter, factor in self._others:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return found

    def give_up(self, error: Exception) -> Exception:
        """End all other ranks; return this one's error."""
        text = str(error).partition("\n")[0] or type(error).__name__
        self._ending.end(f"{type(error).__name__}: {text}")
        phase = TITLES[self.next_word]
        return failed_rank(self.control.rank, phase, f"{type(error).__name__}: {text}", self.control.rank)

    def _other_samples(self, said: Sequence[tuple[int, ...]]) -> int | None:
        """Settle how many micro-batches all run; return a rank with other samples."""
        self.passes = max(each[2] for each in said)
        return next((rank for rank, each in enumerate(said) if each[:2] != said[0][:2]), None)


_NOTHING_YET = (
    "it has fewer micro-batches than other ranks, and had none before to repeat. FSDP2's ranks run equally many: give "
    "each rank a sample that counts in the first window"
)
