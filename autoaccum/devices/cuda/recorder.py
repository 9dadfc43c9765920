"""Record a window on a CUDA device.

From the caching allocator's own history, in order, by phase and stream.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from ...errors import UsageError
from ...phases import FIRST, LATER
from ...simulation.cuda_allocator.snapshot import AllocatorState
from ...simulation.recording import Event, Phase, Recording, name_blocks
from ...torch_compat import (
    Entry,
    clear_cublas_workspaces,
    history_metadata,
    is_history_on,
    read_history,
    start_history,
    stop_history,
)
from .workspaces import WORKSPACES

T = TypeVar("T")

_MARKS = itertools.count()  # each recording marks its events with a number of its own: older ones may be in the ring
_MOST_EVENTS = 10_000_000
_START = "start"


def record(
    run: Callable[[Callable[[str], AbstractContextManager[Any]]], None],
    *,
    micro_batch: int,
    device: torch.device | None = None,
) -> Recording:
    """Record what a run of `step.train_window` allocates.

    Where the user's own recording is on, its tail is read and nothing of it is changed. cuBLAS's workspaces are cleared
    first, so that what the run needs of them is in the recording.

    Args:
        run: Called with the `on_phase` to hand on.
        micro_batch: Samples in each micro-batch of the run.
        device: The CUDA device; left out, the current one.

    Returns:
        The recording, with what the allocator held when it began; what happens outside of phases counts to the one
        before, or to the first. A block that was there before is named by its address, negative. An event of no bytes
        says that a block was given back while another stream still used it; its free follows.

    Raises:
        UsageError: Where the user's own recording keeps too few events, or not all kinds of them.
    """
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    started = time.perf_counter()
    phases: list[str] = []
    mark = f"autoaccum {next(_MARKS)}:"
    torch.cuda.init()  # type: ignore[no-untyped-call]
    clear_cublas_workspaces()
    with _history():
        with history_metadata(mark + _START):
            start = _start(index)
        before = _allocations(index)
        run(lambda name: _marked(name, mark, phases))
        torch.cuda.synchronize(index)
        made = _allocations(index) - before
        trace = _since(mark, read_history(index), made)
    found, workspaces = _cut(trace, mark, phases)
    passes = sum(phase.name in (FIRST, LATER) for phase in found)
    return Recording(micro_batch, found, passes, time.perf_counter() - started, start, workspaces)


def record_build(make: Callable[[], T], index: int) -> tuple[T, tuple[Event, ...]]:
    """Call a function with the history on.

    Args:
        make: Builds a model on the device.
        index: The device's number.

    Returns:
        Its result, and the blocks that were handed out and taken back meanwhile, in order.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    start_history()
    try:
        made = make()
        torch.cuda.synchronize(index)
        trace = read_history(index)
    finally:
        stop_history()
    signs = {"alloc": 1, "free_completed": -1}
    kept = [entry for entry in trace if entry["action"] in signs]
    return made, tuple(name_blocks((e["addr"], signs[e["action"]] * e["size"], e["stream"]) for e in kept))


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Record the history while this is entered, if it is off.

    Without stack frames.
    """
    if is_history_on():
        yield
        return
    start_history(_MOST_EVENTS)
    try:
        yield
    finally:
        stop_history()


@contextlib.contextmanager
def _marked(name: str, mark: str, phases: list[str]) -> Iterator[None]:
    """Mark events with a phase's number.

    Not with its name, since names are repeated.
    """
    phases.append(name)
    with history_metadata(f"{mark}{len(phases) - 1}"):
        yield


def _start(index: int) -> AllocatorState:
    """Read what the allocator holds; reading leaves an entry in the history."""
    return AllocatorState.from_snapshot(torch.cuda.memory_snapshot(), index)  # type: ignore[no-untyped-call]


def _allocations(index: int) -> int:
    """Return how many blocks were ever handed out."""
    count: int = torch.cuda.memory_stats(index).get("allocation.all.allocated", 0)
    return count


def _since(mark: str, trace: list[Entry], made: int) -> list[Entry]:
    """Return all entries since the recording began.

    Args:
        mark: The recording's.
        trace: The ring of events, oldest first.
        made: How many allocations it has to hold.
    """
    first = next((i for i, entry in enumerate(trace) if entry["user_metadata"] == mark + _START), len(trace))
    kept = sum(entry["action"] == "alloc" for entry in trace[first:])
    if kept != made or first == len(trace):
        raise UsageError(
            f"The memory history that is being recorded already kept {kept} of {made} allocations.",
            f"It holds {len(trace)} events, or leaves some kinds of them out.",
            "Start it with torch.cuda.memory._record_memory_history(max_entries=1_000_000), or not at all.",
        )
    return trace[first:]


def _cut(trace: list[Entry], mark: str, names: list[str]) -> tuple[tuple[Phase, ...], frozenset[int]]:
    """Return the phases, and which blocks are cuBLAS's workspaces."""
    kept = _allocations_and_frees(trace) if names else []
    events = name_blocks((entry["addr"], size, entry["stream"]) for entry, size in kept)
    phases: list[list[Event]] = [[] for _ in names]
    workspaces = set()
    last = 0  # marks are a thread's own, and backward has a thread of its own: it bears none
    for event, (entry, _) in zip(events, kept, strict=True):
        number = entry["user_metadata"].removeprefix(mark)
        if number != entry["user_metadata"] and number != _START:
            last = int(number)
        if entry["user_metadata"] == WORKSPACES:
            workspaces.add(event.block)
        phases[last].append(event if event.block > 0 else event._replace(block=-entry["addr"]))
    cut = tuple(Phase(name, tuple(found)) for name, found in zip(names, phases, strict=True))
    return cut, frozenset(workspaces)


def _allocations_and_frees(trace: list[Entry]) -> list[tuple[Entry, int]]:
    """Return the allocations and frees, each with its bytes.

    > 0 where a block is handed out, < 0 where it is free again.

    A free is complete when no stream uses the block any more. Where something happens between the request and that, the
    request counts for itself, with no bytes.
    """
    wanted = [entry for entry in trace if entry["action"] in ("alloc", "free_requested", "free_completed")]
    kept = []
    for entry, following in itertools.zip_longest(wanted, wanted[1:]):
        if entry["action"] == "free_requested":
            if following is None or following["action"] != "free_completed" or following["addr"] != entry["addr"]:
                kept.append((entry, 0))
        else:
            kept.append((entry, entry["size"] if entry["action"] == "alloc" else -entry["size"]))
    return kept
