"""The outlook on the CPU: committed bytes of the process, its own samples among them."""

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
from ..units import show_bytes
from . import observe
from .growth import WINDOWS
from .observe import Evidence, RecordingTarget
from .predictor import AGREES_WITHIN, RAN_OUT, DeviceFigures, MemoryPredictor, VerifiedFigures, verified_part
from .request import PlanRequest

HOLES_SAID = 0.01  # of budget or baseline, whichever is more: holes in the heap from there on are said
DEFAULT_MALLOC_OVERHEAD = 0.25  # of what training takes: how far the default malloc's fragmentation was seen to go


@dataclass
class CpuPredictor(MemoryPredictor):
    """What is there to be used, and what is known so far.

    Attributes:
        new_process: The holes in a new process's heap, which the baseline includes.
        this_process: Those in this one's.
        own_bytes: What planning itself has in this one.
        present_bytes: What this one would have now if malloc kept nothing of what is freed; None where it is glibc's,
            which says what it keeps.
    """

    new_process: HeapState = EMPTY
    this_process: HeapState = EMPTY
    own_bytes: int = 0
    present_bytes: int | None = None
    _least_kept_bytes: int | None = field(default=None, init=False)

    @property
    def device(self) -> CpuDevice:
        """Return the device, whose memory is the process's."""
        return _cpu_of(self.subject)

    def input_bytes(self, samples: int) -> int:
        """The samples of a window lie in the same memory until their step is done."""
        return self.device.input_bytes(samples * self.sample_bytes)

    def peak_bytes(self, split: Split, history: str) -> int:
        """Base, data, what the windows before it keep, and what the window makes malloc take."""
        held = self.baseline_bytes + self.input_bytes(sum(split)) + self.kept_bytes(split)
        if history == "new_process":
            return held + self._window(split, self.new_process).peak_bytes
        inside = self.own_bytes + self.this_process.heap_free_bytes - self.new_process.heap_free_bytes
        return held + inside + self._window(split, self.this_process).peak_bytes

    def kept_bytes(self, split: Split) -> int:
        """What the windows before the one whose peak is promised have kept."""
        return (WINDOWS - 1) * self.growth_bytes(split)

    def _window(self, split: Split, start: HeapState) -> Replay:
        """The replay of a window; of a compiled one, with the share that was measured."""
        found, share = observe.peak_of(self.subject, self.evidence, split, start), self.compiled_share
        if share == 1:
            return found
        phases = tuple(replace(phase, bytes=int(share * phase.bytes)) for phase in found.phases)
        return replace(found, peak_bytes=int(share * found.peak_bytes), phases=phases)

    def fits(self, split: Split) -> bool:
        """Whether the worse history's peak is within what is usable."""
        try:
            return self.worst_bytes(split) <= self.usable_bytes
        except LookupError:
            return False

    def floor(self, n: int) -> int:
        """What is alive at once in a first micro-batch."""
        return self._floor(n, later=False)

    def later_floor(self, n: int) -> int:
        """What is alive at once in a later one."""
        return self._floor(n, later=True)

    def _floor(self, n: int, *, later: bool) -> int:
        data = self.input_bytes(self.request.samples or n)
        base = self.baseline_bytes - self.new_process.heap_free_bytes  # which small blocks may fill
        window = min(1.0, self.compiled_share) * observe.floor_of(self.evidence, n, later=later)
        return base + int((1 + self.malloc_overhead) * (data + window)) + self._least_kept(n)

    def _least_kept(self, n: int) -> int:
        """What any window of as many samples keeps at least: it follows samples and steps, so one end has the least."""
        if self.evidence.growth is None:
            return 0
        if self._least_kept_bytes is None:
            samples = self.request.samples or 1
            ends = (samples,), balanced(samples, samples // self.request.least)
            self._least_kept_bytes = min(self.kept_bytes(split) for split in ends)
        return self._least_kept_bytes

    def phases(self, split: Split) -> dict[str, int]:
        """By the replay of that window."""
        held = self.baseline_bytes + self.input_bytes(sum(split))
        window = self._window(split, self.new_process)
        return {phase.name: held + phase.bytes for phase in window.phases if phase.name in PHASE_TITLES}

    def row(self, n: int) -> PeakRow:
        """By the replay of two micro-batches."""
        window = self._window((n, n), self.new_process)
        peaks = {phase.name: phase.bytes for phase in window.phases}
        return PeakRow(n, peaks[FIRST], peaks[LATER], peaks[OPTIMIZER], peaks.get(BETWEEN, 0))

    @property
    def base_words(self) -> str:
        """What the base is."""
        return "the process before training"

    def device_figures(self, split: Split, largest: int) -> DeviceFigures:
        """Return the device's name and the malloc setting."""
        threshold = self.subject.mmap_threshold_bytes
        return DeviceFigures(DeviceSection(self.device.name, mmap_threshold_bytes=threshold))

    def verified_figures(self, measured: CpuMeasurement, split: Split) -> VerifiedFigures:
        """Return the verified windows' figures, with the samples that the rest of a whole window adds."""
        verified = verified_part(split)
        rest = self.input_bytes(sum(split)) - self.input_bytes(sum(verified))
        ran = verified[0] + 2 * sum(verified)
        if self.evidence.growth is not None:
            rest = self.worst_bytes(split) - self.worst_bytes(verified) + self._not_kept_yet(verified)
            rest += self.leaked_bytes if "this_process" in self.request.histories else 0
        return VerifiedFigures(
            measured_peak_bytes=self.baseline_bytes + measured.increment_bytes + rest,
            resident_peak_bytes=measured.resident_bytes,
            kernel_time_fraction=measured.system_share,
            window_seconds=measured.seconds * sum(split) / ran,
        )

    def reasons(self, split: Split) -> dict[str, str]:
        """In committed bytes."""
        return {
            "baseline_bytes": "committed by this process before training: interpreter, libraries, the model",
            "input_bytes": (
                f"{sum(split)} samples of {self.sample_bytes:,} bytes, kept until their optimizer step is done"
            ),
            "predicted_peak_bytes": (
                f"the replay of this window; {self.evidence.unrecorded_bytes:,} bytes of it are objects that no "
                "recording shows (autograd's graph above all), measured in a small window"
            ),
            "history_bytes": self._history_words(split),
            "budget_bytes": f"the tightest of the limits ({self.budget.binding_constraint}) less the headroom",
        }

    def _history_words(self, split: Split) -> str:
        own = self.own_bytes - self.leaked_bytes
        told = (
            f"planning's own objects and threads in this process ({own:,} bytes), and holes in its heap that large "
            "blocks can't use"
        )
        if self.evidence.growth is None:
            return told
        return (
            f"what the {WINDOWS - 1} windows before keep ({self.kept_bytes(split):,} bytes); what planning's own "
            f"windows left ({self.leaked_bytes:,} bytes); {told}"
        )

    def notes(self, split: Split) -> list[str]:
        """Of holes in the heap, and of the default malloc."""
        if self.subject.mmap_threshold_bytes is not None:
            return self._notes_of_holes()
        whose = process_memory.malloc_name()
        if whose != "glibc":
            return [
                f"malloc is {whose}, not the C library's: it keeps freed memory in its own way, which no recording "
                f"shows, so {self.malloc_overhead:.0%} of training's memory is added. For a prediction within 1 % "
                "plan and train without it (LD_PRELOAD)."
            ]
        return [
            f"malloc is left at its default: {self.malloc_overhead:.0%} of what training takes is reckoned on top, "
            "for its fragmentation."
        ]

    @property
    def _has_holes(self) -> bool:
        """Whether what ran here before has left holes that are worth a word."""
        return self.subject.filled_bytes >= HOLES_SAID * max(self.budget.bytes, self.baseline_bytes)

    def helps(self, needed_bytes: int) -> list[str]:
        """A process whose heap has no large holes."""
        if not self._has_holes:
            return []
        return [f"a new process, without the {show_bytes(self.subject.filled_bytes)} of holes in this one's heap"]

    def _notes_of_holes(self) -> list[str]:
        if not self._has_holes:
            return []
        return [
            f"{show_bytes(self.subject.filled_bytes)} of this process's heap are holes that what ran here before has "
            "left. They count as taken, since whether a large tensor fits one of them is chance. A new process doesn't "
            "have them, so more fits there: restart the kernel and plan first, or type autoaccum plan."
        ]

    def measure(self, train: Callable[..., None], split: Split) -> CpuMeasurement:
        """Its first micro-batch alone, then two windows."""
        found = self.device.measure(train, (split[:1], split, split))
        if self.present_bytes is None:
            return found
        return replace(found, increment_bytes=found.baseline_bytes + found.increment_bytes - self.present_bytes)

    def confirms(self, split: Split, measured: CpuMeasurement) -> str | None:
        """Within 2 % of the whole; where each size stands for itself, that it fits is all there is to know."""
        predicted = self._predicted_increment(split)
        allowed = AGREES_WITHIN * (self.baseline_bytes + predicted) + self.malloc_overhead * predicted
        if abs(measured.increment_bytes - predicted) <= allowed:
            return None
        told_apart = self.evidence.fallback_reason is None and self.compiled_share == 1 and not self.is_rough
        if not told_apart and self.holds(measured):
            return None
        return f"took {measured.increment_bytes:,} bytes, not {predicted:,}"

    def compared(self, split: Split, measured: CpuMeasurement) -> tuple[int, int]:
        """Both with the base."""
        return self.baseline_bytes + self._predicted_increment(split), self.baseline_bytes + measured.increment_bytes

    @property
    def is_rough(self) -> bool:
        """With another malloc than glibc's, which keeps what it likes."""
        return self.present_bytes is not None

    def holds(self, measured: CpuMeasurement) -> bool:
        """By what it added to the process."""
        return self.baseline_bytes + measured.increment_bytes <= self.usable_bytes

    def _predicted_increment(self, split: Split) -> int:
        """What a window should add to this process as it is."""
        present = (
            self.baseline_bytes + self.own_bytes - self.new_process.heap_free_bytes + self.this_process.heap_free_bytes
        )
        return self.peak_bytes(split, "this_process") - present - self._not_kept_yet(split)

    def _not_kept_yet(self, split: Split) -> int:
        """What a verification's windows keep less than as many whole ones: its first has one micro-batch."""
        return self.growth_bytes(split) - self.growth_bytes(split[:1])

    def compare_compiled(self, split: Split, measured: CpuMeasurement | None) -> None:
        """By what the window itself took; its samples and the process take the same."""
        if measured is None:
            self.compiled_share *= RAN_OUT
            return
        window = self._window(split, self.this_process).peak_bytes
        took = window + measured.increment_bytes - self._predicted_increment(split)
        self.compiled_share *= max(took, window // 10) / window


def look(
    subject: RecordingTarget, request: PlanRequest, evidence: Evidence, sample_bytes: int, own_bytes: int
) -> CpuPredictor:
    """Reads what there is now; `own_bytes` are planning's own, and the optimizer state's that is there already."""
    if process_memory.malloc_name() != "glibc":
        return _with_another_malloc(subject, request, evidence, sample_bytes, own_bytes)
    device = _cpu_of(subject)
    assert subject.before is not None
    base = device.read_baseline(subject.before, evidence.after_first)
    leaked = _leaked(subject, evidence)
    budget = device.read_budget(request.budget, request.headroom)
    malloc_overhead = 0.0 if subject.mmap_threshold_bytes is not None else DEFAULT_MALLOC_OVERHEAD
    baseline_bytes, own = base.bytes - own_bytes - leaked, base.planning_bytes + leaked
    return CpuPredictor(
        subject,
        request,
        evidence,
        baseline_bytes,
        budget,
        sample_bytes,
        malloc_overhead,
        base.new_process,
        base.this_process,
        own,
        leaked_bytes=leaked,
    )


def _with_another_malloc(
    subject: RecordingTarget, request: PlanRequest, evidence: Evidence, sample_bytes: int, own_bytes: int
) -> CpuPredictor:
    """Where nothing says what malloc keeps of freed blocks.

    What it keeps serves again, so it is part of no base: of what the process has after its first window, all that the
    window had at once may be kept.
    """
    assert subject.before is not None
    before = subject.before.outside_bytes
    baseline_bytes = before - own_bytes + observe.state_held(subject.context)
    if evidence.after_first is not None:
        kept = live_peak([Phase(observe.PRELUDE, evidence.first_step_events)])
        baseline_bytes += max(0, evidence.after_first.outside_bytes - kept - before)
    budget = subject.device.read_budget(request.budget, request.headroom)
    return CpuPredictor(
        subject,
        request,
        evidence,
        baseline_bytes,
        budget,
        sample_bytes,
        DEFAULT_MALLOC_OVERHEAD,
        present_bytes=baseline_bytes + own_bytes,
    )


def _cpu_of(subject: RecordingTarget) -> CpuDevice:
    assert isinstance(subject.device, CpuDevice)
    return subject.device


def _leaked(subject: RecordingTarget, evidence: Evidence) -> int:
    """What planning's windows have left behind: all that malloc has handed out more than after the first of them.

    Planning's own objects are part of it. A process that trains begins without either.
    """
    first, then = evidence.first_step, evidence.after_first
    if evidence.growth is None or evidence.growth.undone or first is None or then is None:
        return 0
    now = _cpu_of(subject).read_heap().in_use_bytes - observe.state_held(subject.context)
    by_first = observe.growth_of(
        subject, evidence, (first.micro_batch,) * subject.device.policy.first_step_micro_batches
    )
    since = now - (then.in_use_bytes - evidence.state_at_first_bytes)
    return max(0, since) + by_first
