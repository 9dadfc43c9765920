"""Plan what training reserves first where micro-batches vary in width (window/widths.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plan import SegmentRow
from ..ranks.sharded import sharded_modules
from ..simulation.cuda_allocator.allocator import CudaRules
from ..simulation.solver import Split
from .predictor import verified_part

if TYPE_CHECKING:
    from .predictor_cuda import CudaPredictor
    from .training_simulator import TrainingSimulator


def segments_to_reserve(
    predictor: CudaPredictor, simulator: TrainingSimulator, split: Split, retries: tuple[int, ...]
) -> tuple[SegmentRow, ...]:
    """Return the segments that training reserves first, or none.

    None where windows are expected to release the cache, since the segments of the first one have no room beside those
    of the next; where cuBLAS keeps its workspaces, which a narrower first window would put into the middle of one;
    where segments are no bound (`serves_narrower`); where other streams need memory that these would take (sharded
    models); and where what windows allocate is known by its sum only (lanes, compiled models).

    Args:
        predictor: What is known.
        simulator: Of a new process.
        split: The plan's.
        retries: How often windows are expected to release the cache.
    """
    context, kept = predictor.subject.context, predictor.keeps(split)
    if any(retries) or not serves_narrower(predictor.rules) or predictor.compiled_share != 1:
        return ()
    if kept or context.runs_in_lanes or sharded_modules(context.model):
        return ()
    try:
        found = simulator.segments(verified_part(split), kept=kept)
    except LookupError:
        return ()
    reserved = predictor.baseline_bytes + sum(each.bytes * each.count for each in found)
    return found if reserved <= predictor.budget.bytes else ()


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
