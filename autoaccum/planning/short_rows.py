"""Find how many short samples a micro-batch may have within its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..data.collated import Collated
from ..data.sample import shortened
from ..data.tokens import most_rows
from ..simulation.solver import Solution
from . import build_plan
from .predictor import MemoryPredictor
from .trial import unless_out_of_memory


def most_short_rows(predictor: MemoryPredictor, solution: Solution, start_over: Callable[[], None]) -> int | None:
    """Return the most rows of short samples that fit the budget.

    Memory that grows with tokens, or faster with the length, is highest with the longest samples, which the plan is
    made with. Memory that grows with rows is highest with the shortest. So both ends are run.

    Args:
        predictor: What is known.
        solution: The plan's split, at the longest samples.
        start_over: Puts back what training changed.

    Returns:
        The rows; None where the plan has no limit on tokens, or no more rows than its micro-batch fit.
    """
    subject, samples, micro_batch = predictor.subject, predictor.request.samples, solution.split[0]
    work = subject.workload
    tokens = build_plan.token_budget(work, micro_batch)
    if (
        isinstance(work.sample, Collated)
        or tokens is None
        or work.lengths is None
        or samples is None
        or work.encode is not None
    ):
        return None
    rows = most_rows(work.lengths, tokens, samples)
    while rows > micro_batch:
        subject.progress(f"trying {rows} short samples")
        start_over()
        short = replace(work, sample=shortened(work.sample, max(1, tokens // rows)))
        train = replace(subject, workload=short).train
        measured, _ = unless_out_of_memory(lambda t=train, n=rows: predictor.measure(t, (n, n)))  # type: ignore[misc]
        if measured is not None and predictor.holds(measured):
            return rows
        rows = (rows + micro_batch) // 2
    return None
