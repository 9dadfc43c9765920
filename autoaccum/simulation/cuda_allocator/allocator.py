"""Simulate PyTorch's CUDA caching allocator without CUDA and without torch.

Read from c10/cuda/CUDACachingAllocator.cpp (2025) and compared with torch 2.6's to 2.15's on a virtual GPU; each rule
names its function there. Not modelled: private pools (CUDA graphs, `MemPool`), calls of `empty_cache` within a phase,
and the ages of blocks in a snapshot.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from ..recording import Phase
from .addresses import Addresses, edge_of
from .blocks import RANK_BITS, UNLIMITED_BYTES, Block, Pool, expand, expandable_ranges, expandable_size, load, unmap
from .layout import layout_of, long_unused, segment_sizes
from .settings import MAX_SMALL_BYTES, MIN_BLOCK_BYTES, SMALL_SEGMENT_BYTES, CudaRules, round_size, segment_bytes
from .snapshot import EMPTY, AllocatorState, CudaSegment
from .ties import Ranks

__all__ = ["EMPTY", "AllocatorState", "CachingAllocator", "CudaRules", "PhaseResult"]


@dataclass(frozen=True)
class PhaseResult:
    """Hold one phase's result, in the allocator's own statistics.

    Attributes:
        name: The phase's name.
        peak_reserved_bytes: `max_memory_reserved`, were it reset when the phase began.
        peak_allocated_bytes: `max_memory_allocated` likewise: whole blocks, their slack included.
        retries: `num_alloc_retries`: number of cache flushes to make room.
        out_of_memory: Whether memory ran out, which ended the phase.
    """

    name: str
    peak_reserved_bytes: int
    peak_allocated_bytes: int
    retries: int
    out_of_memory: bool = False


class _OutOfMemory(Exception):
    pass


FAR = 1 << 59  # an address of expandable segments, far from others


class CachingAllocator:
    """Simulate the allocator of one device.

    Args:
        rules: Its settings and the capacity.
        start: Its state before the first event.

    Attributes:
        reserved_bytes: `memory_reserved` now.
        allocated_bytes: `memory_allocated` now.
        retries: `num_alloc_retries` since the start.
        out_of_memory: Whether memory ran out; it runs no more phases then.
    """

    def __init__(self, rules: CudaRules, start: AllocatorState = EMPTY) -> None:
        self.rules = rules
        self.reserved_bytes = start.reserved_bytes
        self.allocated_bytes = start.allocated_bytes
        self.retries = 0
        self.out_of_memory = False
        self._peak_reserved = self._peak_allocated = 0
        self._live: dict[int, Block] = {}
        self._held: dict[int, Block] = {}  # freed, and in use by another stream (record_stream)
        self._large: dict[int, Pool] = {}  # by stream
        self._small: dict[int, Pool] = {}
        self._wanted: dict[int, tuple[int, int, dict[int, Pool], int]] = {}  # by requested bytes: see _want
        self._allowed_bytes = rules.allowed_bytes if rules.refuses_above_allowed else None
        self._collects = rules.allowed_bytes is not None and rules.garbage_collection_threshold > 0
        self._searches = 0  # get_free_blocks_call_count, of large blocks
        expandable = rules.expandable_segments or any(segment.expandable for segment in start.segments)
        self._looks_further = expandable or self._collects or rules.max_split_size_bytes is not None
        self._ranks = Ranks(rules.tie_rule)
        self._by_block = self._ranks.by_block
        self._spans = {page: rules.expandable_span(page) for page in (SMALL_SEGMENT_BYTES, rules.large_segment_bytes)}
        own = [segment for segment in start.segments if not segment.private]
        # Of the age of a start's segments nothing is known but that addresses go one way.
        for segment in sorted(own, key=lambda segment: segment.address, reverse=rules.addresses_down):
            self._load(segment)
        self._addresses = Addresses(start.edge(rules.addresses_down), rules.addresses_down, start.ranges())
        ranges = expandable_ranges((*self._small.values(), *self._large.values()), self._spans)
        self._ranges = Addresses(edge_of(ranges, rules.addresses_down, FAR), rules.addresses_down, ranges)

    def run(self, phase: Phase) -> PhaseResult:
        """Run one phase, reading allocations, frees, sizes and streams.

        An event of 0 bytes frees its block while another stream still uses it; its free follows. Live blocks of the
        start are named by their negative addresses, as in the recording that began there. A free of an unknown block is
        ignored.

        Raises:
            ValueError: Where an earlier phase ran out of memory.
        """
        if self.out_of_memory:
            raise ValueError("This allocator ran out of memory in an earlier phase: start again with a new one.")
        before, self._peak_reserved, self._peak_allocated = self.retries, self.reserved_bytes, self.allocated_bytes
        live, malloc, free = self._live, self._malloc, self._free
        try:
            for name, size, stream in phase.events:
                if size > 0:
                    live[name] = malloc(size, stream)
                    continue
                block = live.pop(name, None)
                if block is not None:
                    self.allocated_bytes -= block.size
                    if size:
                        free(block)
                    else:
                        self._held[name] = block
                elif name in self._held:
                    free(self._held.pop(name))
        except _OutOfMemory:
            self.out_of_memory = True
        return PhaseResult(
            phase.name, self._peak_reserved, self._peak_allocated, self.retries - before, self.out_of_memory
        )

    def state_key(self, names: Iterable[int] = ()) -> tuple[object, ...]:
        """Return a key, equal for two moments with the same future behaviour.

        The key holds the order of the segments, the blocks of each, and which are free, but not the owners of live
        blocks. Two moments with equal keys continue alike if the blocks that are freed later lie at the same places:
        pass their names, in the same order of roles, to include that. A key may return after several windows only: two
        blocks that replace each other alternate.

        Args:
            names: Live blocks whose places are part of the key, in the same order of roles; others are ignored.
        """
        layout: list[object] = []
        places: dict[Block, int] = {}
        for pools in (self._small, self._large):
            for stream in sorted(pools):
                blocks, found = layout_of(pools[stream])
                places |= {block: place + len(layout) for block, place in found.items()}
                layout += blocks
        named = tuple(places[self._live[name]] if name in self._live else -1 for name in names)
        held = tuple(sorted(places[block] for block in self._held.values()))
        return tuple(layout), named, held, self._ages() if self._collects else ()

    def large_segments(self) -> dict[int, list[int]]:
        """Return the bytes of each segment for large blocks, by stream."""
        return {stream: segment_sizes(pool) for stream, pool in self._large.items()}

    # -- malloc and free

    def _want(self, requested: int) -> tuple[int, int, dict[int, Pool], int]:
        """Return rounded size, least key, pools and the smallest split-off rest."""
        rules = self.rules
        size = round_size(requested, rules.roundup_power2_divisions)
        small, limit = size <= MAX_SMALL_BYTES, rules.max_split_size_bytes  # get_pool
        if small or rules.expandable_segments:  # should_split
            least_rest = MIN_BLOCK_BYTES
        else:
            least_rest = MAX_SMALL_BYTES + 1 if limit is None or size < limit else UNLIMITED_BYTES
        found = size, size << RANK_BITS, self._small if small else self._large, least_rest
        self._wanted[requested] = found
        return found

    def _malloc(self, requested: int, stream: int) -> Block:
        """Allocate (malloc): best fit, by rank among equals; else a new segment."""
        size, least_key, pools, least_rest = self._wanted.get(requested) or self._want(requested)
        pool = pools.get(stream) or self._new_pool(stream, small=pools is self._small)
        keys = pool.keys
        index = bisect_left(keys, least_key)
        if self._looks_further:
            index = self._choice(pool, index, size)
        if index < len(keys):
            block = pool.blocks.pop(keys[index])
            block.free = False
        else:
            block = self._new_block(pool, size)
            index = -1
        rest = block.size - size
        if rest >= least_rest:  # alloc_found_block: the rest goes back
            self._split(block, size, index)
        elif index >= 0:
            del keys[index]
        self.allocated_bytes = allocated = self.allocated_bytes + block.size
        if allocated > self._peak_allocated:
            self._peak_allocated = allocated
        return block

    def _split(self, block: Block, size: int, index: int) -> None:
        """Split a block; the rest takes its place among the keys."""
        pool = block.pool
        keys = pool.keys
        rank = block.rank
        if self._by_block:  # the new block is the one that is handed out
            block.rank = self._ranks.of_block()
        else:
            rank += size
        after = Block(pool, block.address + size, block.size - size, rank, block, block.page, block.base)
        following = block.after
        if following is not None:
            after.after = following
            following.before = after
        block.after, block.size = after, size
        after.key = key = after.size << RANK_BITS | rank
        after.born, after.free = self._searches, True
        pool.blocks[key] = after
        if index < 0:
            insort(keys, key)
        elif index == 0 or keys[index - 1] < key:
            keys[index] = key
        else:
            del keys[index]
            insort(keys, key, 0, index)

    def _free(self, block: Block) -> None:
        """Free (free_block): merge with free neighbours (try_merge_blocks), return to the pool."""
        pool = block.pool
        keys, old = pool.keys, None
        before, after = block.before, block.after
        if before is not None and before.free:
            old = before.key
            del pool.blocks[old]
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            if self._by_block:
                before.rank = block.rank
            block = before
        if after is not None and after.free:
            if old is not None:
                del keys[bisect_left(keys, old)]
            old = after.key
            del pool.blocks[old]
            block.size += after.size
            block.after = following = after.after
            if following is not None:
                following.before = block
        block.key = key = block.size << RANK_BITS | block.rank
        block.born, block.free = self._searches, True
        pool.blocks[key] = block
        if old is None:
            insort(keys, key)
            return
        index = bisect_left(keys, old)
        if index + 1 == len(keys) or keys[index + 1] > key:
            keys[index] = key
        else:
            del keys[index]
            insort(keys, key, index)

    def _choice(self, pool: Pool, index: int, size: int) -> int:
        """Choose a block (get_free_block) from the best fit on, by index."""
        keys, blocks, limit = pool.keys, pool.blocks, self.rules.max_split_size_bytes
        if self._collects and not pool.small:
            self._searches += 1
        none = len(keys)
        if index == none:
            return none
        if self.rules.expandable_segments:
            # A block that can grow counts as large as it can get: the next larger is taken if it can't get as large.
            while blocks[keys[index]].page and index + 1 < none:
                if expandable_size(blocks[keys[index + 1]]) >= expandable_size(blocks[keys[index]]):
                    break
                index += 1
        else:
            while index < none and blocks[keys[index]].page:
                index += 1
            if index == none:
                return none
        if limit is not None:
            found = keys[index] >> RANK_BITS
            if size < limit <= found:
                return none
            if size >= limit and found >= size + self.rules.max_non_split_rounding_bytes:
                return none
        return index

    # -- memory from the driver, and back

    def _new_block(self, pool: Pool, size: int) -> Block:
        """Get memory (malloc, alloc_block), with the steps before giving up."""
        if self._collects:
            self._collect()
        block = self._alloc_block(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._alloc_block(pool, size)
        if block is None:
            self._release_cached()
            self.retries += 1
            block = self._alloc_block(pool, size)
        if block is None:
            raise _OutOfMemory
        return block

    def _alloc_block(self, pool: Pool, size: int) -> Block | None:
        rules = self.rules
        total = segment_bytes(size, rules.large_segment_bytes)
        if self._allowed_bytes is not None and self.reserved_bytes + total > self._allowed_bytes:
            return None
        if rules.expandable_segments:
            page = SMALL_SEGMENT_BYTES if pool.small else rules.large_segment_bytes
            return expand(pool, size, page, self._spans[page], self._ranges, self._take)
        if not self._take(total):
            return None
        address = self._addresses.take(total)
        block = pool.heads[address] = Block(pool, address, total, self._ranks.of_segment(address, total))
        return block

    def _take(self, size: int) -> bool:
        """Take bytes from the driver (cudaMalloc, cuMemCreate), if it has them."""
        reserved, capacity = self.reserved_bytes + size, self.rules.capacity_bytes
        if capacity is not None and reserved > capacity:
            return False
        self.reserved_bytes = reserved
        if reserved > self._peak_reserved:
            self._peak_reserved = reserved
        return True

    def _give_back(self, block: Block) -> None:
        """Return a segment to the driver (release_block)."""
        block.pool.take_out(block)
        del block.pool.heads[block.address]
        self._addresses.give(block.address)
        self.reserved_bytes -= block.size

    def _collect(self) -> None:
        """Collect garbage above the threshold (garbage_collect_cached_blocks)."""
        most = int(self.rules.garbage_collection_threshold * (self.rules.allowed_bytes or 0))
        for block in long_unused(self._large.values(), self._searches, self.reserved_bytes - most):
            self._give_back(block)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Release one large enough block (release_available_cached_blocks), or the largest.

        Returns:
            Whether it was enough; if not, what was released stays released.
        """
        limit = self.rules.max_split_size_bytes
        if limit is None or self.rules.expandable_segments:
            return False
        needed, released = max(size, limit), 0
        enough = bisect_left(pool.keys, needed << RANK_BITS)
        for key in pool.keys[enough : enough + 1] or pool.keys[::-1]:
            block = pool.blocks[key]
            if released >= needed or block.size < limit:
                break
            released += block.size
            self._give_back(block)
        return released >= needed

    def _release_cached(self) -> None:
        """Release all free pages (release_cached_blocks), after waiting for other streams."""
        for block in self._held.values():  # synchronize_and_free_events
            self._free(block)
        self._held.clear()
        for pools in (self._large, self._small):
            for pool in pools.values():
                free = [pool.blocks[key] for key in pool.keys]
                for block in free:
                    if not block.page and block.is_whole_segment():
                        self._give_back(block)
                for block in free:
                    if block.page:
                        self.reserved_bytes -= unmap(block, self._ranges)

    # -- state

    def _new_pool(self, stream: int, *, small: bool) -> Pool:
        pool = Pool(stream, small, self._ranks)
        (self._small if small else self._large)[stream] = pool
        return pool

    def _load(self, segment: CudaSegment) -> None:
        """Put a segment of the start into its pool."""
        pools = self._small if segment.small else self._large
        pool = pools.get(segment.stream) or self._new_pool(segment.stream, small=segment.small)
        page = (SMALL_SEGMENT_BYTES if segment.small else self.rules.large_segment_bytes) if segment.expandable else 0
        sizes = [block.bytes for block in segment.blocks]
        for block, (_, state) in zip(
            load(pool, segment.address, sizes, page, self._spans[page] if page else 0), segment.blocks, strict=True
        ):
            if state == "free":
                pool.put_in(block)
            elif state == "held":
                self._held[-block.address] = block
            else:
                self._live[-block.address] = block

    def _ages(self) -> tuple[int, ...]:
        keyed = (
            pool.blocks[key] for stream in sorted(self._large) for pool in [self._large[stream]] for key in pool.keys
        )
        return tuple(self._searches - block.born for block in keyed)
