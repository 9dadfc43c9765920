"""What planning knows of a workload's memory: its recordings, and what any window would come to by them.

Which sizes are recorded is the matter of `planning/schedule.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..data import split as cutting
from ..devices import oom
from ..devices.base import CACHING_ALLOCATOR, Device
from ..phases import OPTIMIZER, OnPhase
from ..plan import RecordingNote
from ..process_memory import PAGE_BYTES, Heap
from ..simulation.from_verification import without_state
from ..simulation.malloc import HeapState, Replay
from ..simulation.program import StepProgram, as_recorded, lift, plain_window, window_growth
from ..simulation.recording import Event, Phase, Recording, kept_blocks, live_peak
from ..simulation.solver import Split
from ..window import step
from ..window.compiled import uncompiled
from ..workload import Batch, Workload
from .growth import Growth, probe

SCOUT = 2  # samples of the very first window; batch statistics need two
PRELUDE = "first step"
Found = TypeVar("Found")


@dataclass(frozen=True)
class RecordingTarget:
    """What is observed: a workload, its parts, and the device that records and replays."""

    context: step.TrainingContext
    workload: Workload
    device: Device
    mmap_threshold_bytes: int | None
    say: Callable[[str], None] = lambda text: None
    build: tuple[Event, ...] | None = None  # the model's blocks as they came to be, where that was seen
    before: Heap | None = None  # what `device.read_heap` told before anything was trained
    take_out: Callable[[], None] = lambda: None  # what windows appended to the user's lists
    filled_bytes: int = 0  # free blocks of malloc's heap that are kept from windows while a plan is made

    def tile(self, n: int) -> Batch:
        """A batch of n samples, made of the workload's sample."""
        work = self.workload
        return cutting.tile(work.sample, n, shared=work.shared, per_sample=work.per_sample)


@dataclass
class Evidence:
    """What is known so far.

    Attributes:
        first_step: The first optimizer step, of small micro-batches.
        after_first: What `device.read_heap` told once that was done.
        first_step_events: Its events.
        scouted: On CUDA, the first step without what it made for good: what a window of so few samples takes.
        recordings: Of windows of two micro-batches, at different sizes.
        notes: The same, for the plan.
        fallback_reason: Why no step program could be made; None while one can.
        unrecorded_bytes: What a micro-batch makes beside what its recording shows, whatever its size.
        growth: What outlives a window, and by which line; None where nothing does.
    """

    first_step: Recording | None = None
    after_first: Heap | None = None
    first_step_events: tuple[Event, ...] = ()
    scouted: Recording | None = None
    recordings: list[Recording] = field(default_factory=list)
    notes: list[RecordingNote] = field(default_factory=list)
    fallback_reason: str | None = None
    unrecorded_bytes: int = 0
    growth: Growth | None = None
    state_at_first_bytes: int = 0  # what the optimizer held when `after_first` was read
    looked_for_growth: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)  # an outlook's, for as long as nothing is added
    _program: StepProgram | None = None
    _replays: dict[tuple[Split, HeapState], Replay] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """How peaks are known: "replayed" from a program, or "bracketed" by recordings of each size."""
        return "bracketed" if self.fallback_reason else "replayed"

    def program(self) -> StepProgram:
        """The step program of what was recorded; of fewer than two recordings, with the help of the first step."""
        if self._program is None:
            self._program = lift(self.recordings if len(self.recordings) > 1 else self.known, self.first_step_events)
        return self._program

    def know(self, recordings: Iterable[Recording]) -> None:
        """Takes these for the recordings there are; what was reckoned from others is dropped."""
        self.recordings = sorted(recordings, key=lambda each: each.micro_batch)
        self._program = None
        self._replays.clear()
        self.memo.clear()

    @property
    def known(self) -> list[Recording]:
        """The recordings, and the first step where that is as good as one."""
        scouted = [self.scouted] if self.scouted is not None else []
        return sorted([*scouted, *self.recordings], key=lambda each: each.micro_batch)

    @property
    def has_program(self) -> bool:
        """Whether two sizes are known, from which others follow."""
        return self.fallback_reason is None and len({each.micro_batch for each in self.known}) > 1

    @property
    def state_bytes(self) -> int:
        """What the first optimizer step leaves behind: the optimizer's state."""
        return sum(event.bytes for event in kept_blocks(self.first_step_events))


def record_window(subject: RecordingTarget, n: int, steps: int = 2) -> Recording:
    """Records one window of `steps` micro-batches of n samples, and what runs after it."""
    subject.say(f"recording at {n} samples")
    recording = subject.device.record(_window(subject, n, steps), micro_batch=n)
    subject.take_out()
    return recording


def _window(subject: RecordingTarget, n: int, steps: int = 2) -> Callable[[OnPhase], None]:
    """Runs one window of `steps` micro-batches of n samples, and what comes after it."""
    piece = subject.tile(n)

    def run(on_phase: OnPhase) -> None:
        with uncompiled():
            step.train_window(subject.context, [piece] * steps, (n,) * steps, on_phase=on_phase)
            step.run_between(subject.context, on_phase=on_phase)

    return run


def scout(subject: RecordingTarget, evidence: Evidence, least: int = SCOUT, begin: int = SCOUT) -> None:
    """The first optimizer step, small: it loads what loads lazily and makes the optimizer's state."""
    recording = _first_step(subject, least, begin)
    evidence.first_step, evidence.after_first = recording, subject.device.read_heap()
    evidence.state_at_first_bytes = state_held(subject.context)
    if subject.device.policy.first_step_micro_batches > 1:
        evidence.scouted = without_state(recording)
    evidence.first_step_events = tuple(event for phase in recording.phases for event in phase.events)


def _first_step(subject: RecordingTarget, least: int, begin: int) -> Recording:
    """Records the first step at `begin` samples; at fewer, where memory is too short for them."""
    steps = subject.device.policy.first_step_micro_batches
    if least < begin:
        found = if_it_fits(subject, begin, lambda: record_window(subject, begin, steps=steps))
        if found is not None:
            return found
        return record_window(subject, least, steps=steps)
    return record_window(subject, begin, steps=steps)


def if_it_fits(subject: RecordingTarget, n: int, run: Callable[[], Found]) -> Found | None:
    """What a run at n samples gives; None where it ran out of memory, and all is as before then."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        subject.say(f"{n} samples are too many: {oom.drop_frames(error)}")
    subject.context.model.zero_grad(set_to_none=True)
    subject.context.optimizer.zero_grad(set_to_none=True)
    subject.device.clean()
    return None


def add(subject: RecordingTarget, evidence: Evidence, n: int) -> float | None:
    """Records at n; returns by how much the program so far was wrong about it, None where there was none."""
    predicted = None
    if evidence.has_program:
        predicted = peak_of(subject, evidence, (n, n)).peak_bytes
    if evidence.state_bytes and not subject.context.optimizer.state and evidence.first_step is not None:
        record_window(subject, evidence.first_step.micro_batch, steps=1)  # planning started over: state has to be there
    recording = record_window(subject, n)
    if not evidence.recordings:
        evidence.unrecorded_bytes = subject.device.unrecorded_bytes(
            _window(subject, n), recording, subject.mmap_threshold_bytes
        )
        subject.take_out()
    if not evidence.looked_for_growth and _leaves(subject, as_recorded(recording), (n, n)) > PAGE_BYTES:
        evidence.looked_for_growth, evidence.growth = True, probe(subject, n)
        if evidence.growth is not None:
            evidence.first_step_events = _without_growth(evidence)
    measured = own_peak(subject, evidence, recording).peak_bytes
    evidence.know([*evidence.recordings, recording])
    evidence.notes.append(RecordingNote(n, recording.passes, recording.seconds, measured, predicted))
    return None if predicted is None else abs(predicted - measured) / measured


def _without_growth(evidence: Evidence) -> tuple[Event, ...]:
    """The first optimizer step, without what its micro-batches and an evaluation after it kept: that is counted apart.

    What outlives the step but was made by the optimizer is its state.
    """
    assert evidence.first_step is not None
    made = {e.block for phase in evidence.first_step.phases if phase.name != OPTIMIZER for e in phase.events}
    kept = [event for event in kept_blocks(evidence.first_step_events) if event.block in made]
    return (*evidence.first_step_events, *(event._replace(bytes=-event.bytes) for event in kept))


def own_peak(subject: RecordingTarget, evidence: Evidence, recording: Recording) -> Replay:
    """Replays a recording at its own size."""
    return _replay(subject, evidence, as_recorded(recording), (recording.micro_batch,) * 2, HeapState())


def peak_of(subject: RecordingTarget, evidence: Evidence, split: Split, start: HeapState | None = None) -> Replay:
    """Replays the window of a split, by the program; by the next larger recording where there is no program.

    Raises:
        LookupError: No program, and no recording that large.
    """
    start = start or HeapState()
    program, short = window_of(evidence, split)
    if evidence.fallback_reason is not None:
        return _replay(subject, evidence, program, short, start)
    if (short, start) not in evidence._replays:
        evidence._replays[short, start] = _replay(subject, evidence, program, short, start)
    return evidence._replays[short, start]


def window_of(evidence: Evidence, split: Split) -> tuple[StepProgram, Split]:
    """The program that says what a split's window takes, and a short window with the same peak.

    Raises:
        LookupError: No program, and no recording that large.
    """
    if evidence.has_program:
        return evidence.program(), _representative(evidence.program(), split)
    recording = next((r for r in evidence.recordings if r.micro_batch >= split[0]), None)
    if recording is None:
        raise LookupError(f"nothing was recorded at {split[0]} samples or more")
    program = as_recorded(recording, evidence.first_step_events)
    return program, _representative(program, (recording.micro_batch,) * len(split))


def state_held(context: step.TrainingContext) -> int:
    """Bytes of the optimizer's state that is there now."""
    values = (value for state in context.optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def growth_of(subject: RecordingTarget, evidence: Evidence, split: Split) -> int:
    """What a window of that split keeps for ever; 0 where nothing was seen to outlive a window.

    Raises:
        LookupError: No program, and no recording that large.
    """
    return max(0, _leaves(subject, *window_of(evidence, split))) if evidence.growth is not None else 0


def _leaves(subject: RecordingTarget, program: StepProgram, split: Split) -> int:
    return window_growth(program, split, workspaces=subject.device.memory_model == CACHING_ALLOCATOR)


def floor_of(evidence: Evidence, n: int, *, later: bool) -> int:
    """Bytes that are alive at once in any window with a micro-batch of n, as its first or as a later one."""
    if evidence.fallback_reason is not None:
        return 0
    split = (n, n) if later else (n,)
    return live_peak(
        [Phase(PRELUDE, evidence.first_step_events), *plain_window(evidence.program(), split)[: len(split)]]
    )


def _replay(
    subject: RecordingTarget, evidence: Evidence, program: StepProgram, split: Split, start: HeapState
) -> Replay:
    phases = [Phase(PRELUDE, evidence.first_step_events), *plain_window(program, split)]
    return subject.device.replay(phases, subject.mmap_threshold_bytes, start, evidence.unrecorded_bytes)


def _representative(program: StepProgram, split: Split) -> Split:
    """A short window with the same peak: without pools, a third micro-batch of one size finds what the second found.

    Not so where micro-batches leave something behind for the next ones to pile upon: that window is replayed whole.
    """
    if program.later_growth_bytes > PAGE_BYTES:
        return split
    return tuple(size for size, count in Counter(split).items() for _ in range(min(count, 2)))
