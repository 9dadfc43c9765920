"""Find out which of equal free blocks the caching allocator reuses.

By torch's version where that is known (simulation/cuda_allocator/ties.py), else by a test on the device: some blocks
are allocated, two of one size are freed, and the next request shows which of them comes back. On the way it shows
whether the driver's addresses go up or down. The test runs on a stream that nothing else has used, whose pool is
therefore empty; it takes at most 136 MiB, milliseconds, and empties the cache. Where less is free it is left out, since
planning promises no out-of-memory: torch counts and logs each, also those that are caught.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ...simulation.cuda_allocator.snapshot import AllocatorState
from ...simulation.cuda_allocator.ties import LOWEST_ADDRESS, OLDEST_BLOCK, OLDEST_SEGMENT, TieRule, tie_rule_of
from ...torch_compat import memory_fraction

PIECE_BYTES = 512 << 10  # four of them fill a small segment
LARGE_BYTES = 34 << 20  # a segment of its own, above the 32 MiB ranges into which a driver may put several
ROOM_BYTES = 5 * LARGE_BYTES  # four of them are taken; pages of expandable segments and small blocks lie beside
STREAMS = 32  # of each priority, PyTorch has so many
NO_ROOM = f"{ROOM_BYTES >> 20} MiB for a test are not free"
_OUTERMOST: dict[int, tuple[int, int]] = {}  # by device: the lowest and the highest address of any segment so far


@dataclass(frozen=True)
class SelfTest:
    """Hold what the test on the device showed.

    Attributes:
        tie_rule: The rule; None where nothing showed it.
        addresses_down: Whether later memory lies below earlier memory; None where nothing showed it.
        why: What was seen, or what was in the way.
    """

    tie_rule: TieRule | None
    addresses_down: bool | None
    why: str


@dataclass(frozen=True)
class AllocatorRules:
    """Hold the rules to replay by, and the reason.

    Attributes:
        tie_rule: Which of several free blocks of one size is taken.
        addresses_down: Whether later memory lies below earlier memory.
        by_version: Whether torch's version is a known one, and the test does not contradict.
        reason: Where the rule comes from.
    """

    tie_rule: TieRule
    addresses_down: bool
    by_version: bool
    reason: str


@cache
def find_rules(index: int) -> AllocatorRules:
    """Return the rules of a device's allocator and addresses.

    Args:
        index: The device's number.
    """
    known, test = tie_rule_of(torch.__version__), self_test(index)
    down = test.addresses_down is not False  # as on a GPU under Linux
    if known is not None and test.tie_rule in (known, None):
        return AllocatorRules(known, down, True, f"torch {torch.__version__}")
    if test.tie_rule is not None:
        return AllocatorRules(test.tie_rule, down, False, f"by a test on the device: {test.why}")
    return AllocatorRules(OLDEST_SEGMENT, down, False, f"as in torch 2.15; the device did not show it: {test.why}")


def self_test(index: int) -> SelfTest:
    """Allocate, free, and see which block comes back.

    Args:
        index: The device's number.
    """
    with torch.cuda.device(index):
        torch.cuda.empty_cache()
        try:
            _require_room(index)
            with _unused_stream(index):
                by_block = _is_fourth_reused(index)
            with _unused_stream(index):
                found = _segments(index, by_block)
        except torch.OutOfMemoryError:  # another process took the memory meanwhile
            found = SelfTest(None, None, NO_ROOM)
        except LookupError as error:
            found = SelfTest(None, None, str(error))
        finally:
            torch.cuda.empty_cache()
    return found


def _require_room(index: int) -> None:
    """Raise where less is free than the test needs."""
    free, total = torch.cuda.mem_get_info(index)
    allowed = int(memory_fraction(index) * total)
    if min(free, allowed - torch.cuda.memory_reserved(index)) < ROOM_BYTES:
        raise LookupError(NO_ROOM)


def _is_fourth_reused(index: int) -> bool:
    """Return whether of four pieces of a segment the fourth is preferred.

    It is what was left of the segment's own block, the oldest by its counter. A fifth follows it, or it could grow in
    an expandable segment, and be taken last for that.
    """
    held = [_new(index, PIECE_BYTES) for _ in range(5)]
    places = [piece.data_ptr() for piece in held[:4]]
    if places != [places[0] + number * PIECE_BYTES for number in range(4)]:
        raise LookupError("four blocks did not lie in one segment")
    del held[3], held[0]
    found = _new(index, PIECE_BYTES).data_ptr()
    if found not in (places[0], places[3]):
        raise LookupError("neither of two free blocks came back")
    return found == places[3]


def _segments(index: int, by_block: bool) -> SelfTest:
    """Free two segments, the older above the newer; see which comes back."""
    held = [_new(index, LARGE_BYTES) for _ in range(4)]
    places = [each.data_ptr() for each in held]
    steps = [after > before for before, after in itertools.pairwise(places)]
    down = None if _expandable(index) else sum(steps) < 2
    if by_block:
        return SelfTest(OLDEST_BLOCK, down, "of four pieces of one segment the last came back before the first")
    if _expandable(index):
        return SelfTest(None, None, "in one expandable segment the lowest address is that in the oldest segment")
    old = next((place for place, step in enumerate(steps) if not step), None)
    if old is None:  # all go up: give the first back to the driver, which puts the next one there
        del held[0]
        torch.cuda.empty_cache()
        held.append(_new(index, LARGE_BYTES))
        old, new = 0, len(held) - 1
    else:
        new = old + 1
    older, newer = held[old].data_ptr(), held[new].data_ptr()
    if newer > older:
        return SelfTest(None, down, "no newer segment lay below an older one")
    del held[new], held[old]
    found = _new(index, LARGE_BYTES).data_ptr()
    if found not in (older, newer):
        return SelfTest(None, down, "neither of two free segments came back")
    rule = LOWEST_ADDRESS if found == newer else OLDEST_SEGMENT
    return SelfTest(rule, down, f"of two segments the {'older' if found == older else 'lower'} came back first")


def _new(index: int, size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", index))


def _expandable(index: int) -> bool:
    """Return whether the current stream has expandable segments."""
    stream = torch.cuda.current_stream(index).cuda_stream
    return any(segment["is_expandable"] for segment in _snapshot(index) if segment["stream"] == stream)


def _snapshot(index: int) -> list[dict[str, Any]]:
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    found = [segment for segment in segments if segment["device"] == index]
    plain = [(each["address"], each["address"] + each["total_size"]) for each in found if not each["is_expandable"]]
    if plain:
        low, high = _OUTERMOST.get(index, plain[0])
        _OUTERMOST[index] = min(low, *(each[0] for each in plain)), max(high, *(each[1] for each in plain))
    return found


def read_state(index: int) -> AllocatorState:
    """Read what a device's allocator holds, and the addresses seen so far.

    Args:
        index: The device's number.
    """
    segments = _snapshot(index)
    return AllocatorState.from_snapshot(segments, index, _OUTERMOST.get(index))


@contextmanager
def _unused_stream(index: int) -> Iterator[None]:
    """Make a stream current for which the allocator holds nothing."""
    used = {segment["stream"] for segment in _snapshot(index)}
    for _ in range(STREAMS):
        stream = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
        if stream.cuda_stream not in used:
            with torch.cuda.stream(stream):
                yield
            return
    raise LookupError(f"each of {STREAMS} streams has memory in use")
