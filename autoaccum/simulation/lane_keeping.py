"""Estimate what of a window in lanes can stay on the device.

A window whose lanes move all that they save holds, at each moment, so many bytes less than one in which all of that
stays. What is saved last is needed first: where it stays, it is gone again when the first layers, often the widest, go
back. So the first parts of a lane move, and the later ones stay. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .lane_composing import stretches_of
from .lane_program import LaneProgram


def moved_by_part(program: LaneProgram, split: Sequence[int]) -> list[int]:
    """Return the bytes that the lanes move in each part.

    Args:
        program: Of windows that move something.
        split: Samples in each lane.
    """
    found = [0] * (1 + max(stage.part for stage in program.stages))
    for (part, _), moved in _moved_by_stretch(program, split).items():
        found[part] += moved
    return found


def least_moved_parts(program: LaneProgram, split: Sequence[int], room_bytes: int) -> int:
    """Estimate of how many parts the saved tensors have to move.

    By bytes that are alive. What the allocator reserves for them is more, so that the window is to be predicted.

    Args:
        program: Of windows in which all parts move.
        split: Samples in each lane.
        room_bytes: What may be alive beside model, gradients that were there before, and optimizer state.

    Returns:
        The number of first parts that move.
    """
    by_part = moved_by_part(program, split)
    missing = _live_without_moving(program, split) - room_bytes
    return next((parts for parts, moved in enumerate(accumulate(by_part, initial=0)) if moved >= missing), len(by_part))


def _live_without_moving(program: LaneProgram, split: Sequence[int]) -> int:
    """Return the most bytes that are alive where nothing moves, roughly.

    What a stretch itself saves counts once: it is alive there in any case.
    """
    live = most = saved = 0
    before: dict[tuple[int, int], int] = {}  # by part and lane, what was saved until it began
    own = _moved_by_stretch(program, split)
    for stage, lane, events in stretches_of(program, split):
        place = stage.part, lane
        if stage.order < 0:
            saved = before.get(place, 0)
        peak = live
        for event in events:
            live += event.bytes
            peak = max(peak, live)
        most = max(most, peak + saved)
        if stage.order > 0:
            before.setdefault(place, saved)
            saved += own.pop(place, 0)
    return most


def _moved_by_stretch(program: LaneProgram, split: Sequence[int]) -> dict[tuple[int, int], int]:
    """Return by part and lane the bytes that move."""
    found: dict[tuple[int, int], int] = {}
    for stage, lane, kind in program.stretches(split):
        if (stage, kind) in program.moved:
            found[program.stages[stage].part, lane] = sum(program.moved_by((stage, kind), lane, split))
    return found
