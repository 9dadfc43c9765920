"""Normalize a window's micro-batches by the statistics of all.

In each lane two nodes, and between them one that all lanes share:

    Enter                 a lane's input; its mean and variance leave as a few numbers for each channel
    Join                  the mean and variance of the whole window, and the weight and bias that lanes normalize with
    native_batch_norm     a lane's input, normalized by these: torch's own node, in evaluation mode

Backward, torch's node returns the gradient of its input as though mean and variance were constants, and those of weight
and bias: a lane's share of two sums for each channel. `Join` gets these of all lanes, and each `Enter` adds what is due
to mean and variance: so each has the gradient of its own input, that of one batch, as torch has it for one
(aten/src/ATen/native/Normalization.cpp). Only the inputs' gradients are there for all lanes simultaneously, and neither
statistics nor gradient needs a pass that has all inputs at once, nor more passes than torch takes for one batch. What
passes from `Join` to `Enter` in place of gradients are coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ...errors import UsageError
from .over_ranks import RankMeeting, anchor_on
from .torch_internals import modes_off

JOIN_ARGUMENTS = 7  # of `Join`, before the lanes' rows
ROWS = 3  # of what passes between a lane and the meeting, for each channel: as many go back


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of a dtype are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class Gate:
    """Whether a window's backward may run: after the last lane has ended."""

    open: bool = False

    def pass_through(self) -> None:
        """Refuse a backward that a loss runs by itself.

        Raises:
            UsageError: Other lanes haven't ended.
        """
        if not self.open:
            raise UsageError(
                "The loss takes a gradient through a batch normalization while it is computed.",
                "With statistics of the whole window, that gradient depends on micro-batches that haven't been "
                "computed yet.",
                "Use batchnorm='frozen', 'merged' or 'per_micro_batch' with a gradient penalty.",
            )


@dataclass(frozen=True, eq=False)
class Joined:
    """What a meeting found.

    Attributes:
        mean: The window's mean for each channel.
        variance: Its biased variance.
        weight: What lanes multiply by; its gradient is a lane's share of a sum that each input's gradient needs.
        bias: What lanes add; the same holds for its gradient.
        means: Each lane's own mean, one row for each lane.
        anchor: Over ranks: a number that the backward begins from as well.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    means: torch.Tensor
    anchor: torch.Tensor | None = None

    def alike(self) -> Joined:
        """Return the same without a graph; gradients are required where they were."""
        weight, bias = (each.detach().requires_grad_(each.requires_grad) for each in (self.weight, self.bias))
        return Joined(self.mean, self.variance, weight, bias, self.means)


class Enter(torch.autograd.Function):
    """Hand a lane's statistics to the meeting."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input, and rows with its mean and variance."""
        ctx.gate = gate
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.view_as(x), statistics(x)

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor | None, rows: torch.Tensor | None) -> Any:
        """Add to the input's gradient what is due to mean and variance.

        Args:
            ctx: The node's.
            dh: The gradient with mean and variance constant.
            rows: What `Join` returns for each channel.
        """
        ctx.gate.pass_through()
        (x,) = ctx.saved_tensors
        if rows is None or not x.numel():
            return dh, None
        with modes_off():
            if dh is None:
                dh = torch.zeros_like(x)
            return (_added_on_cuda if x.device.type == "cuda" else _added)(x, dh, *rows.unbind(0)), None


def statistics(x: torch.Tensor) -> torch.Tensor:
    """Return rows with the mean and the biased variance of each channel."""
    dtype, channels = wide(x.dtype), x.shape[1]
    if not x.numel():
        return torch.zeros(ROWS, channels, dtype=dtype, device=x.device)
    unused: Sequence[Any] = (None, None)
    if dtype != x.dtype:  # the kernel's results have the type of these
        unused = torch.zeros(2, channels, dtype=dtype, device=x.device).unbind(0)
    mean, variance = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    return torch.stack((mean, variance, variance))


def _added(
    x: torch.Tensor, dh: torch.Tensor, mean: torch.Tensor, along: torch.Tensor, constant: torch.Tensor
) -> torch.Tensor:
    """Add (x - mean) * along + constant, for each channel.

    By the kernel that normalizes, with a variance of 0 and an epsilon of 1: broadcasting takes several times as long.
    """
    found = torch.native_batch_norm(x, along, constant, mean, torch.zeros_like(mean), False, 0.0, 1.0)[0]
    return found.add_(dh)


def _added_on_cuda(
    x: torch.Tensor, dh: torch.Tensor, mean: torch.Tensor, along: torch.Tensor, constant: torch.Tensor
) -> torch.Tensor:
    """Add (x - mean) * along + constant in one pass.

    By the kernel of torch.nn.SyncBatchNorm: (dh - sum / count - (x - mean) * scale ** 2 * product / count) * scale.
    """
    count = torch.ones(1, dtype=torch.int32, device=x.device)
    return torch.batch_norm_backward_elemt(dh, x, mean, torch.ones_like(mean), None, -constant, -along, count)


class Join(torch.autograd.Function):
    """Merge the statistics of all lanes."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        gate: Gate,
        count: int,
        shares: torch.Tensor,
        ranks: RankMeeting | None,
        *rows: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return the window's mean and variance, weight, bias, and all lanes' means.

        Over ranks there is an anchor as well.

        Merged as by Chan, Golub and LeVeque (1979), without a difference of large squares.
        """
        together = torch.stack(rows).to(shares.dtype)  # as many allocations, whatever the number of lanes
        means, variances = together[:, 0], together[:, 1]
        exact = (shares * means).sum(0)
        apart = means - exact
        spread = torch.addcmul(variances, apart, apart).mul_(shares).sum(0)
        if ranks is not None:
            exact, spread = ranks.merged(count, exact, spread)
            count = ranks.count
        mean, variance = exact.to(rows[0].dtype), spread.to(rows[0].dtype)
        own_weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype, copy=True)
        own_bias = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype, copy=True)
        ctx.eps, ctx.gate, ctx.count, ctx.lanes, ctx.ranks = eps, gate, count, len(rows), ranks
        ctx.dtypes = [None if each is None else each.dtype for each in (weight, bias)]
        ctx.save_for_backward(own_weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance, means)
        ctx.set_materialize_grads(False)
        found = mean, variance, own_weight, own_bias, means
        return found if ranks is None else (*found, anchor_on(mean.device))

    @staticmethod
    def backward(ctx: Any, _mean: Any, _variance: Any, projected: Any, total: Any, *_others: Any) -> Any:
        """Return the gradients of weight and bias, and rows for each lane.

        Args:
            ctx: The node's.
            projected: For each channel, the outputs' gradients times the normalized inputs, over all lanes.
            total: For each channel, the outputs' gradients, over all lanes.
        """
        ctx.gate.pass_through()
        weight, mean, variance = ctx.saved_tensors
        with modes_off():
            sums = (projected, total) if ctx.ranks is None else ctx.ranks.summed(projected, total, mean)
            if sums is None:  # no rank's loss reaches this normalization
                return (*[None] * JOIN_ARGUMENTS, *[None] * ctx.lanes)
            scale = torch.rsqrt(variance + ctx.eps)
            each = weight * scale / -ctx.count
            rows = torch.stack((mean, each * scale * sums[0], each * sums[1]))
            parts = zip((projected, total), ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
            own = [value.to(dtype) if needed and value is not None else None for value, dtype, needed in parts]
        return (*own, *[None] * (JOIN_ARGUMENTS - 2), *[rows] * ctx.lanes)


def enter(x: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `Enter`."""
    return cast(tuple[torch.Tensor, torch.Tensor], Enter.apply(x, gate))


def join(
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    gate: Gate,
    count: int,
    shares: torch.Tensor,
    rows: Sequence[torch.Tensor],
    ranks: RankMeeting | None = None,
) -> Joined:
    """Apply `Join`.

    Args:
        weight: The module's, or None.
        bias: The module's, or None.
        eps: What is added to the variance.
        gate: Whether the backward may run.
        count: Values in each channel, of the whole window; with ranks, of this one's part.
        shares: Each lane's part of these, one row for each lane; in the dtype to merge in.
        rows: Each lane's statistics.
        ranks: Where these lanes meet those of other ranks.
    """
    return Joined(*cast(tuple[torch.Tensor, ...], Join.apply(weight, bias, eps, gate, count, shares, ranks, *rows)))


def leave(h: torch.Tensor, joined: Joined, eps: float) -> torch.Tensor:
    """Normalize a lane's input by the window's statistics."""
    own = joined.weight, joined.bias, joined.mean, joined.variance, False, 0.0, eps
    if not h.numel():
        return torch.batch_norm(h, *own, False)
    return torch.native_batch_norm(h, *own)[0]
