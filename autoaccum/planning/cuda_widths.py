"""Plan what training reserves first where micro-batches vary in width (window/widths.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..plan import SegmentRow
from ..ranks.sharded import sharded_modules
from ..simulation.cuda_allocator.allocator import CudaRules
from ..simulation.solver import Split
from ..simulation.varied_widths import Course, planned_segments, replay_reserved
from .predictor import verified_part

if TYPE_CHECKING:
    from .predictor_cuda import CudaPredictor
    from .training_simulator import TrainingSimulator

NOTHING: tuple[tuple[SegmentRow, ...], int | None] = (), None


def segments_to_reserve(
    predictor: CudaPredictor, simulator: TrainingSimulator, split: Split
) -> tuple[tuple[SegmentRow, ...], int | None]:
    """Return the segments that training reserves first, and what windows reserve then.

    None where segments are no bound (`serves_narrower`); where other streams need memory that these would take (sharded
    models); where what windows allocate is known by its sum only (lanes, compiled models); and where a replay of the
    planned window or of narrower ones, with the segments there, releases the cache, runs out of memory or reserves more
    than the planned window needs by itself.

    Args:
        predictor: What is known.
        simulator: Of a new process.
        split: The plan's.

    Returns:
        The segments; and the most that replayed windows of narrower micro-batches reserve, None without segments.
    """
    context = predictor.subject.context
    if not serves_narrower(predictor.rules) or predictor.compiled_share != 1:
        return NOTHING
    if context.runs_in_lanes or sharded_modules(context.model):
        return NOTHING
    try:
        course = simulator.course(verified_part(split), kept=predictor.keeps(split))
    except LookupError:
        return NOTHING
    rules, most = predictor.rules.with_capacity(predictor.budget.bytes), predictor.worst_bytes(split)
    # Kept workspaces lie elsewhere in a window that makes them itself, and it may leave other segments.
    for shown in dict.fromkeys((course.workspaces, ())):
        found = planned_segments(replace(course, workspaces=shown), rules)
        peak = _peak_with(course, rules, found, most) if found else None
        if peak is not None:
            return found, peak
    return NOTHING


def _peak_with(course: Course, rules: CudaRules, segments: tuple[SegmentRow, ...], most: int) -> int | None:
    """Return what narrower windows reserve, or None.

    None where these, or the planned one, release the cache, run out of memory or exceed what the planned one reserves.
    """
    widest = replay_reserved(course, rules, segments, narrower=False)
    if not widest.settled or widest.peak_bytes > most:
        return None
    narrower = replay_reserved(course, rules, segments, narrower=True)
    return max(widest.peak_bytes, narrower.peak_bytes) if narrower.settled else None


def serves_narrower(rules: CudaRules) -> bool:
    """Return whether any free block is split for smaller requests.

    Not where large ones aren't (`max_split_size_mb`), or are given back (`garbage_collection_threshold`); where sizes
    are rounded up, a segment would become larger than asked for. Expandable segments grow in place and need none.
    """
    return not (
        rules.expandable_segments
        or rules.max_split_size_bytes
        or rules.garbage_collection_threshold
        or rules.roundup_power2_divisions
    )
