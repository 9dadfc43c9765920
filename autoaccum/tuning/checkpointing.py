"""Checkpoint the activations of a model's repeated blocks, found by structure.

A block's activations are dropped after its forward, which runs again in backward (torch.utils.checkpoint,
non-reentrant, random states preserved). The gradient stays bitwise the same: `gradient_differs` tests that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..data import split as cutting
from ..torch_compat import NormBase
from ..window import loss_terms
from ..window.blocks import find_blocks
from ..window.context import forward, open_context
from ..window.isolated import as_it_trains
from ..workload import Workload

Undo = Callable[[], None]


@contextlib.contextmanager
def checkpointed(model: nn.Module, every: int) -> Iterator[None]:
    """Checkpoint every n-th block until exit."""
    undo = checkpoint_blocks(model, every)
    try:
        yield
    finally:
        undo()


def checkpoint_blocks(model: nn.Module, every: int) -> Undo:
    """Checkpoint every n-th block; return a function that undoes it."""
    blocks = find_blocks(model) if every else None
    if blocks is None:
        return lambda: None
    undone = [_wrap(block) for block in blocks.modules[::every]]
    undone.append(_drop_cache(model))

    def undo() -> None:
        for each in undone:
            each()

    return undo


def _wrap(block: nn.Module) -> Undo:
    own = block.__dict__.get("forward")  # another library's wrapper; None for the class's forward
    object.__setattr__(block, "forward", _Checkpointed(block, own))

    def undo() -> None:
        if own is None:
            object.__delattr__(block, "forward")
        else:
            object.__setattr__(block, "forward", own)

    return undo


def _drop_cache(model: nn.Module) -> Undo:
    """Disable a Hugging Face decoder's key cache, which would fill twice."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not before:
        return lambda: None
    config.use_cache = False
    return functools.partial(setattr, config, "use_cache", before)


class _Checkpointed:
    """Run a block's forward under checkpointing.

    An object that holds its block, so that a deep copy of the model calls the copied block.
    """

    def __init__(self, block: nn.Module, own: Callable[..., Any] | None) -> None:
        self.block, self.own = block, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.own or type(self.block).forward.__get__(self.block)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return contextlib.nullcontext(), _keeping_running_statistics(self.block)


@contextlib.contextmanager
def _keeping_running_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the second forward from updating running statistics again."""
    buffers = [
        buffer for module in block.modules() if isinstance(module, NormBase) for buffer in module.buffers(recurse=False)
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def gradient_differs(workload: Workload, every: int, samples: int = 4) -> str | None:
    """Find a gradient or buffer that checkpointing changes on the sample.

    Compares bit for bit, with the same random draws; restores the model.

    Args:
        workload: What is trained.
        every: Every n-th block is checkpointed.
        samples: Number of samples.

    Returns:
        The first difference, as a phrase; None if there is none.
    """
    plain = _trained_once(workload, samples)
    with checkpointed(workload.model, every):
        other = _trained_once(workload, samples)
    return next((f"{name} differs" for name, value in plain.items() if not same_bits(value, other[name])), None)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether tensors are equal, NaN matching NaN."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _trained_once(workload: Workload, samples: int) -> dict[str, torch.Tensor]:
    """Return gradients, and buffers after the forward, by name."""
    model = workload.model
    batch = cutting.tile(workload.sample, samples, shared=workload.shared, per_sample=workload.per_sample)
    context = open_context(replace(workload, scheduler=None))
    with as_it_trains(model, context.held):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        loss: torch.Tensor = loss_terms.whole(forward(context, batch))
        loss.backward()  # type: ignore[no-untyped-call]
        found = {f"the gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"the buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
        model.zero_grad(set_to_none=True)
    return found
