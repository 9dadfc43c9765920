"""Thin a window's live bytes to what a chart can show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..phases import FIRST, LATER
from ..plan import TimelinePart
from .program import StepProgram, window
from .recording import Phase, kept_blocks
from .solver import Split

MAX_SHOWN_MICRO_BATCHES = 3  # a fourth repeats the third
MAX_POINTS = 360


def timeline(program: StepProgram, split: Split, points: int = MAX_POINTS) -> tuple[TimelinePart, ...]:
    """Return the live bytes through a window's first micro-batches, thinned.

    Bytes are as requested, above the base. Each phase gets equally many points, since an optimizer step has many events
    and little to show. A point is the maximum of its stretch, so that no peak is lost.

    Args:
        program: The step program.
        split: Samples in each micro-batch.
        points: How many points there are at most.
    """
    split = split[:MAX_SHOWN_MICRO_BATCHES]
    phases = window(program, split)
    live = sum(event.bytes for event in kept_blocks(program.first_step_events))
    sizes = iter(split)
    parts, size = [], split[0]
    for phase in phases:
        size = next(sizes) if phase.name in (FIRST, LATER) else size
        levels = _levels(phase, live)
        live = levels[-1]
        parts.append(TimelinePart(phase.name, size, len(phase.events), _thinned(levels, points // len(phases))))
    return tuple(parts)


def _levels(phase: Phase, live: int) -> list[int]:
    """Return the live bytes at the phase's start and after each event."""
    levels = [live]
    for event in phase.events:
        levels.append(levels[-1] + event.bytes)
    return levels


def _thinned(levels: Sequence[int], points: int) -> tuple[int, ...]:
    """Return the maximum of each of that many stretches of equal length."""
    points = min(points, len(levels))
    edges = [len(levels) * i // points for i in range(points + 1)]
    return tuple(max(levels[low:high]) for low, high in pairwise(edges))
