"""Model the allocator's blocks and pools, and expandable segments. No torch here.

Read from c10/cuda/CUDACachingAllocator.cpp; each rule names its function or type there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

from .addresses import Addresses
from .ties import Ranks

RANK_BITS = 64  # keys of free blocks: the size, and below it the rank
UNLIMITED_BYTES = 1 << 50


class Block:
    """Hold a piece of a segment, linked to its neighbours."""

    __slots__ = ("address", "after", "base", "before", "born", "free", "key", "mapped", "page", "pool", "rank", "size")

    def __init__(
        self, pool: Pool, address: int, size: int, rank: int, before: Block | None = None, page: int = 0, base: int = 0
    ) -> None:
        self.pool, self.address, self.size, self.rank, self.before = pool, address, size, rank, before
        self.after: Block | None = None
        self.page, self.base = page, base  # of its expandable segment: a page's bytes (0 for none), where it begins
        self.mapped, self.free = True, False
        self.key = self.born = 0

    def is_whole_segment(self) -> bool:
        """Return whether the block is a whole segment (not is_split)."""
        return self.before is None and self.after is None


class Pool:
    """Hold one stream's small or large blocks (BlockPool).

    Attributes:
        ranks: Which of two blocks of one size is taken.
        keys: Of free blocks: sizes above ranks, ascending.
        blocks: By key.
        unmapped: Of expandable segments, by address (BlockComparatorAddress).
        heads: The first block of each segment, by its address.
    """

    __slots__ = ("blocks", "heads", "keys", "ranks", "small", "stream", "unmapped")

    def __init__(self, stream: int, small: bool, ranks: Ranks) -> None:
        self.stream, self.small, self.ranks = stream, small, ranks
        self.keys: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.unmapped: list[Block] = []
        self.heads: dict[int, Block] = {}

    def put_in(self, block: Block) -> None:
        """Insert a free block (insert_into_blocks)."""
        block.free = True
        block.key = block.size << RANK_BITS | block.rank
        insort(self.keys, block.key)
        self.blocks[block.key] = block

    def take_out(self, block: Block) -> None:
        """Remove a free block."""
        block.free = False
        del self.blocks[block.key]
        del self.keys[bisect_left(self.keys, block.key)]


def load(pool: Pool, address: int, sizes: Sequence[int], page: int = 0, span: int = 0) -> list[Block]:
    """Put an existing segment, or a range of pages, into a pool.

    Args:
        pool: Whose it is.
        address: Where it begins.
        sizes: Of its blocks, in order.
        page: Bytes of a page of an expandable segment; 0 for an ordinary one.
        span: Addresses of an expandable segment, which begins with the first of its ranges.

    Returns:
        Its blocks, none of them free yet.
    """
    if page:
        block = _unmapped_at(pool, address) or _new_segment(pool, page, span, address)
        if address > block.address:
            block = _cut_unmapped(block, address - block.address)
        pool.unmapped.remove(block)
        block.mapped = True
        if sum(sizes) < block.size:
            _cut_unmapped(block, sum(sizes))
    else:
        block = pool.heads[address] = Block(pool, address, sum(sizes), pool.ranks.of_segment(address, sum(sizes)))
    blocks = [block]
    for size in sizes[:-1]:
        blocks.append(_cut(blocks[-1], size))
    if pool.ranks.by_block and len(blocks) > 1:  # what was split off again and again is what is left at the end
        first = block.rank
        for each in blocks[:-1]:
            each.rank = pool.ranks.of_block()
        blocks[-1].rank = first
    return blocks


# -- expandable segments


def expand(
    pool: Pool, size: int, page: int, span: int, addresses: Addresses, take: Callable[[int], bool]
) -> Block | None:
    """Map pages until a block of `size` exists (try_allocate_expandable_block).

    Args:
        pool: Whose segment it is.
        size: Rounded bytes.
        page: Bytes of a page.
        span: Addresses of a new segment.
        addresses: Where a new segment is placed.
        take: Takes bytes from the driver, if it has them.

    Returns:
        The block, no longer free; None if the driver ran out, or no segment spans as much. Pages mapped so far stay
        mapped.
    """
    if size > span:
        return None
    block = _room_for(pool, size) or _new_segment(pool, page, span, addresses.take(span))
    if not block.mapped:
        mapped = _map(block, min(block.size, size), take)
        if mapped is None:
            return None
        block = mapped
    while block.size < size:
        following = block.after
        assert following is not None
        mapped = _map(following, min(size - block.size, following.size), take)
        if mapped is None:
            return None
        block = mapped
    pool.take_out(block)
    return block


def expandable_size(block: Block) -> int:
    """Return a block's size including the unmapped range after it."""
    after = block.after
    return block.size if after is None or after.mapped else block.size + after.size


def _room_for(pool: Pool, size: int) -> Block | None:
    """Find the lowest free or unmapped addresses with room (find_expandable_block)."""
    for unmapped in pool.unmapped:
        before = unmapped.before
        first = before if before is not None and before.free else unmapped
        room, block = 0, first
        while room < size and block is not None and (block.free or not block.mapped):
            room += block.size
            following = block.after
            if following is None:
                break
            block = following
        if room >= size:
            return first
    return None


def _new_segment(pool: Pool, page: int, span: int, address: int) -> Block:
    """Reserve addresses without memory (ExpandableSegment)."""
    block = Block(pool, address, span, pool.ranks.of_segment(address, span), page=page, base=address)
    block.mapped = False
    pool.heads[block.address] = block
    insort(pool.unmapped, block, key=_address)
    return block


def _map(block: Block, size: int, take: Callable[[int], bool]) -> Block | None:
    """Map whole pages, then merge with free neighbours (map_block)."""
    pool, mapped = block.pool, -(-size // block.page) * block.page
    if not take(mapped):
        return None
    pool.unmapped.remove(block)
    block.mapped = True
    if mapped < block.size:
        _cut_unmapped(block, mapped)
    block = _merged_with_neighbours(block)
    pool.put_in(block)
    return block


def unmap(block: Block, addresses: Addresses) -> int:
    """Release the whole pages within a free block (unmap_block).

    Args:
        block: The block.
        addresses: What a segment that ends is given back to.

    Returns:
        The bytes given back.
    """
    pool, page, base = block.pool, block.page, block.base
    begin = base + -(-(block.address - base) // page) * page
    end = base + (block.address + block.size - base) // page * page
    if begin >= end:
        return 0
    pool.take_out(block)
    if begin > block.address:
        block, low = _cut(block, begin - block.address), block
        if pool.ranks.by_block:  # the part below is the new block
            block.rank, low.rank = low.rank, block.rank
        pool.put_in(low)
    if block.address + block.size > end:
        pool.put_in(_cut(block, end - begin))
    block.mapped = False
    block = _merged_with_neighbours(block)
    if block.is_whole_segment():  # release_expandable_segment
        del pool.heads[block.address]
        addresses.give(block.address)
    else:
        insort(pool.unmapped, block, key=_address)
    return end - begin


def _cut(block: Block, size: int) -> Block:
    """Shorten a block to `size`; return the rest, neither free nor unmapped."""
    ranks = block.pool.ranks
    rank = ranks.of_block() if ranks.by_block else block.rank + size
    rest = Block(block.pool, block.address + size, block.size - size, rank, block, block.page, block.base)
    rest.after = block.after
    if rest.after is not None:
        rest.after.before = rest
    block.after, block.size = rest, size
    return rest


def _cut_unmapped(block: Block, size: int) -> Block:
    rest = _cut(block, size)
    rest.mapped = False
    insort(block.pool.unmapped, rest, key=_address)
    return rest


def _unmapped_at(pool: Pool, address: int) -> Block | None:
    return next((b for b in pool.unmapped if b.address <= address < b.address + b.size), None)


def _merged_with_neighbours(block: Block) -> Block:
    """Merge an unlisted block with neighbours of its kind (try_merge_blocks)."""
    pool, own = block.pool, block.rank
    for other in (block.before, block.after):
        if other is None or other.mapped != block.mapped or (other.mapped and not other.free):
            continue
        if other.mapped:
            pool.take_out(other)
        else:
            pool.unmapped.remove(other)
        low, high = (other, block) if other.address < block.address else (block, other)
        low.size += high.size
        low.after = high.after
        if low.after is not None:
            low.after.before = low
        if pool.ranks.by_block:
            low.rank = own
        block = low
    return block


def expandable_ranges(pools: Iterable[Pool], spans: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return expandable segments' ranges, as (address, bytes); `spans` by page."""
    return [(head.base, spans[head.page]) for pool in pools for head in pool.heads.values() if head.page]


_address = attrgetter("address")
