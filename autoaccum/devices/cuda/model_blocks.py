"""List a model's blocks and what is reserved for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...phases import BUILD
from ...simulation.cuda_allocator.allocator import CudaRules
from ...simulation.cuda_allocator.replay import replay_cuda
from ...simulation.recording import Event, Phase
from ...torch_compat import local_tensors


def model_blocks(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[Event, ...]:
    """List a model's blocks in the order of `model.cuda()`.

    Then those of its optimizer's state. Of a tensor that is sharded over ranks, the part that is here.

    torch.nn.Module._apply: children first, then a module's own parameters, then its buffers. A process that builds its
    model otherwise (directly on the device, or loaded from a file) may order them otherwise.
    """
    tensors = list(_in_order(model))
    if optimizer is not None:
        tensors += [
            value
            for group in optimizer.param_groups
            for parameter in group["params"]
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, torch.Tensor)
        ]
    seen: set[int] = set()
    events: list[Event] = []
    for tensor in (local for each in tensors for local in local_tensors(each)):
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            events.append(Event(len(events) + 1, storage.nbytes()))
    return tuple(events)


def _in_order(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for child in module.children():
        yield from _in_order(child)
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def reserved_bytes_of(blocks: tuple[Event, ...], rules: CudaRules) -> int:
    """Return what is reserved for blocks allocated one after another."""
    return replay_cuda([Phase(BUILD, blocks)], rules.with_capacity(None)).peak_reserved_bytes
