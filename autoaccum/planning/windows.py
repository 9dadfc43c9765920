"""Replay single windows by the rules of the device's allocator."""

from __future__ import annotations

from collections import Counter

from ..devices.base import CACHING_ALLOCATOR, Device
from ..process_memory import PAGE_BYTES
from ..simulation.malloc import HeapState, Replay
from ..simulation.program import StepProgram, as_recorded, plain_window, window_growth
from ..simulation.recording import Phase, Recording, live_peak
from ..simulation.solver import Split
from .evidence import Evidence
from .target import RecordingTarget

FIRST_STEP = "first step"  # a phase before the window: what the optimizer's first step leaves behind


class WindowSimulator:
    """Replay single windows, and keep the results.

    Args:
        evidence: What was recorded.
        device: Whose allocator's rules hold.
        mmap_threshold_bytes: malloc's fixed mmap threshold; None where it is at its default, and on CUDA.
    """

    def __init__(self, evidence: Evidence, device: Device, mmap_threshold_bytes: int | None) -> None:
        self._evidence = evidence
        self._device = device
        self._mmap_threshold_bytes = mmap_threshold_bytes
        self._replays: dict[tuple[Split, HeapState], Replay] = {}

    def clear(self, most: int | None = None) -> None:
        """Drop all replays, or those of at most so many samples."""
        if most is None:
            self._replays.clear()
        self._replays = {key: replay for key, replay in self._replays.items() if key[0][0] > (most or 0)}

    def replay(self, split: Split, start: HeapState | None = None) -> Replay:
        """Replay the window of a split.

        Args:
            split: The micro-batches of the window.
            start: The heap before it; left out, one without holes.

        Raises:
            LookupError: There is neither a program nor a recording that large.
        """
        program, short = window_of(self._evidence, split)
        key = short, start or HeapState()
        if key not in self._replays:
            self._replays[key] = self._run(program, *key)
        return self._replays[key]

    def replay_recording(self, recording: Recording) -> Replay:
        """Replay a recording at its own size."""
        return self._run(as_recorded(recording), (recording.micro_batch,) * 2, HeapState())

    def _run(self, program: StepProgram, split: Split, start: HeapState) -> Replay:
        evidence = self._evidence
        phases = [Phase(FIRST_STEP, evidence.first_step_events), *plain_window(program, split)]
        return self._device.replay(phases, self._mmap_threshold_bytes, start, evidence.unrecorded_bytes)

    def growth_bytes(self, split: Split) -> int:
        """Return the bytes that each window keeps permanently.

        Raises:
            LookupError: There is neither a program nor a recording that large.
        """
        if self._evidence.growth is None:
            return 0
        return max(0, self.outliving_bytes(*window_of(self._evidence, split)))

    def outliving_bytes(self, program: StepProgram, split: Split) -> int:
        """Return the bytes that a program's window allocates and does not free."""
        return window_growth(program, split, workspaces=self._device.memory_model == CACHING_ALLOCATOR)

    def floor_bytes(self, n: int, *, later: bool) -> int:
        """Return the live bytes of a first or later micro-batch of n."""
        evidence = self._evidence
        if evidence.fallback_reason is not None:
            return 0
        split = (n, n) if later else (n,)
        window = plain_window(evidence.program(n), split)[: len(split)]
        return live_peak([Phase(FIRST_STEP, evidence.first_step_events), *window])


def window_simulator(subject: RecordingTarget, evidence: Evidence) -> WindowSimulator:
    """Return the simulator of single windows of a subject."""
    return evidence.simulator(WindowSimulator, subject.device, subject.mmap_threshold_bytes)


def window_of(evidence: Evidence, split: Split) -> tuple[StepProgram, Split]:
    """Return a split's program, and a short window with the same peak.

    Raises:
        LookupError: There is neither a program nor a recording that large.
    """
    if evidence.has_program:
        program = evidence.program(split[0])
        return program, _representative(program, split)
    recording = next((each for each in evidence.recordings if each.micro_batch >= split[0]), None)
    if recording is None:
        raise LookupError(f"nothing was recorded at {split[0]} samples or more")
    program = as_recorded(recording, evidence.first_step_events)
    return program, _representative(program, (recording.micro_batch,) * len(split))


def _representative(program: StepProgram, split: Split) -> Split:
    """Return a short window with the same peak.

    Without pools, a third micro-batch of one size finds the heap as the second one found it. Where micro-batches leave
    blocks behind, each one adds to them, and the whole window is replayed.
    """
    if program.later_growth_bytes > PAGE_BYTES:
        return split
    return tuple(size for size, count in Counter(split).items() for _ in range(min(count, 2)))
