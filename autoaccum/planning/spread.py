"""Spread a workload's model over ranks that are not here.

The model lies on a virtual GPU, where it takes none of this machine's memory however large it is. FSDP2 then replaces
its parameters by one rank's shards, on torch's fake process group. What a real rank allocates for its model are these
shards, in the order of `model.to_empty(device="cuda")` (a model built on the meta device) or `model.cuda()`.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..devices.cuda.device import CudaDevice
from ..devices.cuda.model_blocks import model_blocks
from ..errors import UsageError
from ..ranks.group import are_absent
from ..ranks.sharded import sharded_modules
from ..ranks.torch_internals import open_fake_group
from ..simulation.recording import Event
from ..window.blocks import repeated_blocks
from ..workload import Workload
from .cluster import DDP, Cluster


@dataclass(frozen=True)
class Spread:
    """A workload on one rank of a cluster.

    Attributes:
        workload: The workload, its model sharded or wrapped.
        build: The allocations of its model as a new process makes them.
        note: How it was spread, for the plan's notes.
    """

    workload: Workload
    build: tuple[Event, ...]
    note: str


def spread(workload: Workload, device: CudaDevice, build: tuple[Event, ...], cluster: Cluster) -> Spread:
    """Spread a model over a cluster, unless its function did.

    Args:
        workload: The workload; its model is on the device.
        device: The device.
        build: The allocations of the model as it is.
        cluster: The cluster.

    Raises:
        UsageError: The function made a group of another size, or nothing says how to spread the model.
    """
    is_spread = bool(sharded_modules(workload.model)) or isinstance(workload.model, nn.parallel.DistributedDataParallel)
    _open_group(cluster, needed=not is_spread)
    if is_spread:
        return Spread(workload, build, "The workload's function spread the model over ranks itself.")
    if cluster.parallel == DDP:
        return _wrapped(workload, device)
    return _sharded(workload, device)


def _open_group(cluster: Cluster, *, needed: bool) -> None:
    """Open a fake group, or check the one there is."""
    if torch.distributed.is_initialized():
        found = torch.distributed.get_world_size()
        if found != cluster.ranks or not are_absent():
            raise UsageError(
                f"The workload's function initialized a {torch.distributed.get_backend()} process group of {found} "
                f"ranks, and the plan is for {cluster.ranks} GPUs.",
                "The model is planned on a fake group of as many ranks.",
                "Leave the group out of the function, or initialize one of backend 'fake' with that many ranks.",
            )
    else:
        open_fake_group(0, cluster.ranks)
    if needed and cluster.parallel is None:
        raise UsageError(
            f"The workload's model is a bare one, and the plan is for {cluster.ranks} GPUs.",
            "Its memory depends on whether it is sharded over them.",
            "Add --parallel fsdp or --parallel ddp, or spread the model in the workload's function.",
        )


def _wrapped(workload: Workload, device: CudaDevice) -> Spread:
    """Wrap a model by DistributedDataParallel, whose buckets take memory."""
    own = model_blocks(workload.model)
    parameters = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    sync: dict[str, Any] = (
        {"init_sync": False} if "init_sync" in parameters else {}
    )  # its check waits for real ranks; 2.6 has none
    wrapped, buckets = device.record_build(lambda: nn.parallel.DistributedDataParallel(workload.model, **sync))
    shifted = [event._replace(block=_shift(event.block, len(own))) for event in buckets]
    note = "The model is wrapped by DistributedDataParallel, whose buckets take as much as its gradients."
    return Spread(replace(workload, model=wrapped), (*own, *shifted), note)


def _shift(block: int, by: int) -> int:
    return block + by if block > 0 else block - by


def _sharded(workload: Workload, device: CudaDevice) -> Spread:
    """Shard each repeated block of a model, then the rest, by FSDP2."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, half = workload.model, workload.precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    before = dict(model.named_parameters())
    blocks = repeated_blocks(model)
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="meta")
    names_of = {id(parameter): name for name, parameter in before.items()}
    before.clear()
    gc.collect()
    device.release_cache()  # the whole tensors, and gaps between shards, are there for planning alone
    optimizer = _over_shards(workload.optimizer, names_of, model)
    _, events = device.record_build(lambda: model.to_empty(device=device.torch_device))
    build = tuple(event for event in events if event.block > 0)  # without frees of the first shards
    gc.collect()
    device.release_cache()
    names = {type(block).__name__.removeprefix("FSDP") for block in blocks}
    units = f"each of {len(blocks)} {' and '.join(sorted(names))}" if blocks else "no block, as none repeats"
    note = f"FSDP2 shards {units}, then the rest: fully_shard(block), fully_shard(model)" + (
        ", with MixedPrecisionPolicy(torch.bfloat16, torch.float32) in place of autocast." if half else "."
    )
    precision = None if half else workload.precision
    return Spread(replace(workload, optimizer=optimizer, precision=precision), build, note)


def _over_shards(
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None,
    names_of: dict[int, str],
    model: nn.Module,
) -> torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None:
    """Return an optimizer over a model's shards in place of its parameters.

    Raises:
        UsageError: There is no way to make another one like it.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    shards = dict(model.named_parameters())
    groups = [
        group | {"params": [shards[names_of[id(p)]] if id(p) in names_of else p for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    try:
        made = type(optimizer)(groups)  # type: ignore[call-arg]  # each group has all of its settings
    except Exception as error:
        raise UsageError(
            f"The workload's {type(optimizer).__name__} can't be made anew for sharded parameters ({error}).",
            "fully_shard replaces the parameters that it was made for.",
            "Give a function of the parameters: Workload(optimizer=lambda p: torch.optim.AdamW(p)).",
        ) from error
    optimizer.param_groups.clear()  # it would keep the whole parameters on the device
    optimizer.state.clear()
    return made
