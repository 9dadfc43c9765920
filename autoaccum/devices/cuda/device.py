"""A CUDA device as a device to plan for: how it is recorded, replayed and measured.

A device is a module with these names; `planning/fit.py` calls no others. A CUDA byte is a *reserved* byte: one that the
caching allocator took from the driver.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import UsageError
from ...phases import BUILD, OnPhase
from ...simulation.cuda_allocator.allocator import AllocatorState, CudaRules
from ...simulation.cuda_allocator.replay import replay_cuda
from ...simulation.malloc import HeapState, Replay
from ...simulation.recording import Event, Phase, Recording, live_peak
from ...simulation.solver import Split
from . import recorder
from .budget import read_cuda_budget as read_budget

__all__ = [
    "AGREES_WITHIN",
    "LIFTS_WITHIN",
    "MOST_SAMPLES",
    "PARTS",
    "SCOUT_STEPS",
    "Measured",
    "clean",
    "holes_filled",
    "limit_reserved",
    "measure",
    "model_blocks",
    "name",
    "prepare",
    "read_budget",
    "read_heap",
    "read_start",
    "record",
    "reserved_by",
    "rules",
    "run",
    "unrecorded_bytes",
]

name = "cuda"
AGREES_WITHIN = 0.0  # one micro-batch more or less is decided by a few MiB: the recordings nearest the answer count
LIFTS_WITHIN = None  # workspaces saturate, so the next recording may be far off, and tells where; verifying decides
PARTS = (0.5, 0.95)  # of the answer: where to record, once it is roughly known; the nearer, the less is extrapolated
SCOUT_STEPS = (
    2  # micro-batches of the very first window recorded: as many as others have, so that they can be laid side by side
)
MOST_SAMPLES = 3.0  # recording may take that many times the answer in samples


@dataclass(frozen=True)
class Measured:
    """What a real run took.

    Attributes:
        peak_bytes: The most that was reserved.
        allocated_bytes: The most that was handed out.
        retries: How often the cache was given back to make room, in each window.
        seconds: What the windows after the first took.
        recording: Of the first window; None where the user's own memory history kept too little of it.
        kept: Whether cuBLAS kept its workspaces.
    """

    peak_bytes: int
    allocated_bytes: int
    retries: tuple[int, ...]
    seconds: float
    recording: Recording | None = None
    kept: bool = False


def prepare(malloc: str = "fixed") -> int | None:
    """The C library's malloc has no say here."""
    return None


def holes_filled(threshold_bytes: int | None) -> contextlib.AbstractContextManager[int]:
    """The C library's heap has no say here."""
    return contextlib.nullcontext(0)


def record(run: Callable[[OnPhase], None], *, micro_batch: int) -> Recording:
    """Records what `run` allocates. What smaller sizes left in the cache, in pieces, shall not be in its way.

    cuBLAS's workspaces go first: they lie in the middle of large segments, which can't be given back until then.
    """
    if torch.backends.cudnn.benchmark:
        run(lambda name: contextlib.nullcontext())  # the first run at a new size tries large workspaces; later don't
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return recorder.record(run, micro_batch=micro_batch)


def clean() -> None:
    """Gives back to the driver all that can be given back: cached blocks, and cuBLAS's workspaces."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def rules(device_bytes: int | None = None) -> CudaRules:
    """The allocator as it is set in this process, with any amount of memory.

    Args:
        device_bytes: The device's memory; left out, the current one's.
    """
    total = device_bytes or torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    fraction = torch.cuda.get_per_process_memory_fraction()
    found = CudaRules.from_snapshot(allocator_settings(), device_bytes=total)
    return replace(found, allowed_bytes=int(fraction * total)) if fraction < 1.0 else found


def allocator_settings() -> dict[str, Any]:
    """The allocator's settings as it has them; as the environment does where this torch's snapshot has none."""
    found: dict[str, Any] | None = torch.cuda.memory._snapshot().get("allocator_settings")
    if found is not None:
        return found
    text = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return {"PYTORCH_CUDA_ALLOC_CONF": text}


def read_start(device: torch.device) -> AllocatorState:
    """What the allocator holds now."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return AllocatorState.from_snapshot(torch.cuda.memory_snapshot(), index)  # type: ignore[no-untyped-call]


def read_heap() -> None:
    """The C library's heap has no say here."""


def unrecorded_bytes(work: Callable[[OnPhase], None], recording: Recording, threshold_bytes: int | None) -> int:
    """Nothing: every block that the allocator hands out is in its history."""
    return 0


def run(
    phases: list[Phase], threshold_bytes: int | None, start: HeapState | None = None, unrecorded_bytes: int = 0
) -> Replay:
    """Replays phases from an empty allocator of any capacity."""
    found = replay_cuda(phases, rules())
    return Replay(found.peak_reserved_bytes, live_peak(phases), found.phases)


def reserved_by(blocks: tuple[Event, ...], settings: CudaRules) -> int:
    """What the allocator reserves for blocks that come one after the other."""
    return replay_cuda([Phase(BUILD, blocks)], replace(settings, capacity_bytes=None)).peak_reserved_bytes


def model_blocks(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[Event, ...]:
    """The blocks of a model in the order in which `model.cuda()` makes them, then those of its optimizer's state.

    torch.nn.Module._apply: children first, then a module's own parameters, then its buffers. A fresh process that
    builds its model otherwise (on the device at once, or loaded from a file) may order them otherwise.
    """
    tensors = list(_applied(model))
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
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            events.append(Event(len(events) + 1, storage.nbytes()))
    return tuple(events)


def _applied(module: torch.nn.Module) -> list[torch.Tensor]:
    inner = [tensor for child in module.children() for tensor in _applied(child)]
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return [*inner, *own, *(buffer for buffer in module._buffers.values() if buffer is not None)]


def measure(train: Callable[..., None], windows: Sequence[Split], device: torch.device) -> Measured:
    """Trains windows for real, records the first of them, and reads the allocator's own statistics.

    Args:
        train: Trains one window of a split; takes an `on_phase` too, as `step.train_window` does.
        windows: The splits, of windows to be trained one after the other. cuBLAS's workspaces are cleared before.
        device: The CUDA device.
    """
    retries = []
    if torch.backends.cudnn.benchmark:
        train(windows[0])  # what trying algorithms takes is given back when it is short: it decides nothing
        torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    recording: Recording | None = None
    started = 0.0
    for index, split in enumerate(windows):
        before = _retries(device)
        if index == 0:
            recording = _recorded(train, split, device)
            started = time.perf_counter()
        else:
            train(split)
        retries.append(_retries(device) - before)
    torch.cuda.synchronize(device)
    return Measured(
        peak_bytes=torch.cuda.max_memory_reserved(device),
        allocated_bytes=torch.cuda.max_memory_allocated(device),
        retries=tuple(retries),
        seconds=time.perf_counter() - started,
        recording=recording,
    )


def _recorded(train: Callable[..., None], split: Split, device: torch.device) -> Recording | None:
    """Trains a window and records it, nothing cleared from the cache before it."""
    trained = False

    def run(on_phase: OnPhase) -> None:
        nonlocal trained
        train(split, on_phase)
        trained = True

    try:
        return recorder.record(run, micro_batch=split[0], device=device)
    except UsageError:
        if not trained:
            raise
        return None


def _retries(device: torch.device) -> int:
    statistics: dict[str, Any] = torch.cuda.memory_stats(device)
    return int(statistics.get("num_alloc_retries", 0))


def limit_reserved(limit_bytes: int) -> None:
    """Has the caching allocator refuse what would bring it above so many reserved bytes, on the current device.

    The allocator compares with a whole number of bytes, rounded down from a part of the device's memory. The context,
    libraries and other processes aren't counted, nor are they in a plan's budget. A lower limit that is set already
    stays, and one above the device's memory is none.
    """
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    fraction = (limit_bytes + 0.25) / whole
    if fraction < torch.cuda.get_per_process_memory_fraction():
        torch.cuda.set_per_process_memory_fraction(fraction)
