"""Normalize a window's micro-batches together, as one batch.

On a CPU all that lanes save stays in memory until the window has gone back. There one node that takes the inputs of all
lanes is cheaper than two nodes for each of them (joint_norm.py): torch's own kernel runs once, forward and back, on
what one batch would have at this layer, and gives one batch's bits. Where somebody's hooks see what a lane saves (the
host store's, a checkpoint's), each lane saves its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .joint_norm import Gate
from .torch_internals import modes_off

Call = Any  # an interception.NormCall
native_backward = torch.ops.aten.native_batch_norm_backward


class Whole(torch.autograd.Function):
    """Normalize the inputs of all lanes."""

    @staticmethod
    def forward(ctx: Any, weight: Any, bias: Any, call: Call, gate: Gate, *inputs: torch.Tensor) -> Any:
        """Return each lane's output; update running statistics."""
        x = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
        running = call.running_mean, call.running_var
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, *running, True, call.momentum, call.eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.sizes, ctx.eps, ctx.gate = [len(each) for each in inputs], call.eps, gate
        ctx.set_materialize_grads(False)
        # `data`: lanes write into their outputs (nn.ReLU(inplace=True)), and each counts only its own writes
        return tuple(each.data for each in y.split_with_sizes(ctx.sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Return the gradients of weight, bias and inputs."""
        ctx.gate.pass_through()
        x, weight, mean, inverse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if all(each is None for each in gradients):
            return (None,) * len(needs)
        needed = [any(needs[4:]), needs[0], needs[1]]
        with modes_off():
            if any(each is None for each in gradients):
                parts = zip(gradients, x.split_with_sizes(ctx.sizes), strict=True)
                gradients = tuple(torch.zeros_like(own) if each is None else each for each, own in parts)
            dy = torch.cat(gradients)  # type: ignore[arg-type]
            found = native_backward(dy, x, weight, None, None, mean, inverse, True, ctx.eps, needed)
            dx, *own = (each if need else None for each, need in zip(found, needed, strict=True))
            return (*own, None, None, *([None] * len(ctx.sizes) if dx is None else dx.split_with_sizes(ctx.sizes)))


def fits(inputs: Sequence[torch.Tensor]) -> bool:
    """Return whether lanes' inputs make one batch."""
    return len({each.shape[1:] for each in inputs}) == 1


def normalize(inputs: Sequence[torch.Tensor], call: Call, gate: Gate) -> list[torch.Tensor]:
    """Normalize the inputs of all lanes by the statistics of all.

    Args:
        inputs: Each lane's.
        call: The normalization.
        gate: Whether the backward may run.
    """
    return list(Whole.apply(call.weight, call.bias, call, gate, *inputs))
