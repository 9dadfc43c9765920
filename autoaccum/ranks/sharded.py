"""Handle a model that DistributedDataParallel or FSDP2 spreads over ranks.

FSDP2 (`fully_shard`) gathers a block's parameters before its forward and frees them after it, except the root's, which
stay for the backward that usually follows. So whatever runs a forward without a backward has to put the root's shards
back, or its gathered parameters are held beside those of the next forward.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
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


def divisor_of(model: nn.Module, ranks: int) -> float:
    """Return what FSDP2 divides sums of gradients by.

    Raises:
        UsageError: Its modules differ, or the model is sharded in a way that isn't trained here.
    """
    for name, tensor in model.named_parameters():
        if not _is_sharded_over_all(tensor, ranks):
            raise UsageError(
                f"{name} of the model isn't sharded by fully_shard over all {ranks} ranks.",
                "A window's gradient is a sum over all of them, of which each has one part.",
                "Apply fully_shard to the whole model, on a mesh of all ranks; without tensor parallelism.",
            )
    found = {factor for module in sharded_modules(model) for factor in gradient_divisors(module)}
    if len(found) > 1:
        raise UsageError(
            f"set_gradient_divide_factor was called for some modules and not for others: {_shown(found)}.",
            "It sets one module's, and a loss has one factor.",
            "Call it for every module in model.modules() that fully_shard was applied to, or for none.",
        )
    factor = next(iter(found))
    return float(ranks) if factor is None else factor


def _is_sharded_over_all(tensor: torch.Tensor, ranks: int) -> bool:
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", ())
    return mesh is not None and mesh.size() == ranks and all(each.is_replicate() for each in placements[:-1])


def _shown(factors: set[float | None]) -> str:
    return ", ".join("the ranks" if each is None else f"{each:g}" for each in factors)


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
