"""Find the module whose output rows depend on other samples.

Examples are batch statistics, in-batch negatives, a mean over the batch. Two forwards are compared, the second with
some samples exchanged: a module's outputs for the other samples must stay. The first module where they don't is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data import split as cutting
from ..data import tree
from ..state.rng import put_rng, take_rng
from ..workload import Batch
from .determinism import without_randomness

MAX_ROWS = 7  # rarely the length of another dimension
MOVED_RATIO = 1e-5  # of an output's largest value; the order of additions changes 1e-7


@dataclass
class _Trace:
    """Hold module inputs and outputs of the samples that stayed, by call."""

    rows: int
    stay: int
    calls: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=list)

    def kept(self, values: Any) -> list[torch.Tensor]:
        """Return the parts of all tensors that belong to these samples."""
        tensors = [leaf for _, leaf in tree.leaves(values) if isinstance(leaf, torch.Tensor)]
        found = [self._rows(tensor) for tensor in tensors if tensor.is_floating_point()]
        return [rows.detach().clone() for rows in found if rows is not None]

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor's rows of these samples, by shape; else None."""
        if tensor.dim() and len(tensor) and len(tensor) % self.rows == 0:
            return tensor[: self.stay * (len(tensor) // self.rows)]
        if tensor.dim() > 1 and tensor.shape[1] == self.rows:
            return tensor[:, : self.stay]
        return None


def coupling_module(
    model: nn.Module, forward: Callable[[Batch], object], batch: Batch, batch_keys: dict[str, Collection[str]]
) -> str | None:
    """Return the first module whose output moves when other samples are exchanged.

    Args:
        model: The model, in the mode in which it trains.
        forward: What calls it with a batch, each time from the same buffers.
        batch: At least 4 different samples.
        batch_keys: `shared` and `per_sample`, as `split` takes them.

    Returns:
        Its name and class, such as `features.1 (BatchNorm2d)`; None where none does.
    """
    samples = cutting.batch_size(batch, **batch_keys)
    if samples < 4:
        return None
    rows = min(MAX_ROWS, samples - 1)
    stay = rows // 2
    kept, others, spare = cutting.split(batch, [stay, rows - stay, samples - rows], **batch_keys)
    exchanged = cutting.tile(spare, rows - stay, **batch_keys)
    one, two = (cutting.join([kept, rest], **batch_keys) for rest in (others, exchanged))
    if one is None or two is None:
        return None
    start = take_rng()
    traces = []
    for joined in (one, two):
        put_rng(start)
        traces.append(_trace(model, forward, joined, rows, stay))
    return _first_moved(*traces)


def _trace(model: nn.Module, forward: Callable[[Batch], object], batch: Batch, rows: int, stay: int) -> _Trace:
    trace, handles, open_calls = _Trace(rows, stay), [], list[list[torch.Tensor]]()
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_before(trace, open_calls), with_kwargs=True))
        handles.append(module.register_forward_hook(_after(trace, open_calls, f"{name or 'the model'}", module)))
    try:
        with without_randomness():  # with gradients: a loss may take some itself
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _before(trace: _Trace, open_calls: list[list[torch.Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        open_calls.append(trace.kept((args, dict(kwargs))))

    return hook


def _after(trace: _Trace, open_calls: list[list[torch.Tensor]], name: str, module: nn.Module) -> Callable[..., None]:
    title = f"{name} ({type(module).__name__})"

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        trace.calls.append((title, open_calls.pop(), trace.kept(out)))

    return hook


def _first_moved(one: _Trace, two: _Trace) -> str | None:
    """Return the first module with equal inputs and unequal outputs.

    Calls are listed as they end, innermost first. If a module's input changed already, the module around it is the
    cause.
    """
    for (name, given, gave), (other, given_too, gave_too) in zip(one.calls, two.calls, strict=False):
        if name != other:
            return None  # the forward branches on the samples
        if _moved(gave, gave_too) and not _moved(given, given_too):
            return name
    return None


def _moved(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    pairs = zip(one, two, strict=False)
    return any(a.shape == b.shape and bool(((a - b).abs() > MOVED_RATIO * a.abs().max()).any()) for a, b in pairs)
