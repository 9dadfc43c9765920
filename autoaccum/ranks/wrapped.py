"""Take a model out of DistributedDataParallel, and keep that from reducing.

A window's micro-batches run without any collective, so that one rank may start its window over alone. Gradients are
reduced once, when all ranks have said that they have theirs (reduction.py). So the module inside is trained, and the
wrapper, which a loss may still call, is kept from reducing and from broadcasting buffers meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..state.closures import holdings
from ..torch_compat import communication_hooks, reset_reducer, uses_mixed_precision
from ..workload import Workload
from .group import are_absent, refuse_absent
from .sharded import division_of, sharded_modules
from .synchronized import alone, customized

DDP, BARE, SINGLE, FSDP = "ddp", "bare", "single", "fsdp"

Wrapper = nn.parallel.DistributedDataParallel

# Recognized by name: importing the sharded ones takes a second, and whoever has one has imported it.
_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "DDP": "DistributedDataParallel (replicate)",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully sharded (FSDP2's fully_shard)",
}
_SHARDED = (
    "Its forward and backward are collectives, so a rank with another number of micro-batches, or one that runs out "
    "of memory, leaves the others waiting."
)


def unwrapped(workload: Workload) -> tuple[Workload, Wrapper | None]:
    """Return a workload of the module inside, and its DistributedDataParallel.

    Raises:
        UsageError: The wrapper does something that a reduction once a window would leave out.
    """
    wrapper = workload.model
    if not isinstance(wrapper, Wrapper):
        return workload, None
    for wrong, what, hint in (
        (
            getattr(wrapper, "static_graph", False),
            "has static_graph=True, which can't be trained in windows",
            "Leave it out: DistributedDataParallel(model). Nothing is lost, as gradients are reduced once a window.",
        ),
        (
            uses_mixed_precision(wrapper),
            "casts parameters itself (mixed_precision=)",
            "Leave it out, and give the Workload precision='bf16'.",
        ),
        (
            communication_hooks(wrapper),
            "has a communication hook (register_comm_hook)",
            "Leave it out: gradients are summed exactly, once a window.",
        ),
        (
            getattr(wrapper, "parameters_to_ignore", None),
            "leaves some parameters and buffers to each rank",
            "Take these out of the optimizer of the Workload's model, and train them beside it.",
        ),
    ):
        if wrong:
            raise UsageError(
                f"The model's DistributedDataParallel {what}.",
                "A window's gradients are reduced by autoaccum, once, and not by the wrapper's backward.",
                hint,
            )
    return replace(workload, model=wrapper.module), wrapper


@contextlib.contextmanager
def quiet(wrapper: Wrapper | None, model: nn.Module) -> Iterator[None]:
    """Keep a model and its wrapper from collectives while it is entered.

    The wrapper's forward broadcasts buffers where `require_forward_param_sync` is set, and its backward reduces, also
    after a forward before this that no backward followed.

    Args:
        wrapper: The DistributedDataParallel, if there is one.
        model: The model inside.
    """
    if wrapper is None:
        with alone(model):
            yield
        return
    forward = wrapper.require_forward_param_sync
    reset_reducer(wrapper)
    wrapper.require_forward_param_sync = False
    try:
        with alone(model), wrapper.no_sync():
            yield
    finally:
        wrapper.require_forward_param_sync = forward


def refuse_unsupported(workload: Workload, ranks: int) -> None:
    """Refuse modules whose forward or backward talks to other ranks.

    Args:
        workload: What is trained; its model and the modules that its loss holds are looked through, inner ones too.
        ranks: Number of ranks.

    Raises:
        UsageError: Names what it is, and says what to do.
    """
    refuse_absent()
    if are_absent():
        return
    if is_trained_sharded(workload.model):
        division_of(workload.model, torch.distributed.get_world_size())
    else:
        _refuse_wrapped(workload.model, "the model", inside=())
    own = tuple(workload.model.modules())
    for name, module in holdings(workload.model, loss=workload.loss, encode=workload.encode).modules.items():
        _refuse_wrapped(module, f"the loss's module {name!r}", inside=own)
    if ranks == 1:
        return
    _refuse_over_ranks(workload, ranks)


def is_trained_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards a model over several real ranks."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not there or torch.distributed.get_world_size() == 1 or torch.distributed.get_backend() == "fake":
        return False
    return bool(sharded_modules(model))


def _in_lanes(workload: Workload, ranks: int) -> list[tuple[object, str, str, str]]:
    """Return what is refused over ranks where micro-batches run in lanes."""
    if not meets(workload):
        return []
    how = f"{'batchnorm' if workload.batchnorm else 'batch_interactions'}='exact'"
    custom = customized(workload.model)
    return [
        (
            sharded_modules(workload.model),
            f"{how}, on {ranks} ranks of a sharded model.",
            "Forward and backward are collectives there, and lanes would run them in another order on each rank.",
            "Use batchnorm='frozen', which is exact, DistributedDataParallel, or one rank.",
        ),
        (
            workload.encode is not None,
            f"{how} and encode=, on {ranks} ranks.",
            "Representations of all ranks meet after those of a rank's micro-batches, and statistics before.",
            "Leave out encode=, and let the loss take autoaccum.gather_window(representations).",
        ),
        (
            custom,
            f"{custom} of the model is a SyncBatchNorm with a forward of its own, on {ranks} ranks.",
            "It would talk to other ranks in each forward, where lanes meet by themselves.",
            "Use torch.nn.SyncBatchNorm or BatchNorm: the statistics are those of all ranks with either.",
        ),
    ]


def meets(workload: Workload) -> bool:
    """Return whether a workload's micro-batches run in lanes."""
    return "exact" in (workload.batchnorm, workload.batch_interactions)


def _with_shards(workload: Workload, ranks: int) -> list[tuple[object, str, str, str]]:
    """Return what is refused over ranks of a sharded model only."""
    if not sharded_modules(workload.model):
        return []
    return [
        (
            workload.encode is not None,
            f"encode= was given, on {ranks} ranks of a sharded model.",
            "Representations meet between the passes over the micro-batches, which are collectives here.",
            "Use DistributedDataParallel, or train on one rank.",
        ),
        (
            workload.batchnorm == "merged",
            f"batchnorm='merged', on {ranks} ranks of a sharded model.",
            "A rank with fewer micro-batches than others repeats one, whose statistics would count twice.",
            "Use batchnorm='frozen', which is exact, or 'per_micro_batch': the first rank's statistics are kept.",
        ),
    ]


def _refuse_over_ranks(workload: Workload, ranks: int) -> None:
    synced = [name for name, module in workload.model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    optimizer = workload.optimizer
    for wrong, what, why, hint in (
        (
            synced and not meets(workload),
            f"{', '.join(synced[:3])} of the model takes its statistics over {ranks} ranks (SyncBatchNorm).",
            "It waits for all ranks in each forward, so one with another number of micro-batches, or one that starts "
            "over after an out-of-memory, leaves the others waiting.",
            "Use batchnorm='exact': statistics are those of the whole window of all ranks. Or BatchNorm: with 'merged' "
            "running statistics are those of all ranks and micro-batches, with 'frozen' the gradient is exact.",
        ),
        *_in_lanes(workload, ranks),
        *_with_shards(workload, ranks),
        (
            type(optimizer).__name__ == "ZeroRedundancyOptimizer",
            "The optimizer is a ZeroRedundancyOptimizer, whose step is a collective.",
            _SHARDED,
            "Use the optimizer that it wraps: torch.optim.AdamW(model.parameters()).",
        ),
    ):
        if wrong:
            raise UsageError(what, why, hint)


def _refuse_wrapped(root: nn.Module, what: str, inside: tuple[nn.Module, ...]) -> None:
    for name, module in root.named_modules():
        wrapper = _wrapper(module)
        if wrapper is None or (isinstance(module, Wrapper) and any(module.module is each for each in inside)):
            continue
        where = f"T{what[1:]}{f', in its module {name!r},' if name else ''}"
        if wrapper.startswith("DistributedDataParallel"):
            raise UsageError(
                f"{where} is {wrapper}.",
                "It reduces gradients over ranks in each backward. Only a whole model can be taken out of it.",
                "Give the Workload the model as it is, or wrapped whole: DistributedDataParallel(model).",
            )
        raise UsageError(
            f"{where} is {wrapper}.", _SHARDED, "Use DistributedDataParallel, or give the model as it was: bare."
        )
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if type(tensor).__name__ == "DTensor":
            raise UsageError(
                f"{name} of {what} is a DTensor, one rank's part of a tensor.",
                "Its forward talks to other ranks, and only some of its bytes are here. " + _SHARDED,
                "Give a model of plain tensors that one device holds: as it was before parallelize_module, "
                "distribute_module or fully_shard.",
            )


def _wrapper(module: nn.Module) -> str | None:
    """Return what makes a module communicate with ranks, or None."""
    of_torch = (cls for cls in type(module).__mro__ if cls.__module__.startswith("torch."))
    return next((_WRAPPERS[cls.__name__] for cls in of_torch if cls.__name__ in _WRAPPERS), None)


def parallel_of(wrapper: Wrapper | None, ranks: int) -> str:
    """Return how a model is trained over ranks: "ddp", "bare" or "single"."""
    return SINGLE if ranks == 1 else BARE if wrapper is None else DDP


def broadcast(tensors: list[torch.Tensor]) -> None:
    """Give every rank the first rank's values."""
    with torch.no_grad():
        works: list[Any] = [torch.distributed.broadcast(tensor, 0, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
