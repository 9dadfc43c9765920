"""The answer by what is known, and its trial: solves, runs the answer's window for real, and learns where it surprised.

The last steps of `planning/fit.py` before the plan is put together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..data.sample_length import shortened
from ..data.tokens import most_rows
from ..devices import oom
from ..errors import DoesNotFit, NotConfirmed, UsageError
from ..phases import OnPhase
from ..simulation.knee import knee
from ..simulation.solver import Solution, Split, balanced, largest_micro_batch, smallest_steps
from ..window import compiled, step
from . import build_plan, evidence, schedule, timing
from .evidence import Subject
from .predictor import Outlook, verified_part

ATTEMPTS = 4
IN_DOUBT, OPEN_IN_DOUBT = 1.03, 1.1  # times the answer should fit too, or one step more may be needed in the end


def solve(outlook: Outlook) -> Solution | None:
    """The fewest steps that fit, or without a target the largest micro-batch; None where nothing fits."""
    wish, budget = outlook.wish, outlook.usable_bytes
    if wish.samples is not None:
        return smallest_steps(
            outlook.fits,
            outlook.floor,
            samples=wish.samples,
            budget_bytes=budget,
            least=wish.least,
            most=wish.most,
            later_floor=outlook.later_floor,
        )
    most = wish.most if outlook.observed.doubt is None else outlook.observed.recordings[-1].micro_batch
    size = largest_micro_batch(outlook.fits, outlook.floor, budget_bytes=budget, most=most, steps=1)
    return Solution((size,), 1) if size >= wish.least else None


def guess(outlook: Outlook) -> schedule.Guess:
    """What would be chosen now, and what if that should just not fit."""
    solution = solve(outlook)
    if solution is None:
        return schedule.Guess(0, 0)
    split, samples = solution.split, outlook.wish.samples
    doubt = OPEN_IN_DOUBT if outlook.is_open else IN_DOUBT
    larger = tuple(int(doubt * size) + 1 for size in split)
    if samples is None or split[0] <= outlook.wish.least or outlook.fits(larger):
        return schedule.Guess(split[0], split[0])
    return schedule.Guess(split[0], balanced(samples, len(split) + 1)[0])


def compile_at_answer(outlook: Outlook, start_over: Callable[[], None]) -> None:
    """Compiles at the sizes of the answer. What the compiler keeps is there in any process that trains compiled."""
    solution, subject, observed = solve(outlook), outlook.subject, outlook.observed
    if solution is None:
        return
    subject.say("compiling")
    before = subject.device.read_heap()
    _unless_short(lambda: _trainer(subject)(tuple(dict.fromkeys(verified_part(solution.split, compiles=True)))))
    start_over()
    after = subject.device.read_heap()
    if after is not None:
        grown = after.outside_bytes - before.outside_bytes
        observed.after_first = replace(
            observed.after_first, outside_bytes=observed.after_first.outside_bytes + max(0, grown)
        )


def solve_and_verify(
    outlook: Outlook, start_over: Callable[[], None], *, verify: bool, compiles: bool
) -> tuple[Solution, Any]:
    """Solves, runs the answer for real, and where that was another than predicted, learns and solves again."""
    wrong: str | None = None
    explained: tuple[Split, Any] = (), None  # micro-batches that were run for real, and what has been learnt from it
    held: tuple[Solution, Any] | None = None  # what fits for sure, though it was predicted to take something else
    for attempt in range(ATTEMPTS):
        solution = solve(outlook)
        if held is not None and (solution is None or len(solution.split) >= len(held[0].split)):
            return outlook.nearer(*held, _trainer(outlook.subject), start_over)
        if solution is None:
            raise _does_not_fit(outlook)
        if not verify:
            return solution, None
        split = verified_part(solution.split, compiles=compiles)
        if explained[0] == split and outlook.ran_as_chosen(solution.split, explained[1]):
            return outlook.nearer(solution, explained[1], _trainer(outlook.subject), start_over)
        if attempt:
            start_over()
        outlook.settle(solution.split, split)
        measured, wrong = _run_for_real(outlook, split)
        if measured is not None:
            wrong = outlook.confirms(split, measured)
        may_learn = not compiles and attempt < ATTEMPTS - 1
        if wrong is None and may_learn and outlook.teaches(split, measured) and outlook.learns(split, measured):
            explained = split, measured  # more is known now, which may change the answer
            continue
        remark = outlook.far_off(split, measured) if wrong is None and not compiles and attempt < ATTEMPTS - 1 else None
        if remark is not None:
            outlook.subject.say(f"{remark} Asking again with that")
            held, outlook.remark = (solution, measured), remark
            outlook.compare_compiled(split, measured)
            start_over()
            continue
        if wrong is None:
            return outlook.nearer(solution, measured, _trainer(outlook.subject), start_over)
        if held is not None:
            start_over()
            outlook.compiled_share, outlook.remark = 1.0, f"{outlook.remark} Fewer steps were tried, and {wrong}."
            outlook.forget()
            return held
        outlook.subject.say(f"{wrong}: learning from it")
        start_over()
        if compiles or outlook.is_rough:  # recordings are of what was written, and right about that
            outlook.compare_compiled(split, measured)
        elif outlook.learns(split, measured):
            explained = split, measured
        else:
            _learn(outlook, split[0], last=attempt >= 1)
    raise NotConfirmed(
        f"No plan could be confirmed in {ATTEMPTS} attempts: the last one {wrong}.",
        "What a window allocates seems to depend on chance or on the data.",
        "Plan with more headroom (--headroom 20%), or without verifying: --no-verify.",
    )


def _learn(outlook: Outlook, n: int, *, last: bool) -> None:
    """Records at the size that surprised; where that is a surprise too, or the second one, gives up on predicting."""
    observed = outlook.observed
    if observed.doubt is not None:  # it took more than its own recording: leave it out
        observed.recordings = [r for r in observed.recordings if r.micro_batch < n] or observed.recordings[:1]
        observed.notes = [note for note in observed.notes if note.micro_batch < n] or observed.notes[:1]
        outlook.forget()
        return
    known = [recording.micro_batch for recording in observed.recordings]
    near = next((size for size in (schedule.prime_near(n), n) if size > known[-1]), None)
    if near is not None and not _recorded(outlook, near):
        observed.doubt = f"a recording at {near} samples, which should have fitted, did not"
    observed.doubt = observed.doubt or schedule.doubt_of_last(outlook.subject, observed)
    if last and observed.doubt is None:
        observed.doubt = "windows took another amount of memory than their recordings, so each size was tried by itself"
    outlook.forget()
    if observed.doubt is not None:
        schedule.bracket(outlook.subject, observed, lambda _, size: outlook.is_sure_to_fit(size), outlook.wish.most)


def _recorded(outlook: Outlook, n: int) -> bool:
    """Records at n, where that is sure to fit by what is known; False where it ran out of memory for all that."""
    if not outlook.is_sure_to_fit(n):
        return True
    try:
        evidence.add(outlook.subject, outlook.observed, n)
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        outlook.subject.say(f"{n} samples are too many: {oom.drop_frames(error)}")
    else:
        return True
    oom.collect()
    return False


def _run_for_real(outlook: Outlook, split: Split) -> tuple[Any, str | None]:
    """Runs the first windows as the Runner would; what they took, or what went wrong where memory ran out."""
    subject = outlook.subject
    subject.say(f"verifying {len(split)} micro-batches of {split[0]}")
    return _unless_short(lambda: outlook.measure(_trainer(subject), split))


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


def try_short(outlook: Outlook, solution: Solution, start_over: Callable[[], None]) -> int | None:
    """The most rows of short samples, within the budget of tokens, that were run for real and hold; None for none.

    What grows with tokens, or faster with the length, is at its most with the longest samples, which the plan is made
    with; what grows with rows is at its most with the shortest. Both ends are run.
    """
    subject, samples, few = outlook.subject, outlook.wish.samples, solution.split[0]
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
        measured, _ = _unless_short(lambda t=train, n=rows: outlook.measure(t, (n, n)))  # type: ignore[misc]
        if measured is not None and outlook.holds(measured):
            return rows
        rows = (rows + few) // 2
    return None


def time_smaller(
    outlook: Outlook, solution: Solution, measured: Any, planning_seconds: float, start_over: Callable[[], None]
) -> timing.Times:
    """Times the solution's micro-batch and smaller ones, for as long as is allowed."""
    split = solution.split
    seconds = outlook.measured_fields(measured, split)["window_seconds"] if measured is not None else None
    return timing.time_sizes(
        outlook, split, seconds, timing.allowed_seconds(outlook.wish, planning_seconds), start_over
    )


def fastest(
    outlook: Outlook, solution: Solution, measured: Any, timed: timing.Times, start_over: Callable[[], None]
) -> tuple[Solution, Any]:
    """The fewest steps of micro-batches no larger than the knee, verified."""
    found = knee(timed.sizes)
    if found is None and solution.split[0] > outlook.wish.least:
        raise UsageError("The fastest micro-batch can't be found: no times.", f"They were {timed.why}.")
    if found is None or found.timed.micro_batch == solution.split[0]:
        return solution, measured
    start_over()
    smaller = replace(outlook, wish=replace(outlook.wish, most=found.timed.micro_batch))
    return solve_and_verify(smaller, start_over, verify=True, compiles=False)


def _trainer(subject: Subject) -> Callable[..., None]:
    """Trains one window of a split, as the Runner would."""

    def train(sizes: Split, on_phase: OnPhase | None = None) -> None:
        pieces = [subject.tile(size) for size in sizes]
        with compiled.as_trained(subject.parts):
            step.train_window(subject.parts, pieces, sizes, on_phase=on_phase)
            step.run_between(subject.parts, on_phase=on_phase)

    return train


def _does_not_fit(outlook: Outlook) -> DoesNotFit:
    wish = outlook.wish
    samples = wish.samples or wish.least
    split = balanced(samples, samples // wish.least)
    try:
        needed = outlook.needed_bytes(split)
    except LookupError:
        needed = None  # nothing was recorded that small
    return build_plan.does_not_fit(outlook, split, needed)
