"""The rules of PyTorch's CUDA caching allocator, without CUDA and without torch.

Read from c10/cuda/CUDACachingAllocator.cpp (2025) and c10/core/AllocatorConfig.h as installed with torch 2.14; the name
of the function or constant stands beside each rule. What is not modelled: private pools (CUDA graphs), blocks held
back by `record_stream`, expandable segments, the garbage collection threshold.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .allocator import PhasePeak
from .recording import Phase

KiB, MiB = 1 << 10, 1 << 20
MIN_BLOCK = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL = MiB  # kSmallSize: rounded sizes up to here live in the small pool
SMALL_SEGMENT = 2 * MiB  # kSmallBuffer
MIN_LARGE = 10 * MiB  # kMinLargeAlloc: below it a large segment is
LARGE_SEGMENT = 20 * MiB  # kLargeBuffer, and from it on the size rounded up to
ROUND_LARGE = 2 * MiB  # kRoundLarge
MAX_NON_SPLIT_ROUNDING = 20 * MiB  # max_non_split_rounding_size: a block that may not be split wastes at most this


@dataclass(frozen=True)
class CudaRules:
    """How the allocator is set, and what the device can give it.

    Attributes:
        capacity_bytes: What cudaMalloc can hand out in all; None for any amount.
        max_split_size_bytes: Blocks from here on are neither split nor given to smaller requests; None for no limit.
        roundup_power2_divisions: Steps between powers of two that sizes are rounded up to; 0 for none.
    """

    capacity_bytes: int | None = None
    max_split_size_bytes: int | None = None
    roundup_power2_divisions: int = 0


@dataclass(frozen=True)
class CudaReplay:
    """What a replay came to, in the allocator's own statistics.

    Attributes:
        peak_reserved_bytes: `max_memory_reserved`.
        peak_allocated_bytes: `max_memory_allocated`: whole blocks, their slack included.
        retries: `num_alloc_retries`: how often the cache was given back to make room, by phase in order of its parts.
        phases: Highest reserved bytes in each phase, phases of one name together.
        out_of_memory: Index of the phase in which it ran out; None where it did not.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    retries: tuple[int, ...]
    phases: tuple[PhasePeak, ...]
    out_of_memory: int | None = None


@dataclass(slots=True, eq=False)
class _Block:
    """A piece of a segment; neighbours within the segment are linked."""

    address: int
    size: int
    stream: int
    small: bool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


class _OutOfMemory(Exception):
    pass


@dataclass
class _Allocator:
    rules: CudaRules
    pools: dict[tuple[int, bool], list[tuple[int, int, _Block]]] = field(default_factory=dict)
    next_address: int = 1 << 40
    reserved: int = 0
    allocated: int = 0
    peak_reserved: int = 0
    peak_allocated: int = 0
    retries: int = 0

    def malloc(self, requested: int, stream: int) -> _Block:
        size = round_size(requested, self.rules.roundup_power2_divisions)
        small = size <= SMALL  # get_pool
        block = self._best_fit(size, stream, small) or self._new_segment(size, stream, small)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: _Block) -> None:
        """free_block: merges with free neighbours, and goes back to its pool."""
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._take_out(other)
                block = _merged(block, other)
        self._put_in(block)

    def _best_fit(self, size: int, stream: int, small: bool) -> _Block | None:
        """get_free_block: the smallest that is large enough, ties by lowest address."""
        pool = self.pools.get((stream, small), [])
        index = bisect.bisect_left(pool, (size, 0))
        if index == len(pool):
            return None
        found = pool[index][2]
        limit = self.rules.max_split_size_bytes
        if limit is not None:
            if size < limit <= found.size:
                return None
            if size >= limit and found.size >= size + MAX_NON_SPLIT_ROUNDING:
                return None
        del pool[index]
        return found

    def _new_segment(self, size: int, stream: int, small: bool) -> _Block:
        """alloc_block, with what is done before it gives up."""
        total = segment_bytes(size)
        if not self._has_room(total):
            released = self._release_oversize(size, stream, small)  # release_available_cached_blocks
            if not (released and self._has_room(total)):
                self._release_free_segments()  # release_cached_blocks
                self.retries += 1
        if not self._has_room(total):
            raise _OutOfMemory
        self.reserved += total
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = _Block(self.next_address, total, stream, small)
        self.next_address += total
        return block

    def _has_room(self, size: int) -> bool:
        capacity = self.rules.capacity_bytes
        return capacity is None or self.reserved + size <= capacity

    def _split(self, block: _Block, size: int) -> None:
        """should_split, and the split itself."""
        rest = block.size - size
        limit = self.rules.max_split_size_bytes
        if not (rest >= MIN_BLOCK if block.small else (limit is None or size < limit) and rest > SMALL):
            return
        after = _Block(block.address + size, rest, block.stream, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = after
        block.after, block.size = after, size
        self._put_in(after)

    def _release_oversize(self, size: int, stream: int, small: bool) -> bool:
        """With a maximum split size: gives back one block that is enough, or the largest until they are.

        Returns:
            Whether it was enough; where not, what it gave back stays given back.
        """
        limit = self.rules.max_split_size_bytes
        if limit is None:
            return False
        needed, released = max(size, limit), 0
        pool = self.pools.get((stream, small), [])
        enough = bisect.bisect_left(pool, (needed, 0))
        candidates = pool[enough : enough + 1] or pool[::-1]
        for _, _, block in candidates:
            if released >= needed or block.size < limit:
                break
            released += block.size
            self._give_back(block)
        return released >= needed

    def _release_free_segments(self) -> None:
        for pool in list(self.pools.values()):
            for _, _, block in list(pool):
                if _is_whole_segment(block):
                    self._give_back(block)

    def _give_back(self, block: _Block) -> None:
        self._take_out(block)
        self.reserved -= block.size

    def _put_in(self, block: _Block) -> None:
        bisect.insort(self.pools.setdefault((block.stream, block.small), []), (block.size, block.address, block))

    def _take_out(self, block: _Block) -> None:
        pool = self.pools[block.stream, block.small]
        del pool[bisect.bisect_left(pool, (block.size, block.address))]


def _is_whole_segment(block: _Block) -> bool:
    return block.before is None and block.after is None


def _merged(block: _Block, other: _Block) -> _Block:
    """try_merge_blocks: the lower of the two takes the other in."""
    low, high = (block, other) if block.address < other.address else (other, block)
    low.size += high.size
    low.after = high.after
    if low.after is not None:
        low.after.before = low
    low.free = True
    return low


def round_size(size: int, divisions: int = 0) -> int:
    """round_size: to multiples of 512; with divisions, to that many equal steps between powers of two."""
    if size < MIN_BLOCK:
        return MIN_BLOCK
    if divisions > 1 and size > MIN_BLOCK * divisions:  # roundup_power2_next_division
        power = 1 << (size.bit_length() - 1)
        if power == size:
            return size
        step = power // divisions
        return -(-size // step) * step
    return -(-size // MIN_BLOCK) * MIN_BLOCK


def segment_bytes(size: int) -> int:
    """get_allocation_size: what is asked of cudaMalloc for a rounded size."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


def replay_cuda(phases: Sequence[Phase] | Iterable[Phase], rules: CudaRules) -> CudaReplay:
    """Runs phases through the allocator from empty, reading only allocations, frees, sizes and streams.

    Args:
        phases: In order. A free of a block that they didn't allocate is passed over.
        rules: The allocator's settings and the capacity.
    """
    allocator = _Allocator(rules)
    live: dict[int, _Block] = {}
    by_phase: dict[str, int] = {}
    retries: list[int] = []
    failed = None
    for index, phase in enumerate(phases):
        before, allocator.peak_reserved = allocator.retries, allocator.reserved
        try:
            for block, size, stream in phase.events:
                if size > 0:
                    live[block] = allocator.malloc(size, stream)
                elif block in live:
                    allocator.free(live.pop(block))
        except _OutOfMemory:
            failed = index
        by_phase[phase.name] = max(by_phase.get(phase.name, 0), allocator.peak_reserved)
        retries.append(allocator.retries - before)
        if failed is not None:
            break
    peaks = tuple(PhasePeak(name, size) for name, size in by_phase.items())
    peak = max((peak.bytes for peak in peaks), default=0)
    return CudaReplay(peak, allocator.peak_allocated, tuple(retries), peaks, failed)
