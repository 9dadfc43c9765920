"""Record a window on a CUDA device.

From the caching allocator's own history, in order, by phase and stream.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from ...errors import UsageError
from ...phases import FIRST, LATER
from ...simulation.recording import Event, Phase, Recording, name_blocks
from ...torch_compat import (
    Entry,
    clear_cublas_workspaces,
    is_history_on,
    read_history,
    start_history,
    stop_history,
)
from .allocator_rules import read_state
from .positions import find_positions, read_position
from .workspaces import Span, watch_releases

T = TypeVar("T")

_MOST_EVENTS = 10_000_000
Begun = tuple[str, int]  # a phase's name, and the position in the history where it begins


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
    phases: list[Begun] = []
    torch.cuda.init()  # type: ignore[no-untyped-call]
    clear_cublas_workspaces()
    is_own = not is_history_on()
    with _history(), watch_releases(index) as releases:
        start = read_state(index)
        before, begin = _allocations(index), read_position(index)
        run(lambda name: _marked(name, phases, index))
        torch.cuda.synchronize(index)
        made, end = _allocations(index) - before, read_position(index)
        trace = read_history(index)
    places = find_positions(trace, end, (begin, *(position for _, position in phases), *itertools.chain(*releases)))
    first = _checked(trace, places, made, is_own=is_own)
    begins = [place - first for place in (places or [])[1:]]
    spans = list(zip(begins[len(phases) :: 2], begins[len(phases) + 1 :: 2], strict=True))
    found, workspaces = _cut(trace[first:], [name for name, _ in phases], begins[: len(phases)], spans)
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
def _marked(name: str, phases: list[Begun], index: int) -> Iterator[None]:
    """Note where in the history a phase begins."""
    phases.append((name, read_position(index)))
    yield


def _allocations(index: int) -> int:
    """Return how many blocks were ever handed out."""
    count: int = torch.cuda.memory_stats(index).get("allocation.all.allocated", 0)
    return count


def _checked(trace: list[Entry], places: list[int] | None, made: int, *, is_own: bool) -> int:
    """Return the index of the recording's first entry.

    Args:
        trace: The ring of events, oldest first.
        places: The recording's positions in it, the first one first; None where it begins later.
        made: How many allocations it has to hold.
        is_own: Whether it was started for the recording, and holds all kinds of entries.
    """
    kept = Counter(entry["action"] for entry in trace[places[0] if places else 0 :])
    without_frees = kept["free_requested"] > 0 and not kept["free_completed"]
    if places is None or kept["alloc"] != made or (without_frees and not is_own):
        raise UsageError(
            f"The memory history that is being recorded already kept {kept['alloc']} of {made} allocations"
            f" and {kept['free_completed']} frees.",
            f"It holds {len(trace)} events, or leaves some kinds of them out.",
            "Start it with torch.cuda.memory._record_memory_history(max_entries=1_000_000), or not at all.",
        )
    return places[0]


def _cut(
    trace: list[Entry], names: list[str], begins: list[int], spans: list[Span]
) -> tuple[tuple[Phase, ...], frozenset[int]]:
    """Return the phases, and which blocks are cuBLAS's workspaces.

    Args:
        trace: The recording's entries.
        names: The phases'.
        begins: The index of each phase's first entry.
        spans: Indices between which workspaces were given back.
    """
    kept = _allocations_and_frees(trace) if names else []
    events = name_blocks((trace[place]["addr"], size, trace[place]["stream"]) for place, size in kept)
    phases: list[list[Event]] = [[] for _ in names]
    workspaces = set()
    given_back = {place for begin, end in spans for place in range(begin, end)}  # lanes have thousands of spans
    for event, (place, _) in zip(events, kept, strict=True):
        if place in given_back:
            workspaces.add(event.block)
        phase = max(bisect.bisect_right(begins, place) - 1, 0)  # what comes before the first phase counts to it
        phases[phase].append(event if event.block > 0 else event._replace(block=-trace[place]["addr"]))
    cut = tuple(Phase(name, tuple(found)) for name, found in zip(names, phases, strict=True))
    return cut, frozenset(workspaces)


def _allocations_and_frees(trace: list[Entry]) -> list[tuple[int, int]]:
    """Return the indices of allocations and frees, each with its bytes.

    > 0 where a block is handed out, < 0 where it is free again.

    A free is complete when no stream uses the block any more. Where something happens between the request and that, the
    request counts for itself, with no bytes.
    """
    wanted = [n for n, entry in enumerate(trace) if entry["action"] in ("alloc", "free_requested", "free_completed")]
    kept = []
    for place, following in itertools.zip_longest(wanted, wanted[1:]):
        entry, after = trace[place], trace[following] if following is not None else None
        if entry["action"] == "free_requested":
            if after is None or after["action"] != "free_completed" or after["addr"] != entry["addr"]:
                kept.append((place, 0))
        else:
            kept.append((place, entry["size"] if entry["action"] == "alloc" else -entry["size"]))
    return kept
