"""Records a window on a CUDA device: the caching allocator's own history, in order, by phase and stream."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from .recording import FIRST, LATER, Phase, Recording, name_blocks

_MARKS = itertools.count()  # each recording marks its events with a number of its own: older ones may be in the ring
_EVENTS = {"alloc": 1, "free_completed": -1}  # a free is complete when no stream uses the block any more
_MOST_EVENTS = 10_000_000


def record(
    run: Callable[[Callable[[str], AbstractContextManager[Any]]], None],
    *,
    micro_batch: int,
    device: torch.device | None = None,
    clear_workspaces: bool = True,
) -> Recording:
    """Records what a run of `step.train_window` allocates.

    Where the user's own recording is on, its tail is read and nothing is changed.

    Args:
        run: Called with the `on_phase` to hand on.
        micro_batch: Samples in each micro-batch of the run.
        device: The CUDA device; left out, the current one.
        clear_workspaces: Whether to clear cuBLAS's workspaces first, so that they are in the log where they are made.

    Returns:
        The recording; what happens outside of phases is left out.
    """
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    started = time.perf_counter()
    phases: list[str] = []
    mark = f"autoaccum {next(_MARKS)}:"
    with _history(clear_workspaces):
        run(lambda name: _marked(name, mark, phases))
        torch.cuda.synchronize(index)
        trace = _trace(index)
    found = _cut(trace, mark, phases)
    passes = sum(phase.name in (FIRST, LATER) for phase in found)
    return Recording(micro_batch, found, passes, time.perf_counter() - started)


@contextlib.contextmanager
def _history(clear_workspaces: bool) -> Iterator[None]:
    """Switches the history on where it is off, without stack frames; and off again."""
    if torch._C._cuda_isHistoryEnabled():
        yield
        return
    if clear_workspaces:
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=_MOST_EVENTS)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(None)


def _trace(index: int) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = torch.cuda.memory._snapshot()["device_traces"][index]
    return traces


@contextlib.contextmanager
def _marked(name: str, mark: str, phases: list[str]) -> Iterator[None]:
    """Has the allocator write the phase's number beside each event; numbers, since names come again."""
    phases.append(name)
    before = torch.cuda.memory._get_memory_metadata()
    torch.cuda.memory._set_memory_metadata(f"{mark}{len(phases) - 1}")
    try:
        yield
    finally:
        torch.cuda.memory._set_memory_metadata(before)


def _cut(trace: list[dict[str, Any]], mark: str, names: list[str]) -> tuple[Phase, ...]:
    kept = [entry for entry in trace if entry["action"] in _EVENTS]
    events = name_blocks((e["addr"], _EVENTS[e["action"]] * e["size"], e["stream"]) for e in kept)
    phases: list[list[Any]] = [[] for _ in names]
    last = None
    for event, entry in zip(events, kept, strict=True):
        if entry["user_metadata"].startswith(mark):
            last = int(entry["user_metadata"].removeprefix(mark))
        if last is not None:  # marks are a thread's own, and backward has a thread of its own: it bears none
            phases[last].append(event)
    return tuple(Phase(name, tuple(found)) for name, found in zip(names, phases, strict=True))
