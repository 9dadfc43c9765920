"""What of a training context is reduced over ranks, and compared before."""

from __future__ import annotations

import hashlib

import torch

from ..ranks.reduction import Reduction
from ..ranks.sharded import sharded_modules
from ..ranks.wrapped import Wrapper
from .context import TrainingContext


def trained_tensors(context: TrainingContext) -> list[torch.Tensor]:
    """Return the optimizer's tensors that require a gradient, in its order."""
    found = [p for group in context.optimizer.param_groups for p in group["params"] if p.requires_grad]
    return list({id(p): p for p in found}.values())


def reduction_of(context: TrainingContext, wrapper: Wrapper | None = None) -> Reduction:
    """Return the reduction of a context's gradients and buffers.

    Args:
        context: What is trained.
        wrapper: The model's DistributedDataParallel, which says whether buffers are those of the first rank.
    """
    keeps = wrapper is not None and not wrapper.broadcast_buffers
    buffers = {} if keeps else {id(each): each for each in context.model.buffers()}
    if context.runs_in_lanes:  # a rank without samples takes them, and on the others they are equal
        modules = (*context.norms.batch.values(), *context.norms.instance.values())
        buffers |= {id(each): each for module in modules for each in module.buffers()}
    if sharded_modules(context.model):  # FSDP2 reduces gradients itself
        return Reduction([], list(context.model.buffers()))
    return Reduction(trained_tensors(context), list(buffers.values()))


def describe_trained(context: TrainingContext) -> str:
    """Describe the reduced tensors: number, and digest of shapes and dtypes."""
    tensors = trained_tensors(context)
    shapes = repr([(tuple(p.shape), str(p.dtype)) for p in tensors])
    return f"{len(tensors)} {hashlib.sha256(shapes.encode()).hexdigest()[:16]}"
