"""Predict the bytes that a process commits for training on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .. import process_memory
from ..devices.cpu.device import CpuDevice, CpuMeasurement
from ..phases import BETWEEN, FIRST, LATER, OPTIMIZER, PHASE_TITLES
from ..plan import DeviceSection, PeakRow
from ..simulation.malloc import EMPTY, HeapState, Replay
from ..simulation.recording import Phase, live_peak
from ..simulation.solver import Split, balanced
from . import cpu_words
from .evidence import Evidence
from .growth import WINDOWS
from .predictor import (
    AGREEMENT_FRACTION,
    OUT_OF_MEMORY_FACTOR,
    DeviceFigures,
    MemoryPredictor,
    VerifiedFigures,
    verified_part,
)
from .resolved_request import ResolvedRequest
from .target import RecordingTarget
from .windows import FIRST_STEP, window_simulator

DEFAULT_MALLOC_OVERHEAD = 0.25  # of training's memory: the most that the default malloc's fragmentation was seen to add


@dataclass
class CpuPredictor(MemoryPredictor):
    """Predict committed bytes by replaying single windows.

    Attributes:
        new_process: The holes in a new process's heap, which the baseline includes.
        this_process: The holes in this process's heap.
        own_bytes: Planning's own memory in this process.
        present_bytes: What this process would have committed now if malloc kept no freed block. None with glibc's
            malloc, whose counters show what it keeps.
    """

    new_process: HeapState = EMPTY
    this_process: HeapState = EMPTY
    own_bytes: int = 0
    present_bytes: int | None = None
    _least_kept_bytes: int | None = field(default=None, init=False, repr=False)

    @property
    def device(self) -> CpuDevice:
        """The device, whose memory is the process's."""
        return _cpu_of(self.subject)

    # What fits

    def fits(self, split: Split) -> bool:
        """Return whether the highest peak of the histories is usable."""
        try:
            return self.worst_bytes(split) <= self.usable_bytes
        except LookupError:
            return False

    def floor(self, n: int) -> int:
        """Return the live bytes of a first micro-batch."""
        return self._floor(n, later=False)

    def later_floor(self, n: int) -> int:
        """Return the live bytes of a later micro-batch."""
        return self._floor(n, later=True)

    def _floor(self, n: int, *, later: bool) -> int:
        inputs = self.input_bytes(self.request.samples or n)
        baseline = self.baseline_bytes - self.new_process.heap_free_bytes  # small blocks may fill the holes
        window = min(1.0, self.compiled_share) * self.windows.floor_bytes(n, later=later)
        return baseline + int((1 + self.malloc_overhead) * (inputs + window)) + self._least_kept()

    def _least_kept(self) -> int:
        """Return the least that any window of as many samples keeps.

        It is linear in samples and steps, so either the fewest or the most steps keep the least.
        """
        if self.evidence.growth is None:
            return 0
        if self._least_kept_bytes is None:
            samples = self.request.samples or 1
            ends = (samples,), balanced(samples, samples // self.request.least)
            self._least_kept_bytes = min(self.kept_bytes(split) for split in ends)
        return self._least_kept_bytes

    # Peaks

    def input_bytes(self, samples: int) -> int:
        """Return the memory of a window's samples, kept until its step."""
        return self.device.input_bytes(samples * self.sample_bytes)

    def peak_bytes(self, split: Split, history: str) -> int:
        """Return the sum of baseline, inputs, growth and the window's peak."""
        held = self.baseline_bytes + self.input_bytes(sum(split)) + self.kept_bytes(split)
        if history == "new_process":
            return held + self._window(split, self.new_process).peak_bytes
        return held + self.inside_bytes + self._window(split, self.this_process).peak_bytes

    @property
    def inside_bytes(self) -> int:
        """What this process has committed beside the baseline.

        Planning's own, and its heap's holes.
        """
        return self.own_bytes + self.this_process.heap_free_bytes - self.new_process.heap_free_bytes

    def kept_bytes(self, split: Split) -> int:
        """Return what the windows before the predicted one have kept."""
        return (WINDOWS - 1) * self.growth_bytes(split)

    def _window(self, split: Split, start: HeapState) -> Replay:
        """Replay a window, and add what libraries keep.

        A compiled one is scaled by its measured share.
        """
        found, kept, share = self.windows.replay(split, start), self.evidence.library_bytes, self.compiled_share
        phases = tuple(replace(phase, bytes=int(share * (phase.bytes + kept))) for phase in found.phases)
        return replace(found, peak_bytes=int(share * (found.peak_bytes + kept)), phases=phases)

    def phases(self, split: Split) -> dict[str, int]:
        """Return the peak of each phase by the replay of the window."""
        held = self.baseline_bytes + self.input_bytes(sum(split))
        window = self._window(split, self.new_process)
        return {phase.name: held + phase.bytes for phase in window.phases if phase.name in PHASE_TITLES}

    def row(self, n: int) -> PeakRow:
        """Return the peaks of a window of two micro-batches."""
        window = self._window((n, n), self.new_process)
        peaks = {phase.name: phase.bytes for phase in window.phases}
        return PeakRow(n, peaks[FIRST], peaks[LATER], peaks[OPTIMIZER], peaks.get(BETWEEN, 0))

    # Fields and words of the plan

    @property
    def baseline_words(self) -> str:
        """What the baseline consists of."""
        return "the process before training"

    def device_figures(self, split: Split, largest: int) -> DeviceFigures:
        """Return the device's name and the malloc setting."""
        threshold, device = self.subject.mmap_threshold_bytes, self.device
        return DeviceFigures(DeviceSection(device.name, mmap_threshold_bytes=threshold, malloc=device.setting.name))

    def verified_figures(self, measured: CpuMeasurement, split: Split) -> VerifiedFigures:
        """Return the verified windows' figures, extended to the whole window."""
        verified = verified_part(split)
        rest = self.input_bytes(sum(split)) - self.input_bytes(sum(verified))
        ran = verified[0] + 2 * sum(verified)
        if self.evidence.growth is not None:
            rest = self.worst_bytes(split) - self.worst_bytes(verified) + self._not_kept_yet(verified)
        if "this_process" in self.request.histories:
            rest += self.inside_bytes
        return VerifiedFigures(
            measured_peak_bytes=self.baseline_bytes + measured.increment_bytes + rest,
            resident_peak_bytes=measured.resident_bytes,
            kernel_time_fraction=measured.system_share,
            window_seconds=measured.seconds * sum(split) / ran,
        )

    def reasons(self, split: Split) -> dict[str, str]:
        """Return the reasons, in committed bytes."""
        return cpu_words.reasons(self, split)

    def notes(self, split: Split) -> list[str]:
        """Return notes about holes in the heap and about malloc."""
        return cpu_words.notes(self)

    def remedies(self, needed_bytes: int) -> list[str]:
        """Recommend a new process where this one's heap has large holes."""
        return cpu_words.remedies(self, needed_bytes)

    # Verification

    def measure(self, train: Callable[..., None], split: Split) -> CpuMeasurement:
        """Run the first micro-batch alone, then two windows."""
        found = self.device.measure(train, (split[:1], split, split))
        if self.present_bytes is None:
            return found
        return replace(found, increment_bytes=found.baseline_bytes + found.increment_bytes - self.present_bytes)

    def confirms(self, split: Split, measured: CpuMeasurement) -> str | None:
        """Return how the measurement contradicts the prediction, or None.

        Where recordings do not predict other windows (bracketed, compiled, another malloc), it is enough that the
        window fitted.
        """
        predicted = self._predicted_increment(split)
        allowed = AGREEMENT_FRACTION * (self.baseline_bytes + predicted) + self.malloc_overhead * predicted
        if abs(measured.increment_bytes - predicted) <= allowed:
            return None
        is_predicted = self.evidence.fallback_reason is None and self.compiled_share == 1 and not self.is_incomplete
        if not is_predicted and self.holds(measured):
            return None
        return f"allocated {measured.increment_bytes:,} bytes, not {predicted:,}"

    def predicted_and_measured(self, split: Split, measured: CpuMeasurement) -> tuple[int, int]:
        """Return the predicted and the measured peak, with the baseline."""
        return self.baseline_bytes + self._predicted_increment(split), self.baseline_bytes + measured.increment_bytes

    def holds(self, measured: CpuMeasurement) -> bool:
        """Return whether the process stayed within the usable budget."""
        return self.baseline_bytes + measured.increment_bytes <= self.usable_bytes

    @property
    def is_incomplete(self) -> bool:
        """Whether malloc is not glibc's, so that recordings miss what it keeps."""
        return self.present_bytes is not None

    def _predicted_increment(self, split: Split) -> int:
        """Return what a window adds to this process by the prediction."""
        present = self.baseline_bytes + self.inside_bytes
        return self.peak_bytes(split, "this_process") - present - self._not_kept_yet(split)

    def _not_kept_yet(self, split: Split) -> int:
        """Return what the verified windows keep less than whole ones."""
        return self.growth_bytes(split) - self.growth_bytes(split[:1])

    def correct_compiled_share(self, split: Split, measured: CpuMeasurement | None) -> None:
        """Correct the compiled share by the window's own memory."""
        if measured is None:
            self.compiled_share *= OUT_OF_MEMORY_FACTOR
            return
        window = self._window(split, self.this_process).peak_bytes
        used = window + measured.increment_bytes - self._predicted_increment(split)
        self.compiled_share *= max(used, window // 10) / window


def make_predictor(
    subject: RecordingTarget, request: ResolvedRequest, evidence: Evidence, sample_bytes: int, own_bytes: int
) -> CpuPredictor:
    """Read the process and the budget, and make a predictor.

    Args:
        subject: What is planned.
        request: What is asked for.
        evidence: What was recorded.
        sample_bytes: Bytes that each further sample adds to a batch.
        own_bytes: Planning's copies of what training changes, which this process holds.
    """
    uses_glibc = process_memory.malloc_name() == "glibc"
    start = (_read_start if uses_glibc else _read_start_of_another_malloc)(subject, evidence, own_bytes)
    return CpuPredictor(
        subject=subject,
        request=request,
        evidence=evidence,
        baseline_bytes=start.baseline_bytes,
        budget=subject.device.read_budget(request.budget, request.headroom),
        sample_bytes=sample_bytes,
        malloc_overhead=DEFAULT_MALLOC_OVERHEAD if subject.mmap_threshold_bytes is None or not uses_glibc else 0.0,
        new_process=start.new_process,
        this_process=start.this_process,
        own_bytes=start.own_bytes,
        leaked_bytes=start.leaked_bytes,
        present_bytes=start.present_bytes,
    )


@dataclass(frozen=True)
class _Start:
    """The process before training; attributes as in `CpuPredictor`."""

    baseline_bytes: int
    new_process: HeapState = EMPTY
    this_process: HeapState = EMPTY
    own_bytes: int = 0
    leaked_bytes: int = 0
    present_bytes: int | None = None


def _read_start(subject: RecordingTarget, evidence: Evidence, own_bytes: int) -> _Start:
    """Read the process by the counters of glibc's malloc."""
    assert subject.heap_before is not None
    found = _cpu_of(subject).read_baseline(subject.heap_before, evidence.heap_after_first_step)
    first_kept, since = _leaked_bytes(subject, evidence)
    return _Start(
        baseline_bytes=found.bytes - own_bytes - first_kept,
        new_process=found.new_process,
        this_process=found.this_process,
        own_bytes=max(0, found.planning_bytes - _made_state_bytes(subject, evidence)) + first_kept,
        leaked_bytes=first_kept + since,
    )


def _read_start_of_another_malloc(subject: RecordingTarget, evidence: Evidence, own_bytes: int) -> _Start:
    """Read the process where no counter shows what malloc keeps.

    Kept memory is used again, so it does not belong to the baseline: of the memory after the first window, all that
    the window had live simultaneously may be kept.
    """
    assert subject.heap_before is not None
    before = subject.heap_before.outside_bytes
    baseline_bytes = before - own_bytes
    if evidence.heap_after_first_step is not None:
        kept = live_peak([Phase(FIRST_STEP, evidence.first_step_events)])
        baseline_bytes += max(0, evidence.heap_after_first_step.outside_bytes - kept - before)
    return _Start(baseline_bytes, present_bytes=baseline_bytes + own_bytes)


def _leaked_bytes(subject: RecordingTarget, evidence: Evidence) -> tuple[int, int]:
    """Return what the first window left behind, and what later ones did.

    The latter is the growth of malloc's heap since then, planning's own objects among it. A process that trains begins
    without either.
    """
    first, then = evidence.first_step, evidence.heap_after_first_step
    if evidence.growth is None or evidence.growth.undone or first is None or then is None:
        return 0, 0
    now = _cpu_of(subject).read_heap().in_use_bytes - _made_state_bytes(subject, evidence)
    first_split = (first.micro_batch,) * subject.device.policy.first_step_micro_batches
    return window_simulator(subject, evidence).growth_bytes(first_split), max(0, now - then.in_use_bytes)


def _made_state_bytes(subject: RecordingTarget, evidence: Evidence) -> int:
    """Return the optimizer state that windows have made since the first."""
    return subject.held_state_bytes - evidence.state_at_first_bytes


def _cpu_of(subject: RecordingTarget) -> CpuDevice:
    assert isinstance(subject.device, CpuDevice)
    return subject.device
