"""Run a window while planning: to verify it, or to compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ..devices import oom
from ..devices.base import Measurement
from ..simulation.solver import Split
from .predictor import MemoryPredictor, verified_part
from .solution import solve

Result = TypeVar("Result")


def run_for_real(predictor: MemoryPredictor, split: Split) -> tuple[Measurement | None, str | None]:
    """Train the first windows as the Runner does.

    Returns:
        What was measured, and None; or None and the failure where memory ran out.
    """
    subject = predictor.subject
    subject.progress(f"verifying {len(split)} micro-batches of {split[0]}")
    return unless_out_of_memory(lambda: predictor.measure(subject.train, split))


def unless_out_of_memory(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return the result of the work, or the out-of-memory failure."""
    try:
        return work(), None
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        failure = oom.drop_frames(error)
    oom.collect()
    return None, f"ran out of memory ({failure})"


def compile_at_answer(predictor: MemoryPredictor, start_over: Callable[[], None]) -> None:
    """Compile at the solution's sizes, and add the compiler's memory.

    A process that trains compiled holds that memory too.
    """
    solution, subject, evidence = solve(predictor), predictor.subject, predictor.evidence
    if solution is None:
        return
    subject.progress("compiling")
    before = subject.device.read_heap()
    sizes = tuple(dict.fromkeys(verified_part(solution.split, compiles=True)))
    unless_out_of_memory(lambda: subject.train(sizes))
    start_over()
    after, first = subject.device.read_heap(), evidence.heap_after_first_step
    if after is not None and before is not None and first is not None:
        outside = max(0, after.outside_bytes - before.outside_bytes)
        in_use = max(0, after.in_use_bytes - before.in_use_bytes)
        evidence.heap_after_first_step = replace(
            first, outside_bytes=first.outside_bytes + outside, in_use_bytes=first.in_use_bytes + in_use
        )
