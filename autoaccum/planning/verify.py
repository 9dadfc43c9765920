"""Solve, verify by running the window, and refit on mismatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..devices import oom
from ..errors import DoesNotFit, NotConfirmed
from ..simulation.solver import Solution, Split, balanced, uniform_sizes
from ..units import show_bytes
from . import failures, schedule
from .predictor import MemoryPredictor, verified_part
from .record import add_recording
from .solution import solve
from .trial import run_for_real

ATTEMPTS = 4


def solve_and_verify(
    predictor: MemoryPredictor, start_over: Callable[[], None], *, verify: bool, compiles: bool
) -> tuple[Solution, Any]:
    """Solve, run the window, and solve again on mismatch.

    Args:
        predictor: What is known; what the runs show is added to it.
        start_over: Puts back what training changed.
        verify: Whether to run anything.
        compiles: Whether windows are run compiled.

    Returns:
        The solution and what was measured; None for that where nothing was run.

    Raises:
        DoesNotFit: Not even the smallest window fits.
        NotConfirmed: No prediction was confirmed in four attempts.
    """
    if verify:
        return _Verification(predictor, start_over, compiles).run()
    solution = solve(predictor)
    if solution is None:
        raise _does_not_fit(predictor)
    return solution, None


@dataclass
class _Verification:
    """The attempts to confirm a solution.

    Attributes:
        predictor: What is known; what the runs show is added to it.
        start_over: Puts back what training changed.
        compiles: Whether windows are run compiled.
        learned_from: Micro-batches that were run, and their measurement, which the predictor has learned from.
        safe: A solution that fits though its prediction was far off, and its measurement.
    """

    predictor: MemoryPredictor
    start_over: Callable[[], None]
    compiles: bool
    learned_from: tuple[Split, Any] = ((), None)
    safe: tuple[Solution, Any] | None = None

    def run(self) -> tuple[Solution, Any]:
        """Solve and run until a prediction is confirmed."""
        predictor, failure = self.predictor, None
        for attempt in range(ATTEMPTS):
            solution = solve(predictor)
            if self.safe is not None and (solution is None or len(solution.split) >= len(self.safe[0].split)):
                return self._improved(*self.safe)
            if solution is None:
                raise _does_not_fit(predictor)
            split = verified_part(solution.split, compiles=self.compiles)
            if self.learned_from[0] == split and predictor.ran_as_chosen(solution.split, self.learned_from[1]):
                return self._improved(solution, self.learned_from[1])
            if attempt:
                self.start_over()
            predictor.settle(solution.split, split)
            measured, failure = run_for_real(predictor, split)
            if predictor.lost_memory() and not predictor.fits_surely(solution.split):
                failure = f"was for more than the {show_bytes(predictor.budget.bytes)} that are available since"
                predictor.subject.progress(f"the plan {failure}: solving again")
                continue
            if measured is not None:
                failure = predictor.confirms(split, measured)
            if failure is None:
                may_solve_again = not self.compiles and attempt < ATTEMPTS - 1
                if may_solve_again and (self._learned(split, measured) or self._corrected(solution, split, measured)):
                    continue
                return self._improved(solution, measured)
            if self.safe is not None:
                return self._back_to_safe(self.safe, failure)
            self._refit(split, measured, failure, is_first=attempt == 0)
        raise NotConfirmed(
            f"No plan could be confirmed in {ATTEMPTS} attempts: the last one {failure}.",
            "What a window allocates seems to depend on chance or on the data.",
            'Plan with more headroom (headroom="20%"), or without verifying: verify=False.',
        )

    def _improved(self, solution: Solution, measured: Any) -> tuple[Solution, Any]:
        """Return fewer steps where trying them is free and they fit."""
        return self.predictor.try_fewer_steps(solution, measured, self.predictor.subject.train, self.start_over)

    def _learned(self, split: Split, measured: Any) -> bool:
        """Learn from a confirmed window where it shows something new."""
        predictor = self.predictor
        if not (predictor.teaches(split, measured) and predictor.learns(split, measured)):
            return False
        self.learned_from = split, measured
        return True

    def _corrected(self, solution: Solution, split: Split, measured: Any) -> bool:
        """Correct a prediction that was far off from a fitting window."""
        predictor = self.predictor
        remark = predictor.describe_mismatch(split, measured)
        if remark is None:
            return False
        predictor.subject.progress(f"{remark} Solving again with them")
        self.safe, predictor.remark = (solution, measured), remark
        predictor.correct_compiled_share(split, measured)
        self.start_over()
        return True

    def _back_to_safe(self, safe: tuple[Solution, Any], failure: str) -> tuple[Solution, Any]:
        """Return the solution that fitted, after fewer steps did not."""
        predictor = self.predictor
        self.start_over()
        predictor.compiled_share = 1.0
        predictor.remark = f"{predictor.remark} Fewer steps were tried, and {failure}."
        predictor.forget()
        return safe

    def _refit(self, split: Split, measured: Any, failure: str, *, is_first: bool) -> None:
        """Learn from a window that was not as predicted."""
        predictor = self.predictor
        predictor.subject.progress(f"{failure}: learning from it")
        self.start_over()
        if self.compiles or predictor.is_incomplete:  # recordings are of uncompiled windows, and right about those
            predictor.correct_compiled_share(split, measured)
        elif predictor.learns(split, measured):
            self.learned_from = split, measured
        else:
            _record_near(predictor, split[0], is_last=not is_first)


def _record_near(predictor: MemoryPredictor, n: int, *, is_last: bool) -> None:
    """Record near a mispredicted size; else fall back to bracketing."""
    subject, evidence = predictor.subject, predictor.evidence
    if evidence.fallback_reason is not None:  # more than its own recording: that one is left out
        evidence.notes = [note for note in evidence.notes if note.micro_batch < n] or evidence.notes[:1]
        evidence.set_recordings([r for r in evidence.recordings if r.micro_batch < n] or evidence.recordings[:1])
        predictor.forget()
        schedule.narrow(subject, evidence, lambda _: predictor, too_large=n)
        return
    small = schedule.sizes_around(evidence, n, predictor.request.least) if evidence.has_program else []
    if small and all([_recorded(predictor, size) for size in small]):
        predictor.forget()
        return
    largest = evidence.recordings[-1].micro_batch
    near = next((size for size in (schedule.prime_near(n), n) if size > largest), None)
    if near is not None and not _recorded(predictor, near):
        reason: str | None = f"a recording at {near} samples, which should have fitted, did not"
    else:
        reason = schedule.reason_against_program(subject, evidence)
    if reason is None and is_last:
        reason = "windows used other memory than their recordings, so each size was tried separately"
    predictor.forget()
    if reason is not None:
        evidence.fall_back(reason)
        may_fit, most = (lambda _, size: predictor.is_sure_to_fit(size)), predictor.request.most
        schedule.bracket(subject, evidence, may_fit, lambda _: predictor, most)


def _recorded(predictor: MemoryPredictor, n: int) -> bool:
    """Record at n where it should fit; return whether it did."""
    if not predictor.is_sure_to_fit(n):
        return True
    try:
        add_recording(predictor.subject, predictor.evidence, n)
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        predictor.subject.progress(f"{n} samples are too many: {oom.drop_frames(error)}")
    else:
        return True
    oom.collect()
    return False


def _does_not_fit(predictor: MemoryPredictor) -> DoesNotFit:
    """Return the error about the smallest window."""
    request = predictor.request
    samples = request.samples or request.least
    split = balanced(samples, samples // request.least)
    if request.uniform:
        size = uniform_sizes(samples, min_size=request.least, max_size=request.most)[-1]
        split = (size,) * (samples // size)
    try:
        needed = predictor.needed_bytes(split)
    except LookupError:
        needed = None  # no recording is that small
    return failures.does_not_fit(predictor, split, needed)
