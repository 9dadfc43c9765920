"""Predict the bytes that the CUDA caching allocator reserves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from ..devices.cuda.allocator_rules import find_rules
from ..devices.cuda.device import CudaDevice, CudaMeasurement
from ..devices.cuda.model_blocks import model_blocks, reserved_bytes_of
from ..phases import BETWEEN, FIRST, LATER, OPTIMIZER, PHASE_TITLES
from ..plan import DeviceSection, PeakRow
from ..simulation import saturation
from ..simulation.cuda_allocator.allocator import EMPTY, AllocatorState, CudaRules
from ..simulation.recording import Event, Recording, kept_blocks
from ..simulation.solver import CAPACITY_MARGIN, Split, largest_micro_batch
from ..simulation.training_run import TrainingReplay
from ..units import show_bytes
from ..window import fp32_accumulation
from . import cuda_budget, cuda_certainty, cuda_learning, cuda_widths, cuda_words
from .evidence import Evidence
from .predictor import DeviceFigures, MemoryPredictor, VerifiedFigures, verified_part
from .resolved_request import ResolvedRequest
from .target import RecordingTarget
from .training_simulator import TrainingSimulator

NEW_PROCESS, THIS_PROCESS = "new_process", "this_process"
BUDGET_RESOLUTION_BYTES = 2 << 20
BUDGET_STEPS = 4096  # of a peak: each further one replays a window twice


@dataclass
class CudaPredictor(MemoryPredictor):
    """Predict reserved bytes by replaying training runs.

    Attributes:
        model_events: The allocations of the model as a new process makes them.
        start: What the allocator holds in this process.
        rules: The allocator's settings.
        rules_remark: Where its rule for equal blocks comes from, if not from torch's version.
        by_program: Predictors by other programs that the recordings leave open (cuda_certainty.py).
    """

    model_events: tuple[Event, ...] = ()
    start: AllocatorState = EMPTY
    rules: CudaRules = field(default_factory=CudaRules)
    rules_remark: str = ""
    _simulators: dict[str, TrainingSimulator] = field(default_factory=dict, init=False, repr=False)
    by_program: dict[int | str, CudaPredictor] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[Split, bool] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for history, start in ((NEW_PROCESS, EMPTY), (THIS_PROCESS, self.start)):
            self._simulators[history] = self.evidence.simulator(TrainingSimulator, self.model_events, self.rules, start)

    @property
    def device(self) -> CudaDevice:
        """The device, which has a caching allocator."""
        device = self.subject.device
        assert isinstance(device, CudaDevice)
        return device

    def replayed(
        self,
        split: Split,
        history: str,
        capacity_bytes: int | None,
        *,
        kept: bool = False,
        expandable: bool | None = None,
        stops_at_retry: bool = False,
    ) -> TrainingReplay:
        """Replay the training run of a split in a process; see `TrainingSimulator.replay`."""
        return self._simulators[history].replay(
            split, capacity_bytes, kept=kept, expandable=expandable, stops_at_retry=stops_at_retry
        )

    # What fits

    def fits(self, split: Split) -> bool:
        """Return whether it fits the budget and its margin in each history."""
        try:
            return any(self.fits_with(split, kept) for kept in self._workspace_choices(split))
        except LookupError:
            return False

    def fits_with(self, split: Split, kept: bool) -> bool:
        """Return whether it fits with cuBLAS's workspaces kept, or released."""
        return all(self.fits_in(split, history, kept) for history in self.request.histories)

    def fits_in(self, split: Split, history: str, kept: bool) -> bool:
        """Return whether it fits in one process, without lasting retries."""
        tight = self.replayed(split, history, self.as_uncompiled(self.usable_bytes), kept=kept)
        if not tight.fits or not any(tight.retries):
            return tight.fits  # without a retry, more capacity changes nothing
        return self.replayed(split, history, self.as_uncompiled(self.budget.bytes), kept=kept).fits

    def fits_surely(self, split: Split) -> bool:
        """Return whether it fits by every program that recordings leave open."""
        return all(predictor.fits(split) for predictor in cuda_certainty.every_end(self, split[0]))

    def is_sure_to_fit(self, n: int) -> bool:
        """Return whether recording at n samples is sure to fit."""
        if self.evidence.recordings and self.evidence.has_program:
            return cuda_certainty.is_sure_to_record(self, n)
        small = self.evidence.small_recording
        if self.evidence.recordings or small is None or n <= small.micro_batch:
            return super().is_sure_to_fit(n)
        steady = self.static_bytes
        peak = self.replayed((small.micro_batch,) * 2, NEW_PROCESS, None).peak_reserved_bytes
        return steady + (peak - steady) * n // small.micro_batch <= self.usable_bytes

    def floor(self, n: int) -> int:
        """Return the live bytes of a first micro-batch."""
        return self._simulators[NEW_PROCESS].floor_bytes(n, later=False)

    def later_floor(self, n: int) -> int:
        """Return the live bytes of a later micro-batch."""
        return self._simulators[NEW_PROCESS].floor_bytes(n, later=True)

    # Whether cuBLAS keeps its workspaces

    def _workspace_choices(self, split: Split) -> tuple[bool, ...]:
        """Return the choices for cuBLAS's workspaces, the likelier one first."""
        return (False, True) if self._simulators[NEW_PROCESS].has_workspaces(split) else (True,)

    def keeps(self, split: Split) -> bool:
        """Return whether workspaces are kept: the choice that reserves less."""
        if split not in self._kept:
            try:
                choices = self._workspace_choices(split)
            except LookupError:
                return False
            fitting = [kept for kept in choices if len(choices) > 1 and self.fits_with(split, kept)] or choices
            self._kept[split] = min(fitting, key=lambda kept: (self._worst_peak(split, kept), kept))
        return self._kept[split]

    def _worst_peak(self, split: Split, kept: bool) -> int:
        return max(self.peak_with(split, history, kept) for history in self.request.histories)

    def settle(self, split: Split, part: Split) -> None:
        """Treat workspaces in the verified part as in its whole window."""
        self._kept[part] = self.keeps(split)

    def ran_as_chosen(self, split: Split, measured: CudaMeasurement) -> bool:
        """Return whether workspaces were kept, or released, as they will be."""
        return measured.kept == self.keeps(split)

    # Peaks

    def as_uncompiled(self, capacity_bytes: int) -> int:
        """Return the uncompiled window's capacity for a compiled one's."""
        if self.compiled_share == 1:
            return capacity_bytes
        return self.baseline_bytes + int((capacity_bytes - self.baseline_bytes) / self.compiled_share)

    def as_compiled(self, peak_bytes: int) -> int:
        """Return the compiled window's peak for an uncompiled one's."""
        if self.compiled_share == 1:
            return peak_bytes
        return self.baseline_bytes + int((peak_bytes - self.baseline_bytes) * self.compiled_share)

    def input_bytes(self, samples: int) -> int:
        """Return 0: samples wait on the host until their micro-batch."""
        return 0

    def peak_bytes(self, split: Split, history: str) -> int:
        """Return the most that is reserved, within the budget where possible."""
        return self.peak_with(split, history, self.keeps(split))

    def peak_with(self, split: Split, history: str, kept: bool) -> int:
        """Return the most that is reserved where workspaces are kept, or released."""
        unlimited = self.replayed(split, history, None, kept=kept)
        capacity = self.as_uncompiled(self.budget.bytes)
        if unlimited.peak_reserved_bytes <= capacity:
            return self.as_compiled(unlimited.peak_reserved_bytes)
        limited = self.replayed(split, history, capacity, kept=kept)
        return self.as_compiled((limited if limited.fits else unlimited).peak_reserved_bytes)

    def needed_bytes(self, split: Split) -> int:
        """Return the smallest budget that it fits, with retries."""
        split = verified_part(split)  # a fourth micro-batch of one size repeats the third
        histories = self.request.histories
        unlimited = max(self.replayed(split, history, None).peak_reserved_bytes for history in histories)
        low, high = 0, int(unlimited / (1 - CAPACITY_MARGIN)) + 1
        while high - low > max(BUDGET_RESOLUTION_BYTES, unlimited // BUDGET_STEPS):
            middle = (low + high) // 2
            fits = replace(self, budget=replace(self.budget, bytes=middle)).fits(split)
            low, high = (low, middle) if fits else (middle, high)
        return high

    @property
    def static_bytes(self) -> int:
        """Bytes of parameters, buffers, gradients and optimizer state."""
        model = sum(event.bytes for event in self.model_events)
        return model + self.subject.gradient_bytes + self.evidence.state_bytes

    def phases(self, split: Split) -> dict[str, int]:
        """Return the peak of each phase in a new process."""
        kept = self.keeps(split)
        found = self.replayed(split, NEW_PROCESS, None, kept=kept)
        if found.peak_reserved_bytes > self.budget.bytes:
            found = self.replayed(split, NEW_PROCESS, self.budget.bytes, kept=kept)
        return {name: size for name, size in found.phases.items() if name in PHASE_TITLES}

    def row(self, n: int) -> PeakRow:
        """Return the peaks of windows of two micro-batches, unlimited."""
        peaks = self.replayed((n, n), NEW_PROCESS, None).phases
        above = {name: max(0, size - self.baseline_bytes) for name, size in peaks.items()}
        return PeakRow(n, above[FIRST], above[LATER], above[OPTIMIZER], above.get(BETWEEN, 0))

    # Fields and words of the plan

    @property
    def limit_words(self) -> str:
        """The whole budget: the allocator fills it before it releases memory."""
        return f"{show_bytes(self.budget.bytes)}, and would with {100 * CAPACITY_MARGIN:.0f} % less too"

    @property
    def baseline_words(self) -> str:
        """What the baseline consists of."""
        return "the model"

    def device_figures(self, split: Split, largest: int) -> DeviceFigures:
        """Return GPU, retries, and what other allocator settings would allow."""
        limited = self.replayed(split, self.request.histories[0], self.budget.bytes, kept=self.keeps(split))
        device, threshold = self.device, self.subject.mmap_threshold_bytes
        figures = DeviceFigures(
            DeviceSection(device.name, not device.computes, threshold, self.keeps(split)),
            retries=limited.retries,
            this_process_peak_bytes=self.peak_bytes(split, THIS_PROCESS),
            plain_loop_peak_bytes=None if self.sums_wide(split) else self.peak_with(split, NEW_PROCESS, kept=True),
            varied=cuda_widths.segments_to_reserve(self, self._simulators[NEW_PROCESS], split),
        )
        if not self.request.explained:
            return figures
        return replace(
            figures,
            largest_without_retries=self._largest(largest, expandable=None),
            largest_with_expandable_segments=self._largest(None, expandable=True),
        )

    def sums_wide(self, split: Split) -> bool:
        """Return whether gradients add up wider than in a plain loop."""
        context = self.subject.context
        return bool(fp32_accumulation.wide_parameters(context.model.parameters(), context.accumulate, len(split)))

    def _largest(self, most: int | None, *, expandable: bool | None) -> int | None:
        """Return the largest micro-batch without retries.

        Expandable segments are set before a process begins, so they are predicted for a new process alone.
        """
        if self.evidence.fallback_reason is not None:
            return None
        histories = self.request.histories if expandable is None else (NEW_PROCESS,)

        def fits(split: Split) -> bool:
            found = (
                predictor.replayed(split, history, self.usable_bytes, expandable=expandable, stops_at_retry=True)
                for predictor in cuda_certainty.every_end(self, split[0])
                for history in histories
            )
            return all(each.out_of_memory is None and not any(each.retries) for each in found)

        reach = most or self.request.most
        return largest_micro_batch(fits, self.later_floor, budget_bytes=self.usable_bytes, max_size=reach) or None

    def verified_figures(self, measured: CudaMeasurement, split: Split) -> VerifiedFigures:
        """Return the allocator's counts, and the time unless the GPU is virtual."""
        seconds = measured.seconds * sum(split) / (2 * sum(verified_part(split)))
        return VerifiedFigures(
            measured_peak_bytes=measured.peak_bytes,
            allocated_peak_bytes=measured.allocated_bytes,
            window_seconds=seconds if self.device.computes else None,
        )

    def reasons(self, split: Split) -> dict[str, str]:
        """Return the reasons, in reserved bytes."""
        return cuda_words.reasons(self.budget)

    def notes(self, split: Split) -> list[str]:
        """Return notes about retries, the plain loop, cuDNN and the virtual GPU."""
        return cuda_words.notes(self, split)

    def shortfall(self, split: Split) -> str:
        """Return what it needs unlimited, and where the budget fails."""
        return cuda_words.shortfall(self, split)

    def remedies(self, needed_bytes: int) -> list[str]:
        """Return over how many devices the static memory needs sharding."""
        return cuda_words.sharding(self, needed_bytes)

    # Verification and learning

    @property
    def verified_within_bytes(self) -> int | None:
        """What verified windows may reserve; None for no limit."""
        return self.budget.bytes

    def measure(self, train: Callable[..., None], split: Split) -> CudaMeasurement:
        """Run three windows: the first of all, and two that follow."""
        context = self.subject.context
        context.keeps_workspaces = kept = self.keeps(split)
        try:
            return replace(self.device.measure(train, [split] * 3), kept=kept)
        finally:
            context.keeps_workspaces = False  # recordings release them, and predict both choices

    def limited(self) -> AbstractContextManager[None]:
        """Limit the device to the budget, where that isn't the device's own."""
        return contextlib.nullcontext()

    def confirms(self, split: Split, measured: CudaMeasurement) -> str | None:
        """Return how the measurement contradicts the prediction, or None."""
        return cuda_learning.contradiction(self, split, measured)

    def predicted_and_measured(self, split: Split, measured: CudaMeasurement) -> tuple[int, int]:
        """Return the predicted and the measured peak, in reserved bytes."""
        expected = self.replayed(split, THIS_PROCESS, self.verified_within_bytes, kept=measured.kept)
        return expected.peak_reserved_bytes, measured.peak_bytes

    def holds(self, measured: CudaMeasurement) -> bool:
        """Return whether the windows stayed within the budget without lasting retries."""
        return not measured.retries[-1] and measured.peak_bytes <= self.budget.bytes

    def lost_memory(self) -> bool:
        """Read the budget again; return whether less is available than before."""
        return cuda_budget.lost_memory(self)

    @property
    def may_saturate(self) -> bool:
        """Whether a large block still grows in steps at the largest recording."""
        return self.evidence.has_program and saturation.may_saturate(self.evidence.program())

    def forget(self) -> None:
        """Drop the choices about workspaces, and the predictors of other ends."""
        self.by_program.clear()
        self._kept.clear()

    def teaches(self, split: Split, measured: CudaMeasurement) -> bool:
        """Return whether a large block is unpredicted or grows in steps."""
        return cuda_learning.teaches(self, split, measured)

    def learns(self, split: Split, measured: CudaMeasurement | None) -> bool:
        """Add the verified window's recording where it explains the measurement."""
        return cuda_learning.learn(self, split, measured)

    def correct_compiled_share(self, split: Split, measured: CudaMeasurement | None) -> None:
        """Correct the compiled share by what was reserved above the model."""
        cuda_learning.correct_compiled_share(self, split, measured)


def make_predictor(
    subject: RecordingTarget, request: ResolvedRequest, evidence: Evidence, sample_bytes: int, own_bytes: int
) -> CudaPredictor:
    """Read the allocator and the budget, and make a predictor.

    Args:
        subject: What is planned.
        request: What is asked for.
        evidence: What was recorded.
        sample_bytes: Bytes that each further sample adds to a batch.
        own_bytes: Planning's own host memory, which is not on this device.
    """
    context, device = subject.context, subject.device
    assert isinstance(device, CudaDevice)
    resumed = evidence.first_step is not None and not _makes_state(evidence.first_step)
    model_events = subject.model_events or model_blocks(context.model, context.optimizer if resumed else None)
    rules, start = device.read_rules(), device.read_allocator()
    leaked = 0
    if evidence.growth is not None and not evidence.growth.undone:  # left by planning's own windows
        model_bytes = sum(event.bytes for event in kept_blocks(model_events))
        leaked = max(0, start.allocated_bytes - model_bytes - subject.held_state_bytes)
    return CudaPredictor(
        subject=subject,
        request=request,
        evidence=evidence,
        baseline_bytes=reserved_bytes_of(model_events, rules),
        budget=cuda_budget.read_budget(device, request),
        sample_bytes=sample_bytes,
        model_events=model_events,
        start=start,
        rules=rules,
        rules_remark=cuda_words.rules_remark(find_rules(device.index)),
        leaked_bytes=leaked,
    )


def _makes_state(first_step: Recording) -> bool:
    """Return whether the first optimizer step allocated anything that stays.

    Where it did not, the optimizer had its state before: a new process that resumes loads it with the model.
    """
    events = [event for phase in first_step.phases if phase.name == OPTIMIZER for event in phase.events]
    freed = {event.block for event in events if event.bytes <= 0}
    return any(event.bytes > 0 and event.block not in freed for event in events)
