"""Solve for the plan's split by what is predicted now."""

from __future__ import annotations

from ..simulation.solver import Solution, balanced, fewest_equal_steps, largest_micro_batch, smallest_steps
from .predictor import MemoryPredictor
from .schedule import Guess

FIT_MARGIN = 1.03  # a larger solution that fits as well: one step more is unlikely
FIT_MARGIN_OF_STEPS = 1.1  # the same, while a large block still grows in steps


def solve(predictor: MemoryPredictor) -> Solution | None:
    """Return the fewest steps that fit; without a target, the largest micro-batch.

    Returns:
        The solution; None where nothing fits.
    """
    request, budget = predictor.request, predictor.usable_bytes
    if request.samples is not None and request.uniform:
        return fewest_equal_steps(
            predictor.fits,
            predictor.floor,
            samples=request.samples,
            budget_bytes=budget,
            min_size=request.least,
            max_size=request.most,
        )
    if request.samples is not None:
        return smallest_steps(
            predictor.fits,
            predictor.floor,
            samples=request.samples,
            budget_bytes=budget,
            min_size=request.least,
            max_size=request.most,
            later_floor=predictor.later_floor,
        )
    evidence = predictor.evidence
    most = request.most if evidence.fallback_reason is None else evidence.recordings[-1].micro_batch
    size = largest_micro_batch(predictor.fits, predictor.floor, budget_bytes=budget, max_size=most, steps=1)
    return Solution((size,), 1) if size >= request.least else None


def guess(predictor: MemoryPredictor) -> Guess:
    """Return the solution's micro-batch, now and with a step more."""
    if (small := _largest_below(predictor)) is not None:
        return Guess(small, small, is_below=True)
    solution = solve(predictor)
    if solution is None:
        return Guess(0, 0)
    split, samples = solution.split, predictor.request.samples
    margin = FIT_MARGIN_OF_STEPS if predictor.may_saturate else FIT_MARGIN
    larger = tuple(int(margin * size) + 1 for size in split)
    if samples is None or split[0] <= predictor.request.least or predictor.fits(larger):
        return Guess(split[0], split[0])
    return Guess(split[0], balanced(samples, len(split) + 1)[0])


def _largest_below(predictor: MemoryPredictor) -> int | None:
    """Return the largest micro-batch that fits, if smaller than all recordings."""
    recordings = predictor.evidence.recordings
    smallest = recordings[0].micro_batch if predictor.evidence.has_program and recordings else 0
    if smallest <= predictor.request.least or predictor.fits((smallest, smallest)):
        return None
    most = min(smallest - 1, predictor.request.most)
    return largest_micro_batch(
        predictor.fits, predictor.floor, budget_bytes=predictor.usable_bytes, max_size=most, steps=2
    )
