"""Refuse training over several ranks: a window has one process.

And one device.

Two faults would come without a word. A `(sum, count)` loss divided by one rank's count gives another gradient than one
batch wherever counts differ. And collectives pair up by their order: a rank whose window has more micro-batches, after
an out-of-memory say, adds up gradients of different windows, and in the end waits for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

from ..errors import UsageError
from ..state.closures import holdings
from ..workload import Workload

# Recognized by name: importing the sharded ones takes a second, and whoever has one has imported it.
_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "DDP": "DistributedDataParallel (replicate)",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully sharded (FSDP2's fully_shard)",
}
_apart: ContextVar[bool] = ContextVar("apart", default=False)
_absent_allowed: ContextVar[bool] = ContextVar("absent_allowed", default=False)
_WHY = (
    "A window would be one of this rank alone: what the loss counts isn't summed over ranks, so that the gradient is "
    "off where counts differ, and a rank with another number of micro-batches leaves the others waiting."
)


def refuse_ranks(workload: Workload) -> None:
    """Refuse a process group of several ranks, and modules that use one.

    Args:
        workload: What is trained; its model and the modules that its loss holds are looked through, inner ones too.

    Raises:
        UsageError: Names what it is, and says what to do.
    """
    if are_absent():
        if not _absent_allowed.get():
            raise _absent()
        return
    ranks = ranks_here()
    if ranks > 1:
        raise UsageError(
            f"This process is one of a process group of {ranks} ranks, and autoaccum trains in one process.",
            _WHY,
            "Start one process on one device: python train.py, or torchrun --nproc-per-node 1, with the model as it "
            "was before it was wrapped.",
        )
    _refuse_wrapped(workload.model, "the model")
    for name, module in holdings(workload.model, loss=workload.loss, encode=workload.encode).modules.items():
        _refuse_wrapped(module, f"the loss's module {name!r}")


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Count this rank alone, while a trainer handles its ranks itself.

    What runs meanwhile must have no collectives: other ranks may run something else, or wait.
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def are_absent() -> bool:
    """Return whether the other ranks aren't here: torch's fake process group."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_backend() == "fake" and not _apart.get()


@contextlib.contextmanager
def absent_allowed() -> Iterator[None]:
    """Accept a fake process group while this is entered."""
    token = _absent_allowed.set(True)
    try:
        yield
    finally:
        _absent_allowed.reset(token)


def _absent() -> UsageError:
    return UsageError(
        f"This process group of {torch.distributed.get_world_size()} ranks is a fake one, on which nothing can be "
        "trained.",
        "Its collectives wait for nobody and sum nothing; it serves to plan for ranks that are not here.",
        "Plan on it (fit_plan, or autoaccum plan --gpu NAME), and train on a group of real ranks: nccl or gloo.",
    )


def ranks_here() -> int:
    """Return the ranks of this process's group; 1 without one, or `apart`."""
    if _apart.get():
        return 1
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _refuse_wrapped(root: nn.Module, what: str) -> None:
    for name, module in root.named_modules():
        wrapper = _wrapper(module)
        if wrapper is None:
            continue
        inside = "model.module" if hasattr(module, "module") else "it as it was before it was wrapped"
        raise UsageError(
            f"T{what[1:]}{f', in its module {name!r},' if name else ''} is {wrapper}.",
            "It reduces gradients over ranks in each backward, also where there is one rank. " + _WHY,
            f"Give the Workload the module inside: {inside}; and train in one process on one device.",
        )
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if type(tensor).__name__ == "DTensor":
            raise UsageError(
                f"{name} of {what} is a DTensor, one rank's part of a tensor.",
                "Its forward talks to other ranks, and only some of its bytes are here. " + _WHY,
                "Give a model of plain tensors that one device holds: as it was before parallelize_module, "
                "distribute_module or fully_shard.",
            )


def _wrapper(module: nn.Module) -> str | None:
    """Return what makes a module communicate with ranks, or None."""
    of_torch = (cls for cls in type(module).__mro__ if cls.__module__.startswith("torch."))
    return next((_WRAPPERS[cls.__name__] for cls in of_torch if cls.__name__ in _WRAPPERS), None)
