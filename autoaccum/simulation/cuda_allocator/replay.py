"""Replay the phases of a window on a fresh caching allocator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..malloc import PhasePeak
from ..recording import Phase
from .allocator import CachingAllocator, PhaseResult
from .settings import CudaRules
from .snapshot import EMPTY, AllocatorState


@dataclass(frozen=True)
class CudaReplay:
    """Hold a replay's results, in the allocator's own statistics.

    Attributes:
        peak_reserved_bytes: `max_memory_reserved`.
        peak_allocated_bytes: `max_memory_allocated`: whole blocks, their slack included.
        retries: `num_alloc_retries`: number of cache flushes to make room, by phase in order.
        phases: Highest reserved bytes in each phase, phases of one name together.
        out_of_memory: Index of the phase in which memory ran out; None if it did not.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    retries: tuple[int, ...]
    phases: tuple[PhasePeak, ...]
    out_of_memory: int | None = None


def replay_cuda(phases: Iterable[Phase], rules: CudaRules, start: AllocatorState = EMPTY) -> CudaReplay:
    """Run phases through a fresh allocator.

    Args:
        phases: In order. A free of an unknown block is ignored.
        rules: The allocator's settings and the capacity.
        start: Its state before the first event.
    """
    allocator = CachingAllocator(rules, start)
    results: list[PhaseResult] = []
    by_phase: dict[str, int] = {}
    for phase in phases:
        result = allocator.run(phase)
        results.append(result)
        by_phase[phase.name] = max(by_phase.get(phase.name, 0), result.peak_reserved_bytes)
        if result.out_of_memory:
            break
    return CudaReplay(
        peak_reserved_bytes=max((result.peak_reserved_bytes for result in results), default=allocator.reserved_bytes),
        peak_allocated_bytes=max((result.peak_allocated_bytes for result in results), default=0),
        retries=tuple(result.retries for result in results),
        phases=tuple(PhasePeak(name, size) for name, size in by_phase.items()),
        out_of_memory=len(results) - 1 if allocator.out_of_memory else None,
    )
