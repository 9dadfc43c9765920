"""Predict windows in lanes on a GPU, by recording short ones.

Windows of seven and five lanes are recorded at two small primes, and those of two, three and four lanes where they may
be the answer: they are programs of their own. From them follow the allocations of any split
(simulation/lane_program.py), which are replayed by the allocator's rules like those of micro-batches one after the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..devices.cuda.device import CudaMeasurement
from ..phases import FIRST
from ..simulation.cuda_allocator.snapshot import EMPTY
from ..simulation.lane_composing import compose
from ..simulation.lane_program import SHORT, LaneProgram, lift_lanes
from ..simulation.lane_windows import LaneWindow, NotRegular
from ..simulation.program import as_recorded
from ..simulation.recording import Recording, kept_blocks, live_peak
from ..simulation.solver import Split
from ..simulation.training_run import TrainingReplay, replay_training, training_of
from ..window.lanes.host_buffers import buffer_bytes
from .cuda_learning import disagreement
from .lane_recording import record_lanes
from .predictor_cuda import NEW_PROCESS, THIS_PROCESS, CudaPredictor
from .record import restore_state
from .schedule import prime_near, small_primes
from .trial import unless_out_of_memory

MANY, FEW = 7, 5  # lanes of the recorded windows: the first two, one or three between, and the last two
NEAR_FRACTION = 0.7  # of the answer's micro-batch: where the third window is recorded
WINDOWS = 4  # that are replayed: the first two may release the cache


@dataclass
class LanePredictor:
    """Predict windows in lanes from recorded ones.

    Attributes:
        plain: What is known of micro-batches one after the other, and the budget.
        start_over: Puts back what training changed.
        bytes_per_sample: What moves to the host: saved tensors of at least so many bytes for each sample of their lane,
            so that short lanes move what long ones will.
        parts: Of how many parts of each lane; None for all.
        recomputes: Whether the backward computes again what follows by cheap operations from what is kept.
        host_limit_bytes: What may be moved there; None for no limit.
        windows: What was recorded.
        programs: What was lifted, by number of lanes up to `SHORT`; one for all that have more.
    """

    plain: CudaPredictor
    start_over: Callable[[], None]
    bytes_per_sample: int
    parts: int | None = None
    recomputes: bool = False
    host_limit_bytes: int | None = None
    windows: list[LaneWindow] = field(default_factory=list)
    programs: dict[int, LaneProgram] = field(default_factory=dict)
    _composed: tuple[Split, Recording] | None = None  # the last one: a long window's is large
    _replays: dict[tuple[Split, str, int | None], TrainingReplay] = field(default_factory=dict)

    def moving(
        self, bytes_per_sample: int, parts: int | None = None, *, recomputes: bool | None = None
    ) -> LanePredictor:
        """Return a predictor of windows that move something else."""
        recomputes = self.recomputes if recomputes is None else recomputes
        return LanePredictor(self.plain, self.start_over, bytes_per_sample, parts, recomputes, self.host_limit_bytes)

    # Recording

    def settle(self) -> None:
        """Let windows move what this predictor is for."""
        context = self.plain.subject.context
        context.moved_bytes_per_sample, context.moved_parts = self.bytes_per_sample, self.parts
        context.recomputes = self.recomputes

    def record_near(self, split: Split) -> None:
        """Record nearer to the answer, where that shows more.

        Raises:
            NotRegular: Larger windows are another program.
        """
        near = (prime_near(int(NEAR_FRACTION * split[0])),) * min(len(split), FEW)
        if near[0] <= self.largest(split) or not self.host_holds(near):
            return
        if self.peak_bytes(near, THIS_PROCESS) <= self.plain.usable_bytes:
            self.add(near[0], len(near))

    def largest(self, split: Split) -> int:
        """Return the largest micro-batch that was recorded in windows like a split's."""
        return self.last_recorded(split).micro_batch

    def last_recorded(self, split: Split) -> LaneWindow:
        """Return the largest recorded window of those like a split's."""
        return max(self._recorded(_kind(len(split))), key=lambda window: window.micro_batch)

    def record_like(self, window: LaneWindow) -> LaneWindow:
        """Record a window of the same size that moves something else.

        Raises:
            NotRegular: It doesn't fit.
        """
        self._record(window.micro_batch, window.lanes)
        return self.windows[-1]

    def add(self, n: int, lanes: int) -> None:
        """Record a window, and lift all that are like it.

        Raises:
            NotRegular: It is another program than the others.
        """
        self._record(n, lanes)
        self._lift(_kind(lanes))

    def program_of(self, lanes: int) -> LaneProgram:
        """Return the program of windows of so many lanes.

        It is recorded when it is first asked for: then such a window may be the answer.

        Raises:
            NotRegular: Such windows are not one program, or don't fit.
        """
        kind = _kind(lanes)
        if kind not in self.programs:
            first, second = small_primes(self.plain.subject.context.model)
            counts = (lanes,) if lanes <= SHORT else (MANY, FEW)
            for n, count in (*((first, count) for count in counts), (second, counts[-1])):
                self._record(n, count)
            self._lift(kind)
        return self.programs[kind]

    def _recorded(self, kind: int) -> Iterator[LaneWindow]:
        return (window for window in self.windows if _kind(window.lanes) == kind)

    def _lift(self, kind: int) -> None:
        self.programs[kind] = lift_lanes(list(self._recorded(kind)))
        self._composed = None
        self._replays.clear()

    def _record(self, n: int, lanes: int) -> None:
        plain = self.plain
        self.start_over()
        self.settle()
        restore_state(plain.subject, plain.evidence)
        found, failure = unless_out_of_memory(lambda: record_lanes(plain.subject, n, lanes))
        if found is None:
            raise NotRegular(f"a window of {lanes} lanes of {n} {failure}")
        self.windows.append(found)

    # Predicting

    def composed(self, split: Split) -> Recording:
        """Return a split's window."""
        program = self.program_of(len(split))
        if self._composed is None or self._composed[0] != split:
            self._composed = split, compose(program, split)
        return self._composed[1]

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

    @property
    def held_bytes(self) -> int:
        """Bytes of the model and the optimizer's state."""
        return sum(event.bytes for event in kept_blocks(self.plain.model_events)) + self.plain.evidence.state_bytes

    def live_bytes(self, split: Split) -> int:
        """Return the bytes that are alive at the window's peak."""
        return self.held_bytes + live_peak(self.composed(split).phases[:1])

    def fits(self, split: Split, *, with_retries: bool = True) -> bool:
        """Return whether it fits the budget and its margin, without lasting retries.

        Args:
            split: Samples in each lane.
            with_retries: Whether the first windows may release the cache.
        """
        plain = self.plain
        if self.live_bytes(split) > plain.usable_bytes:
            return False
        for history in plain.request.histories:
            tight = self.replayed(split, history, plain.usable_bytes)
            if not tight.fits:
                return False
            if any(tight.retries) and not (with_retries and self.replayed(split, history, plain.budget.bytes).fits):
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

    def needed_bytes(self, split: Split) -> int:
        """Return the most that would be reserved if there were more."""
        return max(self.replayed(split, history, None).peak_reserved_bytes for history in self.plain.request.histories)

    def worst_bytes(self, split: Split) -> int:
        """Return the highest peak among the histories that the plan is for."""
        return max(self.peak_bytes(split, history) for history in self.plain.request.histories)

    def phases(self, split: Split) -> dict[str, int]:
        """Return the peak of each phase in a new process."""
        found = self.within(split, NEW_PROCESS).phases
        return {name: size for name, size in found.items() if name != "build"} or {FIRST: 0}

    def moved_sizes(self, split: Split) -> list[int]:
        """Return the bytes of each tensor that a window moves."""
        return list(self.program_of(len(split)).moved_sizes(split))

    def recomputed_bytes(self, split: Split) -> int:
        """Return what the window computes again: in proportion to its samples."""
        window = self.last_recorded(split)
        return window.recomputed_bytes * sum(split) // window.samples

    def host_bytes(self, split: Split) -> int:
        """Return the buffers that hold what the window moves to the host."""
        return buffer_bytes(self.moved_sizes(split))

    def host_holds(self, split: Split) -> bool:
        """Return whether the host may hold what a window moves."""
        return self.host_limit_bytes is None or self.host_bytes(split) <= self.host_limit_bytes

    def contradiction(self, split: Split, measured: CudaMeasurement) -> str | None:
        """Return how a measurement contradicts the prediction, or None."""
        return disagreement(self.replayed(split, THIS_PROCESS, self.plain.budget.bytes), measured)

    @property
    def words(self) -> str:
        """What the prediction rests on."""
        recorded = ", ".join(f"{each.lanes} lanes of {each.micro_batch}" for each in self.windows)
        return f"a program of one lane and of what all share, lifted from windows of {recorded} samples"


def _kind(lanes: int) -> int:
    """Return which program a window follows; each short one its own."""
    return min(lanes, SHORT + 1)
