"""Time smaller micro-batches and choose the fastest where that is the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import UsageError
from ..simulation.knee import knee
from ..simulation.solver import Solution
from . import timing
from .predictor import MemoryPredictor
from .verify import solve_and_verify


def time_smaller(
    predictor: MemoryPredictor,
    solution: Solution,
    measured: Any,
    planning_seconds: float,
    start_over: Callable[[], None],
) -> timing.Times:
    """Time the solution's micro-batch and smaller ones.

    Args:
        predictor: What is known.
        solution: The plan's split.
        measured: Its verification; None where nothing was run.
        planning_seconds: Duration of planning so far, which limits the timing.
        start_over: Puts back what training changed.
    """
    split = solution.split
    seconds = predictor.verified_figures(measured, split).window_seconds if measured is not None else None
    allowed = timing.allowed_seconds(predictor.request, planning_seconds)
    return timing.time_sizes(predictor, split, seconds, allowed, start_over)


def fastest(
    predictor: MemoryPredictor, solution: Solution, measured: Any, timed: timing.Times, start_over: Callable[[], None]
) -> tuple[Solution, Any]:
    """Return the fewest steps of micro-batches up to the knee, verified.

    Raises:
        UsageError: There are no times to choose by.
    """
    found = knee(timed.sizes)
    if found is None and solution.split[0] > predictor.request.least:
        raise UsageError("The fastest micro-batch cannot be found without times.", f"They were {timed.why}.")
    if found is None or found.timed.micro_batch == solution.split[0]:
        return solution, measured
    start_over()
    smaller = replace(predictor, request=replace(predictor.request, most=found.timed.micro_batch))
    return solve_and_verify(smaller, start_over, verify=True, compiles=False)
