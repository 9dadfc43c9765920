"""Predict a window's peak memory: what all kinds of devices share.

Each memory model has a subclass: `planning/predictor_cpu.py` for malloc, `planning/predictor_cuda.py` for a caching
allocator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..budget import Budget
from ..plan import DeviceSection, PeakRow, SegmentRow
from ..simulation.recording import Phase, kept_blocks, live_peak
from ..simulation.solver import CAPACITY_MARGIN, Solution, Split, is_even
from ..units import show_bytes
from .evidence import Evidence
from .record import FIRST_STEP_SAMPLES
from .resolved_request import ResolvedRequest
from .target import RecordingTarget
from .windows import FIRST_STEP, WindowSimulator, window_simulator

VERIFIED_STEPS = 3  # micro-batches of a verified window: a fourth repeats the third
OUT_OF_MEMORY_FACTOR = 1.25  # by which the compiled share grows where a compiled window ran out of memory
FAR_OFF_FRACTION = 0.1  # of the measured peak: from there on, a prediction is corrected even where its window fitted
AGREEMENT_FRACTION = 0.02  # of the predicted peak: a measurement within it confirms the prediction


@dataclass(frozen=True)
class DeviceFigures:
    """A plan's figures that depend on the device; defaults: a CPU's."""

    device: DeviceSection
    retries: tuple[int, ...] = ()
    this_process_peak_bytes: int | None = None
    plain_loop_peak_bytes: int | None = None
    varied: tuple[tuple[SegmentRow, ...], int | None] = (), None
    largest_without_retries: int | None = None
    largest_with_expandable_segments: int | None = None


@dataclass(frozen=True)
class VerifiedFigures:
    """A plan's figures that verification measured; defaults: no verification."""

    measured_peak_bytes: int | None = None
    resident_peak_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    window_seconds: float | None = None
    kernel_time_fraction: float | None = None


@dataclass
class MemoryPredictor(ABC):
    """Predict the peak memory of windows from evidence, within a budget.

    Attributes:
        subject: What is planned.
        request: What is asked for.
        evidence: What was recorded.
        baseline_bytes: Memory in use before training begins.
        budget: What training may use.
        sample_bytes: Bytes that each further sample adds to a batch.
        malloc_overhead: Fraction of training's memory that is added for malloc's fragmentation.
        compiled_share: Memory of a compiled window as a fraction of the uncompiled one that was recorded. Verification
            measures it; 1 where nothing is compiled.
        leaked_bytes: What planning's own windows left behind in this process, where a window keeps memory.
        remark: A note from verification for the plan.
    """

    subject: RecordingTarget
    request: ResolvedRequest
    evidence: Evidence
    baseline_bytes: int
    budget: Budget
    sample_bytes: int
    malloc_overhead: float = 0.0
    compiled_share: float = field(default=1.0, kw_only=True)
    leaked_bytes: int = field(default=0, kw_only=True)
    remark: str = field(default="", kw_only=True)

    @property
    def windows(self) -> WindowSimulator:
        """The simulator of single windows."""
        return window_simulator(self.subject, self.evidence)

    # What fits

    @property
    def usable_bytes(self) -> int:
        """The budget less a margin of 2 %."""
        return int(self.budget.bytes * (1 - CAPACITY_MARGIN))

    @abstractmethod
    def fits(self, split: Split) -> bool:
        """Return whether the window fits within the budget and its margin."""

    def fits_surely(self, split: Split) -> bool:
        """Return whether the window fits in each case that recordings leave open."""
        return self.fits(split)

    @abstractmethod
    def floor(self, n: int) -> int:
        """Return a lower bound for windows whose first micro-batch has n samples."""

    @abstractmethod
    def later_floor(self, n: int) -> int:
        """Return a lower bound for windows with a later micro-batch of n."""

    def is_sure_to_fit(self, n: int) -> bool:
        """Return whether recording at n samples fits, by the most pessimistic estimate."""
        evidence = self.evidence
        room = self.usable_bytes - self.baseline_bytes - self.input_bytes(2 * n) - self.leaked_bytes
        if evidence.recordings and evidence.has_program:
            return self.windows.replay((n, n)).peak_bytes <= room
        gradients = self.subject.gradient_bytes
        steady = gradients + evidence.state_bytes  # independent of the batch
        if evidence.recordings:
            known = evidence.recordings[-1].micro_batch
            of_known = [note for note in evidence.notes if note.micro_batch == known]
            peak = (of_known or evidence.notes)[-1].measured_bytes
        else:
            # The first step makes gradients and state itself: only the rest depends on the batch.
            kept = {event.block for event in kept_blocks(evidence.first_step_events)}
            passing = tuple(event for event in evidence.first_step_events if event.block not in kept)
            known = evidence.first_step.micro_batch if evidence.first_step is not None else FIRST_STEP_SAMPLES
            peak = steady + max(0, live_peak([Phase(FIRST_STEP, passing)]) - gradients)
        scaling = max(peak - steady, peak // 10)  # pessimistic: all the rest grows with the batch
        return peak + scaling * max(0, n - known) // known <= room

    # Peaks

    @abstractmethod
    def input_bytes(self, samples: int) -> int:
        """Return the device memory of a window's waiting samples."""

    @abstractmethod
    def peak_bytes(self, split: Split, history: str) -> int:
        """Return the peak of a window in a "new_process" or in "this_process".

        Raises:
            LookupError: There is neither a program nor a recording that large.
        """

    def growth_bytes(self, split: Split) -> int:
        """Return the bytes that each window keeps permanently."""
        return self.windows.growth_bytes(split)

    def kept_bytes(self, split: Split) -> int:
        """Return what earlier windows kept, which is in no phase's peak."""
        return 0

    def worst_bytes(self, split: Split) -> int:
        """Return the highest peak among the histories that the plan is for."""
        worst = max(self.peak_bytes(split, history) for history in self.request.histories)
        return worst + int(self.malloc_overhead * (worst - self.baseline_bytes))

    def needed_bytes(self, split: Split) -> int:
        """Return the smallest budget that the window fits."""
        return int(self.worst_bytes(split) / (1 - CAPACITY_MARGIN)) + 1

    @abstractmethod
    def phases(self, split: Split) -> Mapping[str, int]:
        """Return the peak of each phase in a new process."""

    @abstractmethod
    def row(self, n: int) -> PeakRow:
        """Return the unlimited peaks above the baseline of micro-batches of n."""

    # Fields and words of the plan

    @property
    def limit_words(self) -> str:
        """The limit that a window has to fit, in words."""
        return f"{show_bytes(self.usable_bytes)}, the budget less {100 * CAPACITY_MARGIN:.0f} %"

    @property
    @abstractmethod
    def baseline_words(self) -> str:
        """What the baseline consists of, in words."""

    @abstractmethod
    def device_figures(self, split: Split, largest: int) -> DeviceFigures:
        """Return the plan's figures that depend on the device."""

    @abstractmethod
    def verified_figures(self, measured: Any, split: Split) -> VerifiedFigures:
        """Return the figures of a plan that its verification run measured."""

    @abstractmethod
    def reasons(self, split: Split) -> dict[str, str]:
        """Return the reasons for baseline, input, history and budget."""

    @abstractmethod
    def notes(self, split: Split) -> list[str]:
        """Return further notes for the reader of the plan."""

    def shortfall(self, split: Split) -> str:
        """Return what a window would need, to end a sentence with."""
        return f"would need {show_bytes(self.worst_bytes(split))}"

    def remedies(self, needed_bytes: int) -> list[str]:
        """Return remedies of this kind of device where nothing fits."""
        return []

    # Verification

    def settle(self, split: Split, part: Split) -> None:
        """Choose for the verified part what was chosen for its whole window."""
        return

    def ran_as_chosen(self, split: Split, measured: Any) -> bool:
        """Return whether the measured windows were run as the window will be."""
        return True

    @abstractmethod
    def measure(self, train: Callable[..., None], split: Split) -> Any:
        """Run the first optimizer step and two windows, and measure them.

        Args:
            train: Trains one window of a split; takes an `on_phase` too, as `step.train_window` does.
            split: The micro-batches of the window.
        """

    @abstractmethod
    def confirms(self, split: Split, measured: Any) -> str | None:
        """Return how a measurement contradicts the prediction; None where it confirms it."""

    @abstractmethod
    def holds(self, measured: Any) -> bool:
        """Return whether the measured windows stayed within the budget."""

    @abstractmethod
    def predicted_and_measured(self, split: Split, measured: Any) -> tuple[int, int]:
        """Return the predicted and the measured peak of a verified window."""

    def describe_mismatch(self, split: Split, measured: Any) -> str | None:
        """Describe a prediction far off from a window that fitted, or None."""
        if self.evidence.fallback_reason is None and not self.is_incomplete:
            return None
        predicted, peak = self.predicted_and_measured(split, measured)
        if abs(predicted - peak) <= FAR_OFF_FRACTION * peak:
            return None
        way = "less" if peak < predicted else "more"
        return (
            f"Windows used {way} memory than their recordings: {show_bytes(peak)}, not {show_bytes(predicted)}. "
            "These figures are corrected by the measurement."
        )

    def lost_memory(self) -> bool:
        """Read the budget again where it can shrink; return whether it did."""
        return False

    # Learning

    @property
    def is_incomplete(self) -> bool:
        """Whether recordings miss memory that only a run shows."""
        return False

    @property
    def may_saturate(self) -> bool:
        """Whether a large block grows in steps without a known end."""
        return False

    def forget(self) -> None:
        """Drop the choices that were made by earlier evidence."""
        return

    def teaches(self, split: Split, measured: Any) -> bool:
        """Return whether a confirmed window shows something new."""
        return False

    def learns(self, split: Split, measured: Any) -> bool:
        """Add a verified window to the evidence where that explains it."""
        return False

    @abstractmethod
    def correct_compiled_share(self, split: Split, measured: Any) -> None:
        """Correct the compiled share; `measured` is None where memory ran out."""

    def try_fewer_steps(
        self, solution: Solution, measured: Any, train: Callable[..., None], start_over: Callable[[], None]
    ) -> tuple[Solution, Any]:
        """Return a solution of fewer steps where trying that is free."""
        return solution, measured


def verified_part(split: Split, *, compiles: bool = False) -> Split:
    """Return the micro-batches to run: the first ones, and a smaller rest.

    Of a compiled window both sizes are run, since each may have a graph of its own.
    """
    if len(split) > VERIFIED_STEPS and (compiles or not is_even(split)):
        return (*split[: VERIFIED_STEPS - 1], split[-1])
    return split[:VERIFIED_STEPS]
