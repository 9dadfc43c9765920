"""Handle a model that DistributedDataParallel or FSDP2 spreads over ranks.

FSDP2 (`fully_shard`) gathers a block's parameters before its forward and frees them after it, except the root's, which
stay for the backward that usually follows. So whatever runs a forward without a backward has to put the root's shards
back, or its gathered parameters are held beside those of the next forward.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UsageError
from .torch_internals import gradient_divisors, has_begun

FSDP = "torch.distributed.fsdp"  # importing it takes a second, and whoever has such a model has imported it


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was applied to, outer ones first."""
    fsdp = sys.modules.get(FSDP)
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def roots_of(model: nn.Module) -> list[Any]:
    """Return the sharded modules that no other one contains."""
    sharded = sharded_modules(model)
    inner = {id(each) for module in sharded for each in module.modules() if each is not module}
    return [module for module in sharded if id(module) not in inner]


def reshard(model: nn.Module) -> None:
    """Free all gathered parameters, so that only shards are held."""
    for module in sharded_modules(model):
        module.reshard()


def settle_shards(model: nn.Module) -> None:
    """Let FSDP2 pad its shards before the first forward.

    It then replaces the storage of a shard that is smaller than the others, and a snapshot taken before would put the
    bytes of the old one back. A collective on each rank.
    """
    for module in sharded_modules(model):
        module.unshard()
        module.reshard()


def device_of(tensor: torch.Tensor) -> torch.device:
    """Return where a parameter is computed with.

    FSDP2 with a CPUOffloadPolicy keeps shards on the host, and gathers them on its mesh's device.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None or mesh.device_type == tensor.device.type or tensor.device.type != "cpu":
        return tensor.device
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def keeps_shards_on_host(model: nn.Module) -> bool:
    """Return whether shards lie on the host, as a CPUOffloadPolicy has them.

    FSDP2 moves all others to its mesh's device itself, and refuses a forward of these anywhere else.
    """
    return any(device_of(p).type != p.device.type for p in model.parameters())


def reduce_always(model: nn.Module) -> None:
    """Let each backward reduce gradients over all ranks, and end alike.

    A loop of one's own may have left `set_requires_gradient_sync(False)` behind: gradients would stay where they are.
    """
    for root in roots_of(model):
        root.set_requires_gradient_sync(True)
        root.set_requires_all_reduce(True)
        root.set_is_last_backward(True)
        root.set_reshard_after_backward(True)


def can_drop_unfinished(model: nn.Module) -> bool:
    """Return whether a forward or backward that failed can be dropped.

    FSDP2 has `reset_iter_state` from torch 2.14 on.
    """
    return all(hasattr(root, "reset_iter_state") for root in roots_of(model))


def drop_unfinished(model: nn.Module) -> None:
    """Drop a sharded model's gradients, also of a window that failed half-way.

    The first `zero_grad` drops what gathered parameters hold, which the reset keeps and would reduce with the next
    backward's; the second drops what was reduced into shards. In any other order gradients are 32 to 85 % wrong.
    """
    roots = roots_of(model)
    if not roots:
        return
    model.zero_grad(set_to_none=True)
    for root in roots:
        if hasattr(root, "reset_iter_state") and has_begun(root):
            root.reset_iter_state()
    reshard(model)
    model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Division:
    """What FSDP2 divides sums of gradients by.

    Attributes:
        factor: What most of the model's modules divide by; the loss is multiplied by it.
        others: The names of parameters whose module divides by something else, each with that over `factor`: what its
            gradient is multiplied by after the last backward.
    """

    factor: float
    others: tuple[tuple[str, float], ...] = ()


def division_of(model: nn.Module, ranks: int) -> Division:
    """Return what FSDP2 divides sums of gradients by.

    Raises:
        UsageError: The model is sharded in a way that isn't trained here.
    """
    for name, tensor in model.named_parameters():
        _require_sharded(name, tensor, ranks)
    factors: dict[str, float] = {}
    for module in sharded_modules(model):  # outer ones first: a parameter's own module has the last word
        found = {float(ranks) if each is None else each for each in gradient_divisors(module)}
        inside = {id(p) for p in module.parameters()}
        for factor in found:
            factors |= {name: factor for name, p in model.named_parameters() if id(p) in inside}
    counted = Counter(factors.values())
    factor = max(counted, key=lambda each: (counted[each], each))
    others = ((name, each / factor) for name, each in factors.items() if each != factor)
    return Division(factor, tuple(others))


def _require_sharded(name: str, tensor: torch.Tensor, ranks: int) -> None:
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", ())
    # Replicated over all dimensions but the last: fully_shard on a mesh of one dimension, or of two (HSDP).
    if mesh is None or mesh.size() != ranks or not all(each.is_replicate() for each in placements[:-1]):
        raise UsageError(
            f"{name} of the model isn't sharded by fully_shard over all {ranks} ranks.",
            "A window's gradient is a sum over all of them, of which each has one part.",
            "Apply fully_shard to the whole model, on a mesh of all ranks; without tensor parallelism.",
        )


@contextlib.contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Keep DistributedDataParallel from any collective of its own.

    Its backward reduces no gradients, and its forward broadcasts no buffers.
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
                stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
                module.require_forward_param_sync = False
        yield
