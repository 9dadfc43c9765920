"""Number moments of the allocator's history by the allocator's own counters.

The allocator counts each block that it hands out and each that is given back, and writes one entry for each: `alloc`
and `free_requested` (c10/cuda/CUDACachingAllocator.cpp, alloc_found_block and free). So the sum of the two counters at
a moment is the number of these entries before it. That holds in each version of torch; marking entries with a text
(`user_metadata`) is missing in 2.6 to 2.9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...torch_compat import Entry

COUNTED = ("alloc", "free_requested")


def read_position(index: int) -> int:
    """Return how many blocks were handed out or given back so far.

    Args:
        index: The device's number.
    """
    stats = torch.cuda.memory_stats(index)
    return int(stats.get("allocation.all.allocated", 0) + stats.get("allocation.all.freed", 0))


def find_positions(trace: Sequence[Entry], last: int, positions: Sequence[int]) -> list[int] | None:
    """Return where in the history each position lies.

    Args:
        trace: The history, oldest entry first; the oldest ones may be lost.
        last: The position at its end.
        positions: Positions at or before that.

    Returns:
        For each, the index of the first entry after it; None where the history begins later. A `free_completed` right
        after its request belongs to it; one that had to wait for another stream is written when the next block is
        handed out.
    """
    counted = [place for place, entry in enumerate(trace) if entry["action"] in COUNTED]
    found = []
    for position in positions:
        before = len(counted) - (last - position)  # counted entries of the trace before this position
        if before < 0 or (before == 0 and counted and counted[0] == 0):
            return None
        found.append(_after(trace, counted[before - 1]) if before else 0)
    return found


def _after(trace: Sequence[Entry], place: int) -> int:
    """Return the index after an entry and its own completion."""
    entry, following = trace[place], trace[place + 1 : place + 2]
    completed = [each["addr"] for each in following if each["action"] == "free_completed"]
    return place + (2 if entry["action"] == "free_requested" and completed == [entry["addr"]] else 1)
