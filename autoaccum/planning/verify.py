"""The answer by what is known, and its trial: solves, runs the answer's window for real, and learns where it surprised.

The last steps of `planning/fit.py` before the plan is put together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..data.sample import shortened
from ..data.tokens import most_rows
from ..devices import oom
from ..errors import DoesNotFit, NotConfirmed, UsageError
from ..phases import OnPhase
from ..simulation.knee import knee
from ..simulation.solver import Solution, Split, balanced, largest_micro_batch, smallest_steps
from ..window import compiled, step
from . import build_plan, observe, schedule, timing
from .observe import RecordingTarget
from .predictor import MemoryPredictor, verified_part

ATTEMPTS = 4
IN_DOUBT, OPEN_IN_DOUBT = 1.03, 1.1  # times the answer should fit too, or one step more may be needed in the end


def solve(predictor: MemoryPredictor) -> Solution | None:
    """The fewest steps that fit, or without a target the largest micro-batch; None where nothing fits."""
    request, budget = predictor.request, predictor.usable_bytes
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
    most = request.most if predictor.evidence.fallback_reason is None else predictor.evidence.recordings[-1].micro_batch
    size = largest_micro_batch(predictor.fits, predictor.floor, budget_bytes=budget, max_size=most, steps=1)
    return Solution((size,), 1) if size >= request.least else None


def guess(predictor: MemoryPredictor) -> schedule.Guess:
    """What would be chosen now, and what if that should just not fit."""
    solution = solve(predictor)
    if solution is None:
        return schedule.Guess(0, 0)
    split, samples = solution.split, predictor.request.samples
    part = OPEN_IN_DOUBT if predictor.is_open else IN_DOUBT
    larger = tuple(int(part * size) + 1 for size in split)
    if samples is None or split[0] <= predictor.request.least or predictor.fits(larger):
        return schedule.Guess(split[0], split[0])
    return schedule.Guess(split[0], balanced(samples, len(split) + 1)[0])


def compile_at_answer(predictor: MemoryPredictor, start_over: Callable[[], None]) -> None:
    """Compiles at the sizes of the answer. What the compiler keeps is there in any process that trains compiled."""
    solution, subject, evidence = solve(predictor), predictor.subject, predictor.evidence
    if solution is None:
        return
    subject.say("compiling")
    before = subject.device.read_heap()
    _unless_short(lambda: _trainer(subject)(tuple(dict.fromkeys(verified_part(solution.split, compiles=True)))))
    start_over()
    after = subject.device.read_heap()
    if after is not None and before is not None and evidence.after_first is not None:
        grown = after.outside_bytes - before.outside_bytes
        evidence.after_first = replace(
            evidence.after_first, outside_bytes=evidence.after_first.outside_bytes + max(0, grown)
        )


def solve_and_verify(
    predictor: MemoryPredictor, start_over: Callable[[], None], *, verify: bool, compiles: bool
) -> tuple[Solution, Any]:
    """Solves, runs the answer for real, and where that was another than predicted, learns and solves again."""
    wrong: str | None = None
    explained: tuple[Split, Any] = (), None  # micro-batches that were run for real, and what has been learnt from it
    held: tuple[Solution, Any] | None = None  # what fits for sure, though it was predicted to take something else
    for attempt in range(ATTEMPTS):
        solution = solve(predictor)
        if held is not None and (solution is None or len(solution.split) >= len(held[0].split)):
            return predictor.nearer(*held, _trainer(predictor.subject), start_over)
        if solution is None:
            raise _does_not_fit(predictor)
        if not verify:
            return solution, None
        split = verified_part(solution.split, compiles=compiles)
        if explained[0] == split and predictor.ran_as_chosen(solution.split, explained[1]):
            return predictor.nearer(solution, explained[1], _trainer(predictor.subject), start_over)
        if attempt:
            start_over()
        predictor.settle(solution.split, split)
        measured, wrong = _run_for_real(predictor, split)
        if measured is not None:
            wrong = predictor.confirms(split, measured)
        may_learn = not compiles and attempt < ATTEMPTS - 1
        if wrong is None and may_learn and predictor.teaches(split, measured) and predictor.learns(split, measured):
            explained = split, measured  # more is known now, which may change the answer
            continue
        remark = (
            predictor.far_off(split, measured) if wrong is None and not compiles and attempt < ATTEMPTS - 1 else None
        )
        if remark is not None:
            predictor.subject.say(f"{remark} Asking again with that")
            held, predictor.remark = (solution, measured), remark
            predictor.compare_compiled(split, measured)
            start_over()
            continue
        if wrong is None:
            return predictor.nearer(solution, measured, _trainer(predictor.subject), start_over)
        if held is not None:
            start_over()
            predictor.compiled_share, predictor.remark = 1.0, f"{predictor.remark} Fewer steps were tried, and {wrong}."
            predictor.forget()
            return held
        predictor.subject.say(f"{wrong}: learning from it")
        start_over()
        if compiles or predictor.is_rough:  # recordings are of what was written, and right about that
            predictor.compare_compiled(split, measured)
        elif predictor.learns(split, measured):
            explained = split, measured
        else:
            _learn(predictor, split[0], last=attempt >= 1)
    raise NotConfirmed(
        f"No plan could be confirmed in {ATTEMPTS} attempts: the last one {wrong}.",
        "What a window allocates seems to depend on chance or on the data.",
        "Plan with more headroom (--headroom 20%), or without verifying: --no-verify.",
    )


def _learn(predictor: MemoryPredictor, n: int, *, last: bool) -> None:
    """Records at the size that surprised; where that is a surprise too, or the second one, gives up on predicting."""
    evidence = predictor.evidence
    if evidence.fallback_reason is not None:  # it took more than its own recording: leave it out
        evidence.recordings = [r for r in evidence.recordings if r.micro_batch < n] or evidence.recordings[:1]
        evidence.notes = [note for note in evidence.notes if note.micro_batch < n] or evidence.notes[:1]
        predictor.forget()
        return
    known = [recording.micro_batch for recording in evidence.recordings]
    near = next((size for size in (schedule.prime_near(n), n) if size > known[-1]), None)
    if near is not None and not _recorded(predictor, near):
        evidence.fallback_reason = f"a recording at {near} samples, which should have fitted, did not"
    evidence.fallback_reason = evidence.fallback_reason or schedule.doubt_of_last(predictor.subject, evidence)
    if last and evidence.fallback_reason is None:
        evidence.fallback_reason = (
            "windows took another amount of memory than their recordings, so each size was tried by itself"
        )
    predictor.forget()
    if evidence.fallback_reason is not None:
        schedule.bracket(
            predictor.subject, evidence, lambda _, size: predictor.is_sure_to_fit(size), predictor.request.most
        )


def _recorded(predictor: MemoryPredictor, n: int) -> bool:
    """Records at n, where that is sure to fit by what is known; False where it ran out of memory for all that."""
    if not predictor.is_sure_to_fit(n):
        return True
    try:
        observe.add(predictor.subject, predictor.evidence, n)
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        predictor.subject.say(f"{n} samples are too many: {oom.drop_frames(error)}")
    else:
        return True
    oom.collect()
    return False


def _run_for_real(predictor: MemoryPredictor, split: Split) -> tuple[Any, str | None]:
    """Runs the first windows as the Runner would; what they took, or what went wrong where memory ran out."""
    subject = predictor.subject
    subject.say(f"verifying {len(split)} micro-batches of {split[0]}")
    return _unless_short(lambda: predictor.measure(_trainer(subject), split))


def _unless_short(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What work comes to, or what went wrong where memory ran out."""
    try:
        return work(), None
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        failure = oom.drop_frames(error)
    oom.collect()
    return None, f"ran out of memory ({failure})"


def try_short(predictor: MemoryPredictor, solution: Solution, start_over: Callable[[], None]) -> int | None:
    """The most rows of short samples, within the budget of tokens, that were run for real and hold; None for none.

    What grows with tokens, or faster with the length, is at its most with the longest samples, which the plan is made
    with; what grows with rows is at its most with the shortest. Both ends are run.
    """
    subject, samples, few = predictor.subject, predictor.request.samples, solution.split[0]
    work = subject.workload
    tokens = build_plan.token_budget(work, few)
    if tokens is None or work.lengths is None or samples is None or work.encode is not None:
        return None
    rows = most_rows(work.lengths, tokens, samples)
    while rows > few:
        subject.say(f"trying {rows} short samples")
        start_over()
        short = replace(work, sample=shortened(work.sample, max(1, tokens // rows)))
        train = _trainer(replace(subject, workload=short))
        measured, _ = _unless_short(lambda t=train, n=rows: predictor.measure(t, (n, n)))  # type: ignore[misc]
        if measured is not None and predictor.holds(measured):
            return rows
        rows = (rows + few) // 2
    return None


def time_smaller(
    predictor: MemoryPredictor,
    solution: Solution,
    measured: Any,
    planning_seconds: float,
    start_over: Callable[[], None],
) -> timing.Times:
    """Times the solution's micro-batch and smaller ones, for as long as is allowed."""
    split = solution.split
    seconds = predictor.verified_figures(measured, split).window_seconds if measured is not None else None
    return timing.time_sizes(
        predictor, split, seconds, timing.allowed_seconds(predictor.request, planning_seconds), start_over
    )


def fastest(
    predictor: MemoryPredictor, solution: Solution, measured: Any, timed: timing.Times, start_over: Callable[[], None]
) -> tuple[Solution, Any]:
    """The fewest steps of micro-batches no larger than the knee, verified."""
    found = knee(timed.sizes)
    if found is None and solution.split[0] > predictor.request.least:
        raise UsageError("The fastest micro-batch can't be found: no times.", f"They were {timed.why}.")
    if found is None or found.timed.micro_batch == solution.split[0]:
        return solution, measured
    start_over()
    smaller = replace(predictor, request=replace(predictor.request, most=found.timed.micro_batch))
    return solve_and_verify(smaller, start_over, verify=True, compiles=False)


def _trainer(subject: RecordingTarget) -> Callable[..., None]:
    """Trains one window of a split, as the Runner would."""

    def train(sizes: Split, on_phase: OnPhase | None = None) -> None:
        pieces = [subject.tile(size) for size in sizes]
        with compiled.as_trained(subject.context):
            step.train_window(subject.context, pieces, sizes, on_phase=on_phase)
            step.run_between(subject.context, on_phase=on_phase)

    return train


def _does_not_fit(predictor: MemoryPredictor) -> DoesNotFit:
    request = predictor.request
    samples = request.samples or request.least
    split = balanced(samples, samples // request.least)
    try:
        needed = predictor.needed_bytes(split)
    except LookupError:
        needed = None  # nothing was recorded that small
    return build_plan.does_not_fit(predictor, split, needed)
