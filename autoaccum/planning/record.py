"""Record the first optimizer step and single windows.

`planning/schedule.py` decides which sizes are recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from ..devices import oom
from ..phases import OPTIMIZER
from ..plan import RecordingNote
from ..process_memory import PAGE_BYTES
from ..simulation.from_verification import without_state
from ..simulation.program import as_recorded
from ..simulation.recording import Event, Recording, kept_blocks
from .evidence import Evidence
from .growth import probe
from .target import RecordingTarget, one_after_the_other
from .windows import window_simulator

FIRST_STEP_SAMPLES = 2  # batch statistics need two
Result = TypeVar("Result")


def record_window(subject: RecordingTarget, n: int, steps: int = 2) -> Recording:
    """Record a window of `steps` micro-batches of n samples."""
    subject.progress(f"recording at {n} samples")
    recording = subject.device.record(subject.window(n, steps), micro_batch=n)
    subject.remove_appended()
    return recording


def train_before_recording(
    subject: RecordingTarget, evidence: Evidence, min_samples: int, start_over: Callable[[], None]
) -> None:
    """Train an unrecorded first step, and read the heap after it.

    Where not even the fewest samples fit, nothing is read: the recorded step reports it.

    Args:
        subject: What is trained.
        evidence: Gets the heap.
        min_samples: The samples to train where memory is too short for two.
        start_over: Puts back what training changed.
    """

    def trained(n: int) -> bool:
        def train() -> bool:
            subject.window(n, steps=1)(lambda name: contextlib.nullcontext())
            return True

        return unless_out_of_memory(subject, n, train) is not None

    sizes = dict.fromkeys((FIRST_STEP_SAMPLES, min(min_samples, FIRST_STEP_SAMPLES)))
    done = any(map(trained, sizes))
    start_over()
    subject.context.has_begun = False  # so that the recorded one is the first
    if done:
        evidence.heap_after_first_step = subject.device.read_heap()
        evidence.state_at_first_bytes = subject.held_state_bytes


def record_first_step(
    subject: RecordingTarget, evidence: Evidence, min_samples: int = FIRST_STEP_SAMPLES, begin: int = FIRST_STEP_SAMPLES
) -> None:
    """Record the first optimizer step, which makes the optimizer's state.

    Args:
        subject: What is recorded.
        evidence: Gets the recording.
        min_samples: The samples to record where memory is too short for `begin`.
        begin: The samples to begin with.
    """
    steps = subject.device.policy.first_step_micro_batches
    recording = None
    if min_samples < begin:
        recording = unless_out_of_memory(subject, begin, lambda: record_window(subject, begin, steps=steps))
    if recording is None:
        recording = record_window(subject, min(min_samples, begin), steps=steps)
    evidence.first_step = recording
    if evidence.heap_after_first_step is None:
        evidence.heap_after_first_step = subject.device.read_heap()
        evidence.state_at_first_bytes = subject.held_state_bytes
    if steps > 1:
        evidence.small_recording = without_state(recording)
    evidence.first_step_events = tuple(event for phase in recording.phases for event in phase.events)


def unless_out_of_memory(subject: RecordingTarget, n: int, run: Callable[[], Result]) -> Result | None:
    """Run at n samples; after an out-of-memory clean up and return None."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        subject.progress(f"{n} samples are too many: {oom.drop_frames(error)}")
    subject.drop_gradients()
    subject.device.clean()
    return None


def add_recording(subject: RecordingTarget, evidence: Evidence, n: int) -> float | None:
    """Record at n samples.

    Returns:
        The relative error of the peak that was predicted before; None where none was predicted.
    """
    with one_after_the_other(subject.context):  # also while a window in lanes is verified
        return _added(subject, evidence, n)


def _added(subject: RecordingTarget, evidence: Evidence, n: int) -> float | None:
    simulator = window_simulator(subject, evidence)
    predicted = simulator.replay((n, n)).peak_bytes if evidence.has_program else None
    restore_state(subject, evidence)
    recording = record_window(subject, n)
    if not evidence.recordings:
        evidence.unrecorded_bytes = subject.device.unrecorded_bytes(
            subject.window(n), recording, subject.mmap_threshold_bytes
        )
        subject.remove_appended()
    if not evidence.looked_for_growth and simulator.outliving_bytes(as_recorded(recording), (n, n)) > PAGE_BYTES:
        evidence.looked_for_growth, evidence.growth = True, probe(subject, n)
        if evidence.growth is not None:
            evidence.first_step_events = _events_without_growth(evidence)
    measured = simulator.replay_recording(recording).peak_bytes
    if evidence.has_program and n < evidence.recordings[0].micro_batch:
        evidence.add_small(recording)
    else:
        evidence.set_recordings([*evidence.recordings, recording])
    evidence.notes.append(RecordingNote(n, recording.passes, recording.seconds, measured, predicted))
    return None if predicted is None else abs(predicted - measured) / measured


def restore_state(subject: RecordingTarget, evidence: Evidence) -> None:
    """Train a small window where planning dropped the optimizer's state."""
    if evidence.state_bytes and not subject.context.optimizer.state and evidence.first_step is not None:
        record_window(subject, evidence.first_step.micro_batch, steps=1)


def _events_without_growth(evidence: Evidence) -> tuple[Event, ...]:
    """Return the first step's events without what its micro-batches keep.

    Growth is counted separately. A block that outlives the step and was made by the optimizer is its state.
    """
    assert evidence.first_step is not None
    made = {e.block for phase in evidence.first_step.phases if phase.name != OPTIMIZER for e in phase.events}
    kept = [event for event in kept_blocks(evidence.first_step_events) if event.block in made]
    return (*evidence.first_step_events, *(event._replace(bytes=-event.bytes) for event in kept))
