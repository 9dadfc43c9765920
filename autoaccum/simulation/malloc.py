"""Replay a window's events on malloc, or on the page cache.

The CPU's allocator is the C library's malloc. Its rules here, from glibc 2.36's malloc.c, with a fixed mmap threshold:
a request of at least the threshold is a separate mapping, rounded up to pages, returned to the system when it is freed
(sysmalloc_mmap, munmap_chunk); a smaller one lives in the heap, which grows to its peak of live bytes and keeps that.
There are no pools and no splits. (Where the heap has a hole of at least the threshold, malloc uses that instead of a
mapping; the rules leave that out.)

With the page cache (devices/cpu/source/cache.c) a request of at least the threshold takes whole pages without overhead,
and pages stay when it is freed: what is committed is the most that was alive at once. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..phases import FIRST, LATER
from ..process_memory import PAGE_BYTES
from .recording import Phase

ALIGNMENT_BYTES = 64  # c10's alloc_cpu (impl_alloc_cpu.cpp): posix_memalign(&data, gAlignment, nbytes)
CHUNK_STEP_BYTES = 16
# glibc's malloc.c: a chunk is its bytes and a header of 8, rounded up to 16 (checked_request2size). To align one, it
# asks itself for chunk + 64 + MINSIZE, 32 (_int_memalign), with a header of 8 and rounded up to 16 again. A mapping
# takes 8 more (sysmalloc_mmap: ALIGN_UP (nb + SIZE_SZ, pagesize)). Rounded up to pages, that equals adding the most
# that all of this can add: 8 + 64 + 32 + 8 + 8, and 16.
MAPPING_OVERHEAD_BYTES = ALIGNMENT_BYTES + 32 + 3 * 8 + CHUNK_STEP_BYTES


@dataclass(frozen=True)
class CpuRules:
    """Describe how the C library's malloc takes memory from the system.

    Attributes:
        mmap_threshold_bytes: Requests from here on are separate mappings; None counts requested bytes only, since
            glibc's default threshold moves.
        unrecorded_bytes: Small blocks of a micro-batch that recordings miss, mostly autograd's nodes. They occupy the
            heap from its start to its end.
        keeps_pages: Whether the page cache serves those requests.
    """

    mmap_threshold_bytes: int | None
    unrecorded_bytes: int = 0
    keeps_pages: bool = False

    @property
    def overhead_bytes(self) -> int:
        """What a mapping takes beside its bytes, before rounding to pages."""
        return 0 if self.keeps_pages else MAPPING_OVERHEAD_BYTES

    @property
    def smallest_mapping_bytes(self) -> int | None:
        """The smallest request that isn't the heap's; None for all of them."""
        if self.mmap_threshold_bytes is None or self.keeps_pages:
            return self.mmap_threshold_bytes
        return smallest_mapping(self.mmap_threshold_bytes)


@dataclass(frozen=True)
class HeapState:
    """Hold the heap's state before the first event.

    Attributes:
        heap_free_bytes: Free bytes inside the heap, which small blocks fill before it grows.
    """

    heap_free_bytes: int = 0


EMPTY = HeapState()


@dataclass(frozen=True)
class PhasePeak:
    """Hold a phase's peak, in bytes above the start."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Replay:
    """Hold the peaks of a replay.

    Attributes:
        peak_bytes: Peak of bytes taken from the system, above the start.
        live_bytes: Peak of requested bytes alive: the minimum for any allocator.
        phases: The peak of each phase, in order, phases of one name together.
    """

    peak_bytes: int
    live_bytes: int
    phases: tuple[PhasePeak, ...]


def replay(phases: Iterable[Phase], rules: CpuRules, start: HeapState = EMPTY) -> Replay:
    """Run the phases' events through the allocator's rules.

    Where pages are kept, the heap is at its top as well while they are at theirs: in the second window, if not in the
    first.

    Args:
        phases: What is allocated and freed, in order.
        rules: The allocator.
        start: Its state before the first event.
    """
    mapped = heap = heap_top = live = live_peak = 0
    free, smallest, overhead = start.heap_free_bytes, rules.smallest_mapping_bytes, rules.overhead_bytes
    keeps = rules.keeps_pages
    by_phase: dict[str, int] = {}
    for phase in phases:
        phase_peak = by_phase.get(phase.name, 0)
        unrecorded = rules.unrecorded_bytes if phase.name in (FIRST, LATER) else 0
        heap, heap_top = heap + unrecorded, max(heap_top, heap + unrecorded)
        for _, size, _ in phase.events:
            live += size
            if smallest is None:
                mapped += size
            elif size >= smallest:
                mapped += -(-(size + overhead) // PAGE_BYTES) * PAGE_BYTES  # mapping_bytes, in line
            elif size <= -smallest:
                mapped -= -((size - overhead) // PAGE_BYTES) * PAGE_BYTES
            elif size > 0:
                heap += size + ALIGNMENT_BYTES
                if heap > heap_top:
                    heap_top = heap
            else:
                heap += size - ALIGNMENT_BYTES
            if size > 0:
                taken = mapped if keeps or heap_top <= free else mapped + heap_top - free
                if taken > phase_peak:
                    phase_peak = taken
                if live > live_peak:
                    live_peak = live
        heap -= unrecorded
        by_phase[phase.name] = phase_peak
    grown = max(0, heap_top - free) if keeps else 0
    names = tuple(PhasePeak(name, size + grown) for name, size in by_phase.items())
    return Replay(max((each.bytes for each in names), default=0), live_peak, names)


def smallest_mapping(threshold_bytes: int) -> int:
    """Return the smallest request that becomes a separate mapping.

    glibc's malloc.c, sysmalloc: `nb >= mp_.mmap_threshold`, nb being what _int_memalign asks for: without the last 8.
    """
    nb = -(-threshold_bytes // CHUNK_STEP_BYTES) * CHUNK_STEP_BYTES
    return nb + 1 - MAPPING_OVERHEAD_BYTES


def mapping_bytes(size: int, overhead_bytes: int = MAPPING_OVERHEAD_BYTES) -> int:
    """Return the bytes of a separate mapping, in whole pages."""
    return -(-(size + overhead_bytes) // PAGE_BYTES) * PAGE_BYTES


def in_use_peaks(phases: Iterable[Phase], rules: CpuRules) -> dict[str, int]:
    """Return the peak bytes in use in each phase, overhead included.

    Equals `mallinfo2`'s uordblks + hblkhd, and the page cache's live bytes, if the recorded blocks were the only ones.
    """
    smallest, overhead, in_use = rules.smallest_mapping_bytes, rules.overhead_bytes, 0
    assert smallest is not None
    peaks: dict[str, int] = {}
    for phase in phases:
        peaks.setdefault(phase.name, 0)
        for _, size, _ in phase.events:
            taken = mapping_bytes(abs(size), overhead) if abs(size) >= smallest else abs(size) + ALIGNMENT_BYTES
            in_use += taken if size > 0 else -taken
            peaks[phase.name] = max(peaks[phase.name], in_use)
    return peaks
