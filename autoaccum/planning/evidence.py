"""Hold what was recorded of a workload, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ..plan import RecordingNote
from ..process_memory import Heap
from ..simulation.program import StepProgram, lift
from ..simulation.recording import Event, Recording, kept_blocks
from .growth import Growth


class Simulator(Protocol):
    """Replay windows, and keep the results until the evidence changes."""

    def clear(self, most: int | None = None) -> None:
        """Drop all results, or those of at most so many samples."""


S = TypeVar("S", bound=Simulator)


@dataclass
class Evidence:
    """What was recorded so far.

    Attributes:
        first_step: The first optimizer step, of small micro-batches.
        heap_after_first_step: malloc's heap after a first step that wasn't recorded, without its state; None on CUDA.
        first_step_events: The events of the first step.
        small_recording: On CUDA, the first step without the blocks that it leaves behind: a recording at few samples.
        recordings: Windows of two micro-batches, by ascending size.
        small_recordings: The same at fewer samples than any of them, around an answer that is that small.
        notes: The same, for the plan.
        fallback_reason: Why no step program predicts other sizes; None while one does.
        unrecorded_bytes: Bytes of a micro-batch that its recording does not show, whatever its size.
        growth: What outlives a window, by line; None where nothing does.
        state_at_first_bytes: Optimizer state at the time of `heap_after_first_step`.
        looked_for_growth: Whether it was tested what outlives a window.
    """

    first_step: Recording | None = None
    heap_after_first_step: Heap | None = None
    first_step_events: tuple[Event, ...] = ()
    small_recording: Recording | None = None
    recordings: list[Recording] = field(default_factory=list)
    small_recordings: list[Recording] = field(default_factory=list)
    notes: list[RecordingNote] = field(default_factory=list)
    fallback_reason: str | None = None
    unrecorded_bytes: int = 0
    growth: Growth | None = None
    state_at_first_bytes: int = 0
    looked_for_growth: bool = False
    _program: StepProgram | None = None
    _small_programs: dict[int, StepProgram] = field(default_factory=dict, init=False, repr=False)
    _simulators: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def library_bytes(self) -> int:
        """What libraries keep from one product to the next.

        The larger the micro-batch, the more.
        """
        return max((recording.library_bytes for recording in self.recordings), default=0)

    @property
    def method(self) -> str:
        """How peaks are found: "replayed" from a program or "bracketed"."""
        return "bracketed" if self.fallback_reason else "replayed"

    def program(self, n: int | None = None) -> StepProgram:
        """Return the step program lifted from the recordings.

        Args:
            n: Samples of the window's first micro-batch. Where the answer is below all sizes that rules were found
                with, what saturates between the two is far off: the program is then the next recording from n on.
        """
        if n is not None and self.is_small(n):
            if n not in self._small_programs:
                self._small_programs[n] = lift(self._all_small, self.first_step_events, n)
            return self._small_programs[n]
        if self._program is None:
            recordings = self.recordings if len(self.recordings) > 1 else self.all_recordings
            self._program = lift(recordings, self.first_step_events)
        return self._program

    def with_program(self, program: StepProgram) -> Evidence:
        """Return a copy that predicts by another program."""
        return replace(self, _program=program, small_recordings=[])

    def is_small(self, n: int) -> bool:
        """Return whether windows of n samples are predicted from the small recordings."""
        return bool(self.small_recordings) and n <= self.small_recordings[-1].micro_batch

    def recorded_each(self, sizes: Iterable[int]) -> bool:
        """Return whether each size is one of the small recordings'."""
        return set(sizes) <= {each.micro_batch for each in self.small_recordings}

    def add_small(self, recording: Recording) -> None:
        """Add a recording at fewer samples than the others."""
        self.small_recordings = sorted([*self.small_recordings, recording], key=lambda each: each.micro_batch)
        self._small_programs.clear()
        for simulator in self._simulators.values():
            simulator.clear(self.small_recordings[-1].micro_batch)

    @property
    def _all_small(self) -> list[Recording]:
        return self.small_recordings if len(self.small_recordings) > 1 else self.small_recordings + self.recordings[:1]

    def set_recordings(self, recordings: Iterable[Recording]) -> None:
        """Replace the recordings; drop everything computed from the earlier ones."""
        self.recordings = sorted(recordings, key=lambda each: each.micro_batch)
        self._program = None
        self.clear_simulators()

    def fall_back(self, reason: str) -> None:
        """Stop predicting by a program: each size needs its own recording."""
        self.fallback_reason = reason
        self.recordings = [*self.small_recordings, *self.recordings]  # as good as they are
        self.small_recordings = []
        self.clear_simulators()

    def simulator(self, kind: Callable[..., S], *settings: Hashable) -> S:
        """Return the simulator with these settings, made on the first call.

        Args:
            kind: The class, called with this evidence and the settings.
            *settings: All that its results depend on beside the evidence.
        """
        key = kind, settings
        if key not in self._simulators:
            self._simulators[key] = kind(self, *settings)
        found: S = self._simulators[key]
        return found

    def clear_simulators(self) -> None:
        """Drop everything that was replayed."""
        for simulator in self._simulators.values():
            simulator.clear()

    @property
    def all_recordings(self) -> list[Recording]:
        """The recordings, with the first step where that serves as one."""
        small = [self.small_recording] if self.small_recording is not None else []
        return sorted([*small, *self.recordings], key=lambda each: each.micro_batch)

    @property
    def has_program(self) -> bool:
        """Whether other sizes are predicted from two or more recorded ones."""
        return self.fallback_reason is None and len({each.micro_batch for each in self.all_recordings}) > 1

    @property
    def state_bytes(self) -> int:
        """Bytes that the first optimizer step leaves behind: the optimizer's state."""
        return sum(event.bytes for event in kept_blocks(self.first_step_events))
