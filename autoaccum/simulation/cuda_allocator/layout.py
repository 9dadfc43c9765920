"""Describe pools: their layout, and what was unused longest. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from .blocks import Block, Pool

_rank = attrgetter("rank")


def layout_of(pool: Pool) -> tuple[list[object], dict[Block, int]]:
    """Describe a pool, equally for two moments with the same future choices.

    Returns:
        Its segments in the order of their ranks, with each block's size and state; and each block's place in it.
    """
    ranks = pool.ranks
    heads = sorted(pool.heads.values(), key=_rank)
    found: list[object] = [-1, pool.stream]
    places: dict[Block, int] = {}
    for head in heads:
        found.append(head.address if ranks.by_address else -2)
        block: Block | None = head
        while block is not None:
            places[block] = len(found)
            found.append(block.size << 3 | block.free << 2 | block.mapped << 1 | (block.page > 0))
            block = block.after
    if ranks.by_block:
        found += [places[block] for block in sorted(places, key=_rank)]
    elif pool.unmapped and not ranks.by_address:
        found += [place for _, place in sorted((head.address, place) for place, head in enumerate(heads))]
    return found, places


def segment_sizes(pool: Pool) -> list[int]:
    """Return the bytes of each segment of a pool."""
    found = []
    for head in pool.heads.values():
        size = 0
        block: Block | None = head
        while block is not None:
            size, block = size + block.size, block.after
        found.append(size)
    return found


def long_unused(pools: Iterable[Pool], searches: int, target: int) -> list[Block]:
    """Choose unused segments older than average, until enough (garbage_collect_cached_blocks).

    Args:
        pools: Where to look.
        searches: How many searches there were; a block's age is how many since it was freed.
        target: Bytes that are enough.
    """
    blocks = (block for pool in pools for block in pool.blocks.values())
    ages = {block: searches - block.born for block in blocks if block.is_whole_segment() and not block.page}
    chosen: list[Block] = []
    while ages and sum(block.size for block in chosen) < target:
        average = sum(ages.values()) / len(ages)
        old = [block for block, age in ages.items() if age >= average]
        for block in old:
            del ages[block]
        chosen += old
    return chosen
