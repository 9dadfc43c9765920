"""Normalize a window's micro-batches by the statistics of all.

In each lane two nodes, and between them one that all lanes share:

    Enter     a lane's input; its mean and variance leave as a few numbers for each channel
    Join      the mean and variance of the whole window
    Leave     a lane's input, normalized by these

Backward, each `Leave` returns its share of two sums for each channel, `Join` gets these of all lanes, and each `Enter`
has the gradient of its own input: that of one batch, as torch has it for one (aten/src/ATen/native/Normalization.cpp).
So only the inputs' gradients are there for all lanes simultaneously, and neither statistics nor gradient needs a pass
that has all inputs at once. What passes between the three in place of gradients are coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from ...errors import UsageError

ROWS = 4  # of what passes between lanes and the meeting, for each channel


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


class Enter(torch.autograd.Function):
    """Hand a lane's statistics to the meeting."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input, and rows with its mean, variance and two zeros."""
        ctx.gate = gate
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        channels, dtype = x.shape[1], wide(x.dtype)
        rows = torch.zeros(ROWS, channels, dtype=dtype, device=x.device)
        if x.numel():
            unused = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
            rows[0], rows[1] = torch.batch_norm_update_stats(x, *unused, 0.0)
        return x.view_as(x), rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: torch.Tensor | None, rows: torch.Tensor | None) -> Any:
        """Return the input's gradient from what `Join` returns for each channel."""
        ctx.gate.pass_through()
        (x,) = ctx.saved_tensors
        if rows is None:
            return dh, None
        shape = [1, -1] + [1] * (x.dim() - 2)
        direct, along, constant, mean = (row.view(shape) for row in rows)
        found = x.to(rows.dtype) - mean  # not x * along: a large mean would cancel
        found.mul_(along).add_(constant)
        if dh is not None:
            found.addcmul_(dh.to(rows.dtype), direct)
        return found.to(x.dtype), None


class Join(torch.autograd.Function):
    """Merge the statistics of all lanes."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        counts: list[int],
        *rows: torch.Tensor,
    ) -> torch.Tensor:
        """Return the window's mean and variance, of shape (2, channels).

        Merged as by Chan, Golub and LeVeque (1979), without a difference of large squares.
        """
        dtype = torch.float32 if rows[0].device.type == "mps" else torch.float64
        means, variances = (torch.stack([each[row].to(dtype) for each in rows]) for row in (0, 1))
        shares = torch.tensor(counts, dtype=dtype).div_(sum(counts)).to(means.device)[:, None]
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        merged = torch.stack([mean, variance]).to(rows[0].dtype)
        ctx.eps, ctx.count, ctx.lanes = eps, sum(counts), len(rows)
        ctx.dtypes = [None if each is None else each.dtype for each in (weight, bias)]
        ctx.save_for_backward(weight, merged)
        return merged

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, sums: torch.Tensor) -> Any:
        """Return the gradients of weight and bias, and rows for each lane.

        Args:
            ctx: The node's.
            sums: For each channel, the outputs' gradients and these times the normalized inputs, over all lanes.
        """
        weight, (mean, variance) = ctx.saved_tensors
        scale = torch.rsqrt(variance + ctx.eps)
        direct = scale if weight is None else scale * weight.to(scale.dtype)
        total, projected = sums
        along = -direct * scale * projected / ctx.count
        rows = torch.stack([direct, along, -direct * total / ctx.count, mean])
        parts = zip((projected, total), ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        own = [value.to(dtype) if needed else None for value, dtype, needed in parts]
        return (*own, None, None, *[rows] * ctx.lanes)


class Leave(torch.autograd.Function):
    """Normalize a lane's input by the window's statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        merged: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        gate: Gate,
    ) -> torch.Tensor:
        """Return the output, in the input's dtype."""
        ctx.eps, ctx.gate = eps, gate
        ctx.save_for_backward(h, merged)
        return F.batch_norm(h, merged[0], merged[1], weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        """Return the output's gradient, and this lane's part of two sums."""
        ctx.gate.pass_through()
        h, merged = ctx.saved_tensors
        mean, variance = merged
        own = torch.ones_like(mean), mean, variance, mean, torch.rsqrt(variance + ctx.eps)  # CUDA reads the last two
        _, projected, total = torch.ops.aten.native_batch_norm_backward(
            dy, h, *own, False, ctx.eps, [False, True, True]
        )
        return dy, torch.stack([total, projected]).to(merged.dtype), None, None, None, None


def enter(x: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `Enter`."""
    return cast(tuple[torch.Tensor, torch.Tensor], Enter.apply(x, gate))


def join(
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    counts: Sequence[int],
    rows: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Apply `Join`."""
    return cast(torch.Tensor, Join.apply(weight, bias, eps, list(counts), *rows))


def leave(
    h: torch.Tensor,
    merged: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    gate: Gate,
) -> torch.Tensor:
    """Apply `Leave`; weight and bias get their gradients by `Join`."""
    own = [None if each is None else each.detach() for each in (weight, bias)]
    return cast(torch.Tensor, Leave.apply(h, merged, *own, eps, gate))
