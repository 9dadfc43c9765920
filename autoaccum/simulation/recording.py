"""A recording: a window's allocations and frees, in order, by phase.

A value, whatever device it was made on; `devices/cpu/recorder.py` makes one. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .cuda_allocator.snapshot import AllocatorState


class Event(NamedTuple):
    """One block allocated (`bytes` > 0, as requested) or freed (< 0).

    `block` names the block within its recording. Blocks that were there before the recording began have negative names.
    No bytes: it was given back while another stream still uses it, and can't be used again before its free follows.
    """

    block: int
    bytes: int
    stream: int = 0


@dataclass(frozen=True)
class Phase:
    """The events of one phase of a window."""

    name: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Recording:
    """The recorded events of one window, or of the first step.

    Attributes:
        micro_batch: Samples in each of its micro-batches.
        phases: In the order in which they ran.
        passes: Forward/backward passes that it took.
        seconds: What it took.
        start: What the caching allocator held when it began; None on a CPU.
        workspaces: Blocks that are cuBLAS's workspaces, given back at the end of each phase.
    """

    micro_batch: int
    phases: tuple[Phase, ...]
    passes: int = 0
    seconds: float = 0.0
    start: AllocatorState | None = None
    workspaces: frozenset[int] = frozenset()


def name_blocks(raw: Iterable[tuple[int, int, int]]) -> list[Event]:
    """Turn `(address, bytes, stream)` into events with unique block names.

    Addresses are reused.

    Args:
        raw: In order; `bytes` > 0 where the block is handed out, < 0 where it is taken back, 0 where it will be.
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
    """Return the peak of live requested bytes, above the start."""
    live = peak = 0
    for phase in phases:
        for event in phase.events:
            live += event[1]  # it may be a plain tuple
            peak = max(peak, live)
    return peak


def kept_blocks(events: Sequence[Event]) -> tuple[Event, ...]:
    """Return the allocations never freed within `events`, in order."""
    freed = {event.block for event in events if event.bytes < 0}
    return tuple(event for event in events if event.bytes > 0 and event.block not in freed)
