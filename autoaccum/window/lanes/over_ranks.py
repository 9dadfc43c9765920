"""Let a rank's lanes meet those of the other ranks.

A rank's lanes are merged on its device, as on one rank. What they found, a few numbers for each channel, is brought to
all ranks by the host, in fp64, where every rank merges the same numbers in the same order: so all have the same bits.

    forward    values, mean and variance of each rank's lanes
    backward   the two sums that each input's gradient needs

In the backward a rank comes to every meeting of its forward, also where its own loss doesn't reach it: each has an
anchor, a number that the backward begins from as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ...ranks.exchange import Alone

NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(eq=False)
class RankMeeting:
    """One meeting of the lanes of all ranks.

    Args:
        exchange: Brings numbers to all ranks.
        name: Its name: equal on all ranks.
        absent: While planning: samples of ranks that are not here, for each one that is.

    Attributes:
        count: Values in each channel that all ranks brought.
    """

    exchange: Alone
    name: str
    absent: float = 0.0
    count: int = 0

    def merged(self, count: int, mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and biased variance of the values of all ranks.

        Merged as by Chan, Golub and LeVeque (1979), without a difference of large squares.

        Args:
            count: Values in each channel here.
            mean: Their mean.
            variance: Their biased variance.
        """
        counts, found = self._of_all("forward", count, (mean, variance), least=2)
        self.count = sum(counts)
        means, variances, shares = found[:, 0], found[:, 1], _shares(counts)
        exact = (shares * means).sum(0)
        spread = (shares * (variances + (means - exact).square())).sum(0)
        return _back(exact, mean), _back(spread, variance)

    def averaged(self, samples: int, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the means of values over all ranks, weighted by samples."""
        counts, found = self._of_all("forward", samples, values)
        means = (_shares(counts)[..., None] * found).sum(0)
        return [_back(each, value) for each, value in zip(means, values, strict=True)]

    def summed(
        self, projected: torch.Tensor | None, total: torch.Tensor | None, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the sums of two gradients over ranks.

        None where no rank's loss reaches this meeting.

        Args:
            projected: This rank's; None where its loss doesn't.
            total: This rank's other one.
            like: A tensor of their type, on their device.
        """
        own = () if projected is None or total is None else (projected, total)
        counts, found = self._of_all("backward", len(own), own)
        if not counts:
            return None
        sums = found.sum(0)
        return _back(sums[0], like), _back(sums[1], like)

    def rows(self, own: torch.Tensor) -> tuple[list[torch.Tensor], int]:
        """Return all ranks' rows, and the number before this one's own.

        While planning there are zeros for those of ranks that are not here.
        """
        payload = own.detach().contiguous().to("cpu").view(-1).view(torch.uint8)
        found, rank = self.exchange.bring(f"{self.name}, forward", len(own), payload), self.exchange.rank
        parts = [
            own.detach() if at == rank else each.view(own.dtype).view(rows, *own.shape[1:]).to(own.device)
            for at, (rows, each) in enumerate(found)
            if rows
        ]
        if self.absent:
            parts.append(absent_rows(own, self.absent))
        return parts, sum(rows for rows, _ in found[:rank])

    def summed_rows(self, gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """Return the sum over ranks of all rows' gradients, or None."""
        payload = NOTHING
        if gradient is not None:
            payload = gradient.detach().contiguous().to("cpu").view(-1).view(torch.uint8)
        found = self.exchange.bring(f"{self.name}, backward", int(gradient is not None), payload)
        parts = [each.view(like.dtype).view(like.shape) for has, each in found if has]
        return sum(parts[1:], parts[0]).to(like.device) if parts else None

    def _of_all(
        self, way: str, count: int, values: Sequence[torch.Tensor], least: int = 0
    ) -> tuple[list[int], torch.Tensor]:
        """Return the counts and values of the ranks that bring any.

        Values are of shape (ranks, values, channels).
        """
        payload = NOTHING
        if values:
            own = torch.stack([each.detach() for each in values])
            payload = own.to("cpu").to(torch.float64).view(-1).view(torch.uint8)
        found = self.exchange.bring(f"{self.name}, {way}", count, payload, least)
        there = [(each, brought) for each, brought in found if brought.numel()]
        if not there:
            return [], torch.empty(0)
        wide = [brought.view(torch.float64).view(max(2, len(values)), -1) for _, brought in there]
        return [each for each, _ in there], torch.stack(wide)


class GatherRows(torch.autograd.Function):
    """Give a rank's lanes the rows of all ranks."""

    @staticmethod
    def forward(ctx: Any, meeting: RankMeeting, *values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all rows, and an anchor."""
        own = torch.cat(values)
        parts, ctx.first = meeting.rows(own)
        together = torch.cat(parts)
        ctx.meeting, ctx.sizes, ctx.dtype = meeting, [len(each) for each in values], own.dtype
        ctx.like = torch.empty((), dtype=own.dtype, device=own.device).expand(together.shape)
        ctx.set_materialize_grads(False)
        return together, anchor_on(own.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, _anchor: Any) -> Any:
        """Return each lane's gradient, from the losses of all ranks."""
        total = ctx.meeting.summed_rows(gradient, ctx.like)
        if total is None:
            return None, *[None] * len(ctx.sizes)
        own = total[ctx.first : ctx.first + sum(ctx.sizes)]
        return None, *torch.split(own, ctx.sizes)


def gather_rows(meeting: RankMeeting, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `GatherRows`."""
    return cast(tuple[torch.Tensor, torch.Tensor], GatherRows.apply(meeting, *values))


def absent_rows(own: torch.Tensor, absent: float) -> torch.Tensor:
    """Return zeros in place of absent ranks' rows."""
    return own.new_zeros(round(len(own) * absent), *own.shape[1:])


def anchor_on(device: torch.device) -> torch.Tensor:
    """Return a number for a backward to begin from."""
    return torch.zeros((), device=device)


def _shares(counts: Sequence[int]) -> torch.Tensor:
    """Return each rank's part of all values, one row for each."""
    parts = [each / sum(counts) for each in counts]
    return torch.tensor(parts, dtype=torch.float64, device="cpu")[:, None]


def _back(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a host's tensor in another one's type and place."""
    return value.to(like.dtype).to(like.device)
