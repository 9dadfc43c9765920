"""Which sizes to record, on the way to the answer.

Two small primes, then one or two nearer the answer, until the next was predicted. Where the sizes don't follow from
them, sizes are recorded one by one instead, from small to large, each only if what is known so far says that it fits
("bracketing").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..devices import oom
from ..simulation.saturation import may_saturate, predicts_large_blocks
from .observe import SCOUT, Evidence, RecordingTarget, add, if_it_fits, scout

SMALL_ANSWER = 24  # two small primes, and two sizes nearer the answer, are more samples than three times that
PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31)


class Guess(NamedTuple):
    """What would be chosen by what is known.

    Attributes:
        micro_batch: The largest micro-batch of the window.
        at_least: What that is where it takes one step more: less, where that can't be ruled out.
    """

    micro_batch: int
    at_least: int


def approach(
    subject: RecordingTarget,
    evidence: Evidence,
    answer: Callable[[Evidence], Guess],
    allowed: Callable[[Evidence, int], bool],
    least: int = 1,
    begin: int = SCOUT,
) -> None:
    """Records until the next recording was predicted, or until it is clear that none will be.

    Args:
        subject: What is recorded.
        evidence: What is known, to be added to.
        answer: What would be chosen by what is known; asked after each recording.
        allowed: Whether a window of two micro-batches of that size is sure to fit; asked before each recording.
        least: The smallest micro-batch allowed, recorded where nothing larger is sure to fit.
        begin: Samples in the micro-batches of the very first window; fewer where those don't fit.
    """
    scout(subject, evidence, min(least, begin), begin)
    primes = small_primes(subject.context.model)
    if evidence.scouted is not None and not allowed(evidence, primes[0]):
        _few_samples(subject, evidence, answer, allowed, primes[0] - 1, least)
        return
    add(subject, evidence, primes[0] if allowed(evidence, primes[0]) else least)
    if evidence.scouted is not None and not allowed(evidence, primes[1]):
        _few_samples(subject, evidence, answer, allowed, primes[1] - 1, least)
        return
    if evidence.recordings[0].micro_batch != primes[0] or not allowed(evidence, primes[1]):
        evidence.fallback_reason = (
            "the budget is too small to record at two primes, so each size was recorded by itself"
        )
        return
    add(subject, evidence, _second_size(subject, evidence, answer, allowed, primes[1]))
    for part in subject.device.policy.answer_fractions:
        guess = answer(evidence)
        is_last = part == subject.device.policy.answer_fractions[-1]
        n = _next_size(subject, evidence, guess.micro_batch, part, guess.at_least if is_last else guess.micro_batch)
        if n <= evidence.recordings[-1].micro_batch or not allowed(evidence, n):
            continue
        program = evidence.program()
        before = len(evidence.recordings)
        error = if_it_fits(subject, n, lambda n=n: add(subject, evidence, n))  # type: ignore[misc]
        if len(evidence.recordings) == before:
            evidence.fallback_reason = f"a recording at {n} samples, which should have fitted, did not"
            return
        last = next(recording for recording in evidence.recordings if recording.micro_batch == n)
        exact = subject.device.policy.agreement == 0  # then a peak may be right by chance: all that is large has to be
        sure = not exact or (predicts_large_blocks(program, last) and not may_saturate(evidence.program()))
        if error is not None and error <= subject.device.policy.agreement and sure:
            return
    evidence.fallback_reason = doubt_of_last(subject, evidence)


def small_primes(model: Any) -> tuple[int, int]:
    """Two primes that divide the number of elements of no parameter, where there are such, and that aren't large."""
    sizes = {p.numel() for p in model.parameters()}
    free = [prime for prime in PRIMES if not any(size % prime == 0 for size in sizes)]
    chosen = (free + [p for p in PRIMES if p not in free])[:2]
    return min(chosen), max(chosen)


def _few_samples(
    subject: RecordingTarget,
    evidence: Evidence,
    answer: Callable[[Evidence], Guess],
    allowed: Callable[[Evidence, int], bool],
    most: int,
    least: int,
) -> None:
    """Where the answer is a few samples: a size beside the first step's, and the answer's own if that may be had.

    These are no primes, or not large ones: what a size means is told by its being there at both.
    """
    if not evidence.recordings:
        worth = range(most, SCOUT + 1, -1)  # of three the first step's four samples, and six more, would be too many
        more = next((n for n in worth if allowed(evidence, n)), least)
        if more > least:
            if_it_fits(subject, more, lambda: add(subject, evidence, more) or 0)
    if not evidence.recordings:
        add(subject, evidence, least)
    if not evidence.has_program:
        evidence.fallback_reason = "the budget is too small to record at two sizes, so each was recorded by itself"
        return
    found = answer(evidence).micro_batch
    most_samples = subject.device.policy.max_samples_per_answer
    n = found if most_samples is None else min(found, (int(most_samples * found) - _samples(subject, evidence)) // 2)
    if n > evidence.recordings[-1].micro_batch and allowed(evidence, n):
        if_it_fits(subject, n, lambda: add(subject, evidence, n) or 0)


def _second_size(
    subject: RecordingTarget,
    evidence: Evidence,
    answer: Callable[[Evidence], Guess],
    allowed: Callable[[Evidence, int], bool],
    prime: int,
) -> int:
    """The second small prime; where the answer is small too, so that no third recording may be had, one near it."""
    most = subject.device.policy.max_samples_per_answer
    if most is None or allowed(evidence, SMALL_ANSWER):
        return prime
    sure = next(n for n in range(SMALL_ANSWER, 0, -1) if n <= prime or allowed(evidence, n))
    if evidence.has_program:
        sure = min(sure, max(answer(evidence).micro_batch, prime))  # what is asked for may be less than what fits
    left = int(most * sure) - _samples(subject, evidence)
    return max(prime, prime_near(min(int(subject.device.policy.answer_fractions[-1] * sure), left // 2)))


def _samples(subject: RecordingTarget, evidence: Evidence) -> int:
    """Samples that recording took so far."""
    assert evidence.first_step is not None
    scouted = evidence.first_step.micro_batch * subject.device.policy.first_step_micro_batches
    return scouted + sum(note.passes * note.micro_batch for note in evidence.notes)


def _next_size(subject: RecordingTarget, evidence: Evidence, answer: int, part: float, at_least: int) -> int:
    """A prime near a part of the answer; less, or 0, where recording may not take that many samples.

    Where the answer may turn out to be smaller, it may take no more than that allows.
    """
    most = subject.device.policy.max_samples_per_answer
    n = prime_near(int(part * answer))
    if most is None:
        return n
    left = int(most * at_least) - _samples(subject, evidence)
    later = sum(
        int(2 * other * answer) for other in subject.device.policy.answer_fractions if other > part
    )  # those tell more
    return min(n, prime_near((left - later) // 2)) if left > later else 0


def doubt_of_last(subject: RecordingTarget, evidence: Evidence) -> str | None:
    """Why there is no program, where it was too wrong about the last recording."""
    last, allowed = evidence.notes[-1], subject.device.policy.max_lift_error
    if allowed is None or last.predicted_bytes is None:
        return None
    if abs(last.predicted_bytes / last.measured_bytes - 1) <= allowed:
        return None
    before = " and ".join(str(note.micro_batch) for note in evidence.notes[-3:-1])
    return (
        f"sizes at {last.micro_batch} samples don't follow from those at {before} "
        f"(predicted {last.predicted_bytes:,} bytes, recorded {last.measured_bytes:,}), "
        "so each size was recorded by itself"
    )


def bracket(
    subject: RecordingTarget, evidence: Evidence, allowed: Callable[[Evidence, int], bool], most: int, rounds: int = 8
) -> None:
    """Records ever larger sizes, each where the last two say that it fits, until the next gains little."""
    for _ in range(rounds):
        largest = evidence.recordings[-1].micro_batch
        for n in (min(most, 2 * largest), min(most, int(1.4 * largest)), min(most, int(1.1 * largest) + 1)):
            if n > largest and allowed(evidence, n):
                break
        else:
            return
        try:
            add(subject, evidence, n)
        except (RuntimeError, MemoryError) as error:
            if not oom.is_out_of_memory(error):
                raise
            subject.say(f"{n} samples are too many: {oom.drop_frames(error)}")
            return


def prime_near(n: int) -> int:
    """The largest prime of at most n; 0 where there is none."""
    while n > 1 and any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n -= 1
    return n if n > 1 else 0
