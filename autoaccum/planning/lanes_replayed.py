"""Predict windows in lanes on a GPU, by recording short ones.

Windows of five, four and two lanes are recorded at two small primes, then one nearer the answer. From them follow the
allocations of any split (simulation/lane_program.py), which are replayed by the allocator's rules like those of
micro-batches one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..devices.cuda.device import CudaMeasurement
from ..errors import DoesNotFit
from ..phases import FIRST
from ..simulation.cuda_allocator.snapshot import EMPTY
from ..simulation.lane_program import LaneProgram, compose, lift_lanes
from ..simulation.lane_windows import LaneWindow, NotRegular
from ..simulation.program import as_recorded
from ..simulation.recording import Recording, kept_blocks, live_peak
from ..simulation.solver import Split
from ..simulation.training_run import TrainingReplay, replay_training, training_of
from ..units import show_bytes
from ..window.lanes.host_buffers import buffer_bytes
from ..window.lanes.host_store import THRESHOLD_BYTES
from .lane_recording import record_lanes
from .predictor import AGREEMENT_FRACTION
from .predictor_cuda import NEW_PROCESS, THIS_PROCESS, CudaPredictor
from .record import restore_state
from .schedule import prime_near, small_primes
from .trial import unless_out_of_memory

MANY, FEW = 5, 4  # lanes of the recorded windows: the first, one or two between, and the last two
TWO = 2  # recorded, too: there the first lane is the last but one
NEAR_FRACTION = 0.7  # of the answer's micro-batch: where the third window is recorded
WINDOWS = 4  # that are replayed: the first two may release the cache
ATTEMPTS = 3


@dataclass
class LanePredictor:
    """Predict windows in lanes from recorded ones.

    Attributes:
        plain: What is known of micro-batches one after the other, and the budget.
        start_over: Puts back what training changed.
        windows: What was recorded.
        programs: What was lifted from these: of two lanes, and of more.
    """

    plain: CudaPredictor
    start_over: Callable[[], None]
    windows: list[LaneWindow] = field(default_factory=list)
    programs: dict[bool, LaneProgram] = field(default_factory=dict)
    _composed: dict[Split, Recording] = field(default_factory=dict)
    _replays: dict[tuple[Split, str, int | None], TrainingReplay] = field(default_factory=dict)

    # Recording

    def record(self, micro_batch: int) -> None:
        """Record at two primes what lanes of about so many samples do.

        What moves to the host is settled first, in bytes for each sample, so that short lanes move what long ones will.

        Raises:
            NotRegular: The windows are not one program, or don't fit.
        """
        self.windows, self.programs = [], {}
        context = self.plain.subject.context
        context.moved_bytes_per_sample = max(1, THRESHOLD_BYTES // micro_batch)
        first, second = small_primes(context.model)
        for n, lanes in ((first, MANY), (first, FEW), (first, TWO), (second, FEW), (second, TWO)):
            self._record(n, lanes)
        self._lift()

    def record_near(self, split: Split) -> None:
        """Record nearer to the answer, where that shows more.

        Raises:
            NotRegular: Larger windows are another program.
        """
        n = prime_near(int(NEAR_FRACTION * split[0]))
        if n > self.largest and self.peak_bytes((n,) * like(split), THIS_PROCESS) <= self.plain.usable_bytes:
            self.add(n, like(split))

    @property
    def largest(self) -> int:
        """The largest micro-batch that was recorded."""
        return max(window.micro_batch for window in self.windows)

    def add(self, n: int, lanes: int) -> None:
        """Record a window, and lift all.

        Raises:
            NotRegular: It is another program than the others.
        """
        self._record(n, lanes)
        self._lift()

    def _lift(self) -> None:
        for of_two in (False, True):
            self.programs[of_two] = lift_lanes([each for each in self.windows if (each.lanes == TWO) == of_two])
        self._composed.clear()
        self._replays.clear()

    def _record(self, n: int, lanes: int) -> None:
        plain = self.plain
        self.start_over()
        restore_state(plain.subject, plain.evidence)
        found, failure = unless_out_of_memory(lambda: record_lanes(plain.subject, n, lanes))
        if found is None:
            raise NotRegular(f"a window of {lanes} lanes of {n} {failure}")
        self.windows.append(found)

    # Predicting

    def composed(self, split: Split) -> Recording:
        """Return a split's window."""
        if split not in self._composed:
            self._composed[split] = compose(self.programs[len(split) == TWO], split)
        return self._composed[split]

    def replayed(self, split: Split, history: str, capacity_bytes: int | None) -> TrainingReplay:
        """Replay a split's first windows in a new process, or in this."""
        key = split, history, capacity_bytes
        if key not in self._replays:
            plain = self.plain
            assert plain.evidence.first_step is not None
            program = as_recorded(self.composed(split), plain.evidence.first_step_events)
            self._replays[key] = replay_training(
                training_of(program, plain.evidence.first_step, plain.model_events),
                split[:1],
                plain.rules.with_capacity(capacity_bytes),
                start=plain.start if history == THIS_PROCESS else EMPTY,
                windows=WINDOWS,
            )
        return self._replays[key]

    def floor_bytes(self, split: Split) -> int:
        """Return the bytes that are alive at the window's peak."""
        evidence = self.plain.evidence
        held = sum(event.bytes for event in kept_blocks(self.plain.model_events)) + evidence.state_bytes
        return held + live_peak(self.composed(split).phases[:1])

    def fits(self, split: Split) -> bool:
        """Return whether it fits the budget and its margin, without lasting retries."""
        plain = self.plain
        for history in plain.request.histories:
            tight = self.replayed(split, history, plain.usable_bytes)
            if not tight.fits or (any(tight.retries) and not self.replayed(split, history, plain.budget.bytes).fits):
                return False
        return True

    def within(self, split: Split, history: str) -> TrainingReplay:
        """Return the replay within the budget, or without a limit below it."""
        unlimited = self.replayed(split, history, None)
        budget = self.plain.budget.bytes
        return unlimited if unlimited.peak_reserved_bytes <= budget else self.replayed(split, history, budget)

    def peak_bytes(self, split: Split, history: str) -> int:
        """Return the most that is reserved."""
        return self.within(split, history).peak_reserved_bytes

    def worst_bytes(self, split: Split) -> int:
        """Return the highest peak among the histories that the plan is for."""
        return max(self.peak_bytes(split, history) for history in self.plain.request.histories)

    def host_bytes(self, split: Split) -> int:
        """Return the buffers that hold what the window moves to the host."""
        return buffer_bytes(self.programs[len(split) == TWO].moved_sizes(split))

    def contradiction(self, split: Split, measured: CudaMeasurement) -> str | None:
        """Return how a measurement contradicts the prediction, or None."""
        expected = self.replayed(split, THIS_PROCESS, self.plain.budget.bytes)
        retries, predicted = expected.retries[: len(measured.retries)], expected.peak_reserved_bytes
        if measured.retries != retries:
            return f"released its cache {measured.retries} times in its windows, not {retries}"
        if abs(measured.peak_bytes - predicted) > AGREEMENT_FRACTION * predicted:
            return f"reserved {measured.peak_bytes:,} bytes, not {predicted:,}"
        return None

    @property
    def words(self) -> str:
        """What the prediction rests on."""
        recorded = ", ".join(f"{each.lanes} lanes of {each.micro_batch}" for each in self.windows)
        return f"a program of one lane and of what all share, lifted from windows of {recorded} samples"


def like(split: Split) -> int:
    """Return the lanes of a short window that is like a split's."""
    return TWO if len(split) == TWO else FEW


def fewest_lanes(predictor: LanePredictor, splits: list[Split]) -> Split | None:
    """Return the first split that fits; None where none does.

    By bisection: more lanes need less. Near the capacity that isn't monotone; the split that is found fits, and the one
    before it doesn't.

    Args:
        predictor: Predicts them.
        splits: By ascending number of lanes.
    """
    usable = predictor.plain.usable_bytes
    low = _first(splits, 0, lambda split: predictor.floor_bytes(split) <= usable)
    if low == len(splits):
        return None
    step, high = 1, low
    while high < len(splits) and not predictor.fits(splits[high]):
        low, high, step = high + 1, high + step, 2 * step
        if low < len(splits) <= high:
            high = len(splits) - 1
    found = _first(splits, low, predictor.fits, min(high + 1, len(splits)))
    return splits[found] if found < len(splits) and predictor.fits(splits[found]) else None


def _first(splits: list[Split], low: int, holds: Callable[[Split], bool], high: int | None = None) -> int:
    """Return the index of the first split that satisfies a condition."""
    high = len(splits) if high is None else high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(splits[middle]) else (middle + 1, high)
    return low


def solve_by_replay(
    predictor: LanePredictor, splits: list[Split], micro_batch: int, *, verify: bool, host_limit_bytes: int | None
) -> tuple[Split, Any]:
    """Find the fewest lanes that fit, and run their window.

    Args:
        predictor: Without recordings.
        splits: What may be planned, fewest lanes first; two lanes at least.
        micro_batch: The answer, roughly.
        verify: Whether to run it.
        host_limit_bytes: What may be moved to the host; None for no limit.

    Returns:
        The split, and what was measured; None where nothing was run.

    Raises:
        NotRegular: The windows can't be lifted, or what was run isn't as predicted.
        DoesNotFit: No number of lanes fits the device, or what they move doesn't fit the host.
    """
    predictor.record(micro_batch)
    split = _solved(predictor, splits, host_limit_bytes)
    if not micro_batch / 2 <= split[0] <= 2 * micro_batch:  # what moves was settled for other sizes
        predictor.record(split[0])
        split = _solved(predictor, splits, host_limit_bytes)
    predictor.record_near(split)
    failure = ""
    for _ in range(ATTEMPTS):
        split = _solved(predictor, splits, host_limit_bytes)
        if not verify:
            return split, None
        measured, failure = _measured(predictor, split)
        if measured is not None and not failure:
            return split, measured
        if split[0] <= predictor.largest:
            break
        predictor.plain.subject.progress(f"a window of {len(split)} lanes {failure}: recording it")
        predictor.add(split[0], like(split))
    raise NotRegular(f"a window of {len(split)} lanes of {split[0]} {failure}")


def _measured(predictor: LanePredictor, split: Split) -> tuple[CudaMeasurement | None, str]:
    """Run a split's first windows.

    Returns:
        What was measured, and how it contradicts the prediction.
    """
    plain = predictor.plain
    subject = plain.subject
    predictor.start_over()
    subject.progress(f"verifying {len(split)} lanes of {split[0]}")
    measured, failure = unless_out_of_memory(lambda: plain.device.measure(subject.train, [split] * 3))
    if measured is None:
        return None, failure or ""
    return measured, predictor.contradiction(split, measured) or ""


def _solved(predictor: LanePredictor, splits: list[Split], host_limit_bytes: int | None) -> Split:
    split = fewest_lanes(predictor, splits)
    budget = predictor.plain.budget
    if split is None:
        needed = predictor.worst_bytes(splits[-1])
        raise DoesNotFit(
            f"Not even {len(splits[-1])} lanes of {splits[-1][0]} fit: their window needs {show_bytes(needed)}; the "
            f"budget is {show_bytes(budget.bytes)}.",
            "At each normalization its input is on the device for all lanes.",
            "What would help: a larger budget, a smaller target, or batchnorm='frozen', which is exact, too.",
            missing_bytes=max(1, needed - predictor.plain.usable_bytes),
        )
    host_bytes = predictor.host_bytes(split)
    if host_limit_bytes is not None and host_bytes > host_limit_bytes:
        raise DoesNotFit(
            f"What a window in lanes saves for its backward needs more than {show_bytes(host_limit_bytes)} on the "
            f"host: {show_bytes(host_bytes)}.",
            "Saved tensors wait on the host; smaller micro-batches don't change their sum.",
            "Give it more (host_memory=, --host-memory), lower the target, or use batchnorm='frozen', which is exact, "
            "too, and saves nothing there.",
            missing_bytes=host_bytes - host_limit_bytes,
        )
    return split


def phases_of(predictor: LanePredictor, split: Split) -> dict[str, int]:
    """Return the peak of each phase in a new process."""
    found = predictor.within(split, NEW_PROCESS).phases
    return {name: size for name, size in found.items() if name != "build"} or {FIRST: 0}
