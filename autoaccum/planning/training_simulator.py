"""Replay training runs by the rules of the CUDA caching allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..simulation.cuda_allocator.allocator import AllocatorState, CudaRules
from ..simulation.cuda_allocator.transitions import Transitions
from ..simulation.program import StepProgram, as_recorded, plain_window
from ..simulation.recording import Event, live_peak
from ..simulation.solver import Split
from ..simulation.training_run import (
    MAX_WINDOWS,
    Training,
    TrainingReplay,
    replay_training,
    training_of,
    with_kept_workspaces,
)
from ..simulation.varied_widths import Course, course_of
from .evidence import Evidence
from .growth import WINDOWS

MAX_REPLAYS = 4096  # kept in memory
_Key = tuple[Split, int | None, bool, bool, bool]


class TrainingSimulator:
    """Replay the training run of a split, and keep the results.

    Args:
        evidence: What was recorded.
        model_events: The allocations of the model as a new process makes them.
        rules: The allocator's settings.
        start: What the allocator holds before training.
    """

    def __init__(
        self, evidence: Evidence, model_events: tuple[Event, ...], rules: CudaRules, start: AllocatorState
    ) -> None:
        self._evidence = evidence
        self._model_events = model_events
        self._rules = rules
        self._start = start
        self._replays: dict[_Key, TrainingReplay] = {}
        self._known: dict[tuple[object, ...], Transitions] = {}
        self._floors: dict[tuple[int, bool], int] = {}
        self._trainings: dict[int, Training] = {}  # by recorded micro-batch; 0: of the program; < 0: of a small one

    def clear(self, most: int | None = None) -> None:
        """Drop all results, or those of at most so many samples."""
        if most is None:
            self._replays.clear()
            self._known.clear()
            self._floors.clear()
            self._trainings.clear()
            return
        self._replays = {key: found for key, found in self._replays.items() if key[0][0] > most}
        self._floors = {key: found for key, found in self._floors.items() if key[0] > most}
        kept = {key: training for key, training in self._trainings.items() if key >= 0}
        named = {id(training) for training in kept.values()}
        self._known = {key: known for key, known in self._known.items() if key[0] in named}
        self._trainings = kept

    def replay(
        self,
        split: Split,
        capacity_bytes: int | None,
        *,
        kept: bool = False,
        expandable: bool | None = None,
        stops_at_retry: bool = False,
    ) -> TrainingReplay:
        """Replay windows of a split until they repeat.

        Args:
            split: The micro-batches of each window.
            capacity_bytes: What the allocator may reserve; None for no limit.
            kept: Whether cuBLAS keeps its workspaces.
            expandable: Whether segments are expandable; left out, as in this process.
            stops_at_retry: Whether to stop at the first retry, which is all that the caller asks about.

        Raises:
            LookupError: There is neither a program nor a recording that large.
        """
        expandable = self._rules.expandable_segments if expandable is None else expandable
        key = split, capacity_bytes, kept, expandable, stops_at_retry
        if key not in self._replays:
            training, sizes = self._training(split)
            if len(self._replays) > MAX_REPLAYS:
                self._replays.clear()
                self._known.clear()
            self._replays[key] = replay_training(
                with_kept_workspaces(training) if kept else training,
                sizes,
                replace(self._rules.with_capacity(capacity_bytes), expandable_segments=expandable),
                start=self._start,
                windows=MAX_WINDOWS if self._evidence.growth is None else WINDOWS,
                stops_at_retry=stops_at_retry,
                known=self._known.setdefault((id(training), capacity_bytes, kept, expandable), Transitions()),
            )
        return self._replays[key]

    def course(self, split: Split, *, kept: bool) -> Course:
        """Return the windows of a split, to replay them in other widths.

        Args:
            split: The micro-batches of each window.
            kept: Whether cuBLAS keeps its workspaces.

        Raises:
            LookupError: There is neither a program nor a recording that large.
        """
        training, sizes = self._training(split)
        return course_of(training, sizes, kept=kept)

    def has_workspaces(self, split: Split) -> bool:
        """Return whether cuBLAS's workspaces were recorded."""
        return bool(self._training(split)[0].program.workspaces)

    def floor_bytes(self, n: int, *, later: bool) -> int:
        """Return the live bytes of a first or later micro-batch of n."""
        if (n, later) not in self._floors:
            self._floors[n, later] = self._live_bytes(n, later=later)
        return self._floors[n, later]

    def _live_bytes(self, n: int, *, later: bool) -> int:
        if self._evidence.fallback_reason is not None or self._evidence.first_step is None:
            return 0
        training, split = self._training((n, n) if later else (n,))
        held = sum(event.bytes for event in self._model_events) + training.state_bytes
        return held + live_peak(plain_window(training.program, split)[: len(split)])

    def _training(self, split: Split) -> tuple[Training, Split]:
        """Return the training to replay, and the split in its sizes."""
        evidence = self._evidence
        if evidence.has_program:
            n = split[0]
            return self._training_of(-n if evidence.is_small(n) else 0, lambda: evidence.program(n)), split
        recording = next((each for each in evidence.all_recordings if each.micro_batch >= split[0]), None)
        if recording is None:
            raise LookupError(f"nothing was recorded at {split[0]} samples or more")
        size = recording.micro_batch
        training = self._training_of(size, lambda: as_recorded(recording, evidence.first_step_events))
        return training, (size,) * len(split)

    def _training_of(self, key: int, program: Callable[[], StepProgram]) -> Training:
        if key not in self._trainings:
            assert self._evidence.first_step is not None
            self._trainings[key] = training_of(program(), self._evidence.first_step, self._model_events)
        return self._trainings[key]
