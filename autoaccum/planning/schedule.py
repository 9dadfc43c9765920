"""Choose which sizes to record on the way to the answer.

Two small primes are recorded, then one or two sizes nearer to the answer, until the next one is predicted. Where sizes
do not follow from the recordings, they are recorded one by one instead, in ascending order, each only if it is
predicted to fit ("bracketing").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..devices import oom
from ..simulation.program import StepProgram
from ..simulation.saturation import may_saturate, predicts_large_blocks
from .evidence import Evidence
from .record import FIRST_STEP_SAMPLES, add_recording, record_first_step, unless_out_of_memory
from .target import RecordingTarget

SMALL_ANSWER = 24  # below it, two small primes and two nearer sizes are more than three times the answer's samples
PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31)
BRACKETING_ROUNDS = 8
MOST_RECORDINGS = 5  # with those near the answer
SURE_SIZE_TRIES = 4  # halvings, towards a size that may not fit
SMALL_ROUNDS = 3  # of recording around an answer below the small primes


class Guess(NamedTuple):
    """The solution by what is known so far.

    Attributes:
        micro_batch: The largest micro-batch of its window.
        at_least: The same if a step more is needed; equal where that is unlikely.
        is_below: Whether it is below all recordings since these don't fit.
    """

    micro_batch: int
    at_least: int
    is_below: bool = False


Answer = Callable[[Evidence], Guess]
Allowed = Callable[[Evidence, int], bool]


@dataclass(frozen=True)
class Recorder:
    """Record sizes until a recording is as predicted.

    Attributes:
        subject: What is recorded.
        evidence: What is known; recordings are added to it.
        answer: Returns the solution by what is known; called after each recording.
        allowed: Returns whether a window of two micro-batches of n samples is sure to fit.
        min_size: The smallest micro-batch allowed, recorded where no larger one is sure to fit.
    """

    subject: RecordingTarget
    evidence: Evidence
    answer: Answer
    allowed: Allowed
    min_size: int

    def run(self) -> None:
        """Record after the first step."""
        evidence = self.evidence
        first, second = small_primes(self.subject.context.model)
        has_small_recording = evidence.small_recording is not None
        if has_small_recording and not self.allowed(evidence, first):
            self._record_few_samples(first - 1)
            return
        add_recording(self.subject, evidence, first if self.allowed(evidence, first) else self.min_size)
        if has_small_recording and not self.allowed(evidence, second):
            self._record_few_samples(second - 1)
            return
        if evidence.recordings[0].micro_batch != first or not self.allowed(evidence, second):
            evidence.fall_back("the budget is too small to record at two primes, so each size was recorded separately")
            return
        add_recording(self.subject, evidence, self._second_size(second))
        self._record_near_answer()

    def _record_near_answer(self) -> None:
        """Record nearer to the answer until a recording is as predicted."""
        evidence, policy = self.evidence, self.subject.device.policy
        if self._record_around_small_answer():
            return
        fractions, last = list(policy.answer_fractions), policy.answer_fractions[-1]
        while fractions:
            fraction, guess = fractions.pop(0), self.answer(evidence)
            nearest = guess.at_least if fraction == last else guess.micro_batch
            wanted = self._next_size(guess.micro_batch, fraction, nearest)
            n = self._sure_size(wanted)
            if n <= evidence.recordings[-1].micro_batch:
                continue
            if n < wanted and len(evidence.recordings) < MOST_RECORDINGS:
                fractions = fractions or [last]  # what it shows may make a nearer one sure to fit
            program, before = evidence.program(), len(evidence.recordings)
            error = self._add_unless_out_of_memory(n)
            if len(evidence.recordings) == before:
                evidence.fall_back(f"a recording at {n} samples, which should have fitted, did not")
                return
            if error is not None and error <= policy.agreement and self._confirms(program, n):
                return
        reason = reason_against_program(self.subject, evidence)
        if reason is not None:
            evidence.fall_back(reason)

    def _sure_size(self, wanted: int) -> int:
        """Return the size or a smaller prime that surely fits; or 0."""
        low, high = self.evidence.recordings[-1].micro_batch, wanted
        if wanted <= low or self.allowed(self.evidence, wanted):
            return wanted
        found = 0
        for _ in range(SURE_SIZE_TRIES):
            middle = prime_near((low + high) // 2)
            if middle <= low:
                break
            if self.allowed(self.evidence, middle):
                found = low = middle
            else:
                high = middle
        return found

    def _record_around_small_answer(self) -> bool:
        """Record around an answer below all recordings; return whether it is.

        That is where a device that has any amount of memory stands in for one: elsewhere, what was recorded fits.
        """
        evidence, smallest = self.evidence, self.evidence.recordings[0].micro_batch
        for _ in range(SMALL_ROUNDS):
            guess = self.answer(evidence)
            n = max(guess.micro_batch, self.min_size)
            if not guess.is_below or n >= smallest:
                return False
            sizes = sizes_around(evidence, n, self.min_size)
            if not sizes or not self.allowed(evidence, sizes[-1]):
                break
            for size in sizes:
                add_recording(self.subject, evidence, size)
        return True

    def _confirms(self, program: StepProgram, n: int) -> bool:
        """Return whether the recording at n confirms the program beyond its peak.

        Where a peak has to agree exactly it may do so by chance, so all large blocks have to be as predicted.
        """
        if self.subject.device.policy.agreement > 0:
            return True
        recording = next(each for each in self.evidence.recordings if each.micro_batch == n)
        return predicts_large_blocks(program, recording) and not may_saturate(self.evidence.program())

    def _record_few_samples(self, most: int) -> None:
        """Record where the answer is a few samples.

        These sizes are small or not prime: that a block depends on the batch shows in its size at both.
        """
        evidence = self.evidence
        if not evidence.recordings:
            # At three, the first step's four samples and six more would be too many.
            sizes = range(most, FIRST_STEP_SAMPLES + 1, -1)
            n = next((n for n in sizes if self.allowed(evidence, n)), self.min_size)
            if n > self.min_size:
                self._add_unless_out_of_memory(n)
        if not evidence.recordings:
            add_recording(self.subject, evidence, self.min_size)
        if not evidence.has_program:
            evidence.fall_back("the budget is too small to record at two sizes, so each was recorded separately")
            return
        n, limit = self.answer(evidence).micro_batch, self.subject.device.policy.max_samples_per_answer
        if limit is not None:
            n = min(n, (int(limit * n) - self._samples_used()) // 2)
        if n > evidence.recordings[-1].micro_batch and self.allowed(evidence, n):
            self._add_unless_out_of_memory(n)

    def _second_size(self, prime: int) -> int:
        """Return the second prime, near the answer where that is small."""
        evidence, policy = self.evidence, self.subject.device.policy
        limit = policy.max_samples_per_answer
        if limit is None or self.allowed(evidence, SMALL_ANSWER):
            return prime
        largest = next(n for n in range(SMALL_ANSWER, 0, -1) if n <= prime or self.allowed(evidence, n))
        if evidence.has_program:
            largest = min(largest, max(self.answer(evidence).micro_batch, prime))  # the target may need less
        left = int(limit * largest) - self._samples_used()
        return max(prime, prime_near(min(int(policy.answer_fractions[-1] * largest), left // 2)))

    def _next_size(self, answer: int, fraction: float, at_least: int) -> int:
        """Return a prime near a fraction of the answer.

        It is smaller, or 0, where recording may not use that many samples. Where the answer may turn out to be
        `at_least`, the limit is that of the smaller answer.
        """
        policy = self.subject.device.policy
        n = prime_near(int(fraction * answer))
        if policy.max_samples_per_answer is None:
            return n
        left = int(policy.max_samples_per_answer * at_least) - self._samples_used()
        # Later recordings, nearer to the answer, show more: their samples are set aside.
        later = sum(int(2 * other * answer) for other in policy.answer_fractions if other > fraction)
        return min(n, prime_near((left - later) // 2)) if left > later else 0

    def _samples_used(self) -> int:
        """Return the samples that recording has used so far."""
        assert self.evidence.first_step is not None
        first = self.evidence.first_step.micro_batch * self.subject.device.policy.first_step_micro_batches
        return first + sum(note.passes * note.micro_batch for note in self.evidence.notes)

    def _add_unless_out_of_memory(self, n: int) -> float | None:
        """Record at n samples where memory allows."""
        return unless_out_of_memory(self.subject, n, lambda: add_recording(self.subject, self.evidence, n))


def record_towards_answer(
    subject: RecordingTarget,
    evidence: Evidence,
    answer: Answer,
    allowed: Allowed,
    min_size: int = 1,
    begin: int = FIRST_STEP_SAMPLES,
) -> None:
    """Record until a recording is as predicted, or none can be.

    Args:
        subject: What is recorded.
        evidence: What is known; recordings are added to it.
        answer: Returns the solution by what is known; called after each recording.
        allowed: Returns whether a window of two micro-batches of n samples is sure to fit; called before each one.
        min_size: The smallest micro-batch allowed, recorded where no larger one is sure to fit.
        begin: Samples in the micro-batches of the first window; fewer where those do not fit.
    """
    record_first_step(subject, evidence, min(min_size, begin), begin)
    Recorder(subject, evidence, answer, allowed, min_size).run()


def small_primes(model: Any) -> tuple[int, int]:
    """Return two small primes that divide no parameter's element count."""
    sizes = {p.numel() for p in model.parameters()}
    free = [prime for prime in PRIMES if not any(size % prime == 0 for size in sizes)]
    chosen = (free + [p for p in PRIMES if p not in free])[:2]
    return min(chosen), max(chosen)


def reason_against_program(subject: RecordingTarget, evidence: Evidence) -> str | None:
    """Return why the last recording speaks against predicting sizes, or None."""
    last, max_error = evidence.notes[-1], subject.device.policy.max_lift_error
    if max_error is None or last.predicted_bytes is None:
        return None
    if abs(last.predicted_bytes / last.measured_bytes - 1) <= max_error:
        return None
    before = " and ".join(str(note.micro_batch) for note in evidence.notes[-3:-1])
    return (
        f"sizes at {last.micro_batch} samples don't follow from those at {before} "
        f"(predicted {last.predicted_bytes:,} bytes, recorded {last.measured_bytes:,}), "
        "so each size was recorded separately"
    )


def bracket(
    subject: RecordingTarget, evidence: Evidence, allowed: Allowed, predictor: Callable[[Evidence], Any], max_size: int
) -> None:
    """Record ever larger sizes that are predicted to fit; then those between.

    Args:
        subject: What is recorded.
        evidence: What is known; recordings are added to it.
        allowed: Returns whether a window of two micro-batches of n samples is sure to fit.
        predictor: Returns the predictor by what is known.
        max_size: The largest micro-batch allowed.
    """
    _record_larger(subject, evidence, allowed, max_size)
    narrow(subject, evidence, predictor)


def narrow(
    subject: RecordingTarget, evidence: Evidence, predictor: Callable[[Evidence], Any], too_large: int | None = None
) -> None:
    """Record between the largest size that fits and the smallest that doesn't.

    A size that wasn't recorded counts as the next larger one that was: of a model whose sizes follow no rule from 17
    samples on, recorded at 11 and at 1,021, windows of 12 would else need what those of 1,021 do.

    Args:
        subject: What is recorded.
        evidence: What is known; recordings are added to it.
        predictor: Returns the predictor by what is known.
        too_large: A size whose window was run and was too large.
    """
    for _ in range(BRACKETING_ROUNDS):
        now, sizes = predictor(evidence), [each.micro_batch for each in evidence.recordings]
        fitting = max((n for n in sizes if now.fits((n, n))), default=0)
        larger = [n for n in (*sizes, too_large) if n is not None and n > fitting]
        if not larger or not fitting or min(larger) - fitting <= max(1, fitting // 10):
            return
        n = (fitting + min(larger)) // 2
        if unless_out_of_memory(subject, n, lambda n=n: [add_recording(subject, evidence, n)]) is None:  # type: ignore[misc]
            too_large = n


def _record_larger(subject: RecordingTarget, evidence: Evidence, allowed: Allowed, max_size: int) -> None:
    for _ in range(BRACKETING_ROUNDS):
        largest = evidence.recordings[-1].micro_batch
        sizes = (min(max_size, 2 * largest), min(max_size, int(1.4 * largest)), min(max_size, int(1.1 * largest) + 1))
        n = next((size for size in sizes if size > largest and allowed(evidence, size)), None)
        if n is None:
            return
        try:
            add_recording(subject, evidence, n)
        except (RuntimeError, MemoryError) as error:
            if not oom.is_out_of_memory(error):
                raise
            subject.progress(f"{n} samples are too many: {oom.drop_frames(error)}")
            return


def sizes_around(evidence: Evidence, n: int, least: int) -> list[int]:
    """Return a small answer and one sample more, unless they are recorded."""
    known = {each.micro_batch for each in evidence.small_recordings}
    smallest = evidence.recordings[0].micro_batch
    return [size for size in (n, n + 1) if least <= size < smallest and size not in known]


def prime_near(n: int) -> int:
    """Return the largest prime of at most n, or 0."""
    while n > 1 and any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n -= 1
    return n if n > 1 else 0
