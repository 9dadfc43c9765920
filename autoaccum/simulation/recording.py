"""Define a recording: every allocation and free of one window, by phase.

It is the same for every device; `devices/cpu/recorder.py` makes one. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .cuda_allocator.snapshot import AllocatorState


class Event(NamedTuple):
    """Hold one allocation (`bytes` > 0, as requested) or free (< 0).

    `block` names the block within its recording; blocks from before the recording have negative names. 0 bytes mean
    that it was freed while another stream still uses it: it is unavailable until its free follows.
    """

    block: int
    bytes: int
    stream: int = 0


@dataclass(frozen=True)
class Phase:
    """Hold the events of one phase of a window."""

    name: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Recording:
    """Hold the recording of one window, or of the first optimizer step.

    Attributes:
        micro_batch: Samples in each of its micro-batches.
        phases: In the order in which they ran.
        passes: Number of forward/backward passes.
        seconds: Its duration.
        start: The caching allocator's state at its start; None on a CPU.
        workspaces: Blocks that are cuBLAS's workspaces, released at the end of each phase.
        library_bytes: On a CPU, buffers that libraries keep from its products to later ones; they are in no event.
    """

    micro_batch: int
    phases: tuple[Phase, ...]
    passes: int = 0
    seconds: float = 0.0
    start: AllocatorState | None = None
    workspaces: frozenset[int] = frozenset()
    library_bytes: int = 0


def name_blocks(raw: Iterable[tuple[int, int, int]]) -> list[Event]:
    """Turn `(address, bytes, stream)` into events with a unique name per block.

    Args:
        raw: In order; `bytes` > 0 for an allocation, < 0 for a free, 0 for a deferred free.
    """
    live: dict[int, int] = {}
    events: list[Event] = []
    named = foreign = 0
    for address, size, stream in raw:
        if size > 0:
            named += 1
            live[address] = named
            events.append(Event(named, size, stream))
            continue
        block = live.pop(address, None) if size else live.get(address)
        if block is None:
            foreign -= 1
            block = foreign
        events.append(Event(block, size, stream))
    return events


def live_peak(phases: Iterable[Phase]) -> int:
    """Return the peak of requested bytes alive, above the start."""
    live = peak = 0
    for phase in phases:
        for event in phase.events:
            live += event[1]  # it may be a plain tuple
            peak = max(peak, live)
    return peak


def kept_blocks(events: Sequence[Event]) -> tuple[Event, ...]:
    """Return the allocations that `events` never free, in order."""
    freed = {event.block for event in events if event.bytes < 0}
    return tuple(event for event in events if event.bytes > 0 and event.block not in freed)
