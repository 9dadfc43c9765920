"""The outlook on a CUDA device: bytes that the caching allocator reserves, in a fresh process and in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ..devices.cuda.device import CudaDevice, CudaMeasurement
from ..devices.cuda.model_blocks import model_blocks, reserved_bytes_of
from ..phases import BETWEEN, FIRST, LATER, OPTIMIZER, PHASE_TITLES
from ..plan import DeviceSection, PeakRow
from ..simulation import saturation
from ..simulation.cuda_allocator.allocator import EMPTY, AllocatorState, CudaRules
from ..simulation.from_verification import distinct_recordings, verified_recording, with_released_workspaces
from ..simulation.program import StepProgram, as_recorded, plain_window
from ..simulation.recording import Event, Recording, kept_blocks, live_peak
from ..simulation.solver import CAPACITY_MARGIN, Split, largest_micro_batch
from ..simulation.training_run import (
    MAX_WINDOWS,
    Training,
    TrainingReplay,
    replay_training,
    training_of,
    with_kept_workspaces,
)
from ..units import show_bytes
from ..window import fp32_accumulation
from . import observe
from .growth import WINDOWS
from .observe import Evidence, RecordingTarget
from .predictor import AGREES_WITHIN, RAN_OUT, DeviceFigures, MemoryPredictor, VerifiedFigures, verified_part
from .request import PlanRequest

THIS_PROCESS = "this_process"
MOST_REMEMBERED = 4096  # replays
MOST_ENDS = 8  # of what grows in steps, that a size has to fit with
_Key = tuple[Split, str, int | None, bool, bool, bool]


@dataclass
class CudaPredictor(MemoryPredictor):
    """What is there to be used, and what is known so far.

    Attributes:
        build: The model's blocks as a fresh process makes them.
        start: What the allocator holds here.
        settings: How the allocator is set.
    """

    build: tuple[Event, ...] = ()
    start: AllocatorState = EMPTY
    settings: CudaRules = field(default_factory=CudaRules)
    _replays: dict[_Key, TrainingReplay] = field(default_factory=dict)
    _floors: dict[tuple[int, bool], int] = field(default_factory=dict)
    _trainings: dict[int, Training] = field(default_factory=dict)
    _ended: dict[int, CudaPredictor] = field(default_factory=dict, init=False)
    _kept: dict[Split, bool] = field(default_factory=dict, init=False)

    @property
    def device(self) -> CudaDevice:
        """Return the device, which has a caching allocator."""
        device = self.subject.device
        assert isinstance(device, CudaDevice)
        return device

    def input_bytes(self, samples: int) -> int:
        """Samples wait on the host; those of one micro-batch at a time are on the device, and recorded."""
        return 0

    def fits(self, split: Split) -> bool:
        """Whether it fits as it is and with 2 % less, in each history, without a retry once windows are alike."""
        try:
            return any(self._fits(split, kept) for kept in self._choices(split))
        except LookupError:
            return False

    def _fits(self, split: Split, kept: bool) -> bool:
        return all(self._fits_in(split, history, kept) for history in self.request.histories)

    def _fits_in(self, split: Split, history: str, kept: bool) -> bool:
        tight = self.replayed(split, history, self._as_written(self.usable_bytes), kept=kept)
        if not tight.fits or not any(tight.retries):
            return tight.fits  # without a retry it never came near the capacity, and more of it changes nothing
        return self.replayed(split, history, self._as_written(self.budget.bytes), kept=kept).fits

    def _choices(self, split: Split) -> tuple[bool, ...]:
        """Whether cuBLAS's workspaces are kept: what can be chosen, the likelier one first."""
        training, _ = self._training(split)
        return (False, True) if training.program.workspaces else (True,)

    def keeps(self, split: Split) -> bool:
        """Whether cuBLAS's workspaces are kept: as fits, and takes less; not, where nothing as large was recorded."""
        if split not in self._kept:
            try:
                choices = self._choices(split)
            except LookupError:
                return False
            fitting = [kept for kept in choices if len(choices) > 1 and self._fits(split, kept)] or choices
            self._kept[split] = min(fitting, key=lambda kept: (self._most(split, kept), kept))
        return self._kept[split]

    def settle(self, split: Split, part: Split) -> None:
        """Workspaces are kept or given back in the part as they are in the window."""
        self._kept[part] = self.keeps(split)

    def ran_as_chosen(self, split: Split, measured: CudaMeasurement) -> bool:
        """Whether cuBLAS's workspaces were kept, or given back, as they will be."""
        return measured.kept == self.keeps(split)

    def _most(self, split: Split, kept: bool) -> int:
        return max(self._peak(split, history, kept) for history in self.request.histories)

    def fits_surely(self, split: Split) -> bool:
        """Whether it fits wherever what grows in steps comes to its end."""
        return all(predictor.fits(split) for predictor in self._with_every_end(split[0]))

    def _with_every_end(self, n: int) -> Iterator[CudaPredictor]:
        """This one, and where n is more than was recorded, those in which what steps ends in between."""
        yield self
        if not self.evidence.has_program:
            return
        program = self.evidence.program()
        for steps in range(min(MOST_ENDS, saturation.steps_until(program, n)) if n > program.recorded_at else 0):
            if steps not in self._ended:
                evidence = replace(
                    self.evidence, _program=saturation.saturated_after(program, steps), memo={}, _replays={}
                )
                self._ended[steps] = replace(self, evidence=evidence, _replays={}, _floors={}, _trainings={})
            yield self._ended[steps]

    def _as_written(self, capacity_bytes: int) -> int:
        """The capacity in which the recorded window does what the compiled one does in this."""
        if self.compiled_share == 1:
            return capacity_bytes
        return self.baseline_bytes + int((capacity_bytes - self.baseline_bytes) / self.compiled_share)

    def _as_compiled(self, peak_bytes: int) -> int:
        """What the compiled window comes to where the recorded one comes to this."""
        if self.compiled_share == 1:
            return peak_bytes
        return self.baseline_bytes + int((peak_bytes - self.baseline_bytes) * self.compiled_share)

    def is_sure_to_fit(self, n: int) -> bool:
        """By the allocator's rules once there is a program, a retry now and then included; before, pessimistically."""
        if self.evidence.recordings and self.evidence.has_program:
            room = self.usable_bytes - self.leaked_bytes
            unlimited = self.replayed((n, n), "new_process", None).peak_reserved_bytes <= room
            return unlimited or self.replayed((n, n), "new_process", room).out_of_memory is None
        scouted = self.evidence.scouted
        if self.evidence.recordings or scouted is None or n <= scouted.micro_batch:
            return super().is_sure_to_fit(n)
        steady = self._static_bytes()
        there = self.replayed((scouted.micro_batch,) * 2, "new_process", None).peak_reserved_bytes
        return steady + (there - steady) * n // scouted.micro_batch <= self.usable_bytes

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
        """The training run of a split by the allocator's rules; `kept` are cuBLAS's workspaces, or given back.

        Raises:
            LookupError: Nothing as large was recorded, and nothing follows from what was.
        """
        expandable = self.settings.expandable_segments if expandable is None else expandable
        key = split, history, capacity_bytes, kept, expandable, stops_at_retry
        known = self._replays if history == THIS_PROCESS else self.evidence.memo
        if key not in known:
            training, sizes = self._training(split)
            found = replay_training(
                with_kept_workspaces(training) if kept else training,
                sizes,
                replace(self.settings, capacity_bytes=capacity_bytes, expandable_segments=expandable),
                start=self.start if history == THIS_PROCESS else EMPTY,
                windows=MAX_WINDOWS if self.evidence.growth is None else WINDOWS,
                stops_at_retry=stops_at_retry,
            )
            if len(known) > MOST_REMEMBERED:
                known.clear()
            known[key] = found
        return known[key]

    def _training(self, split: Split) -> tuple[Training, Split]:
        evidence = self.evidence
        if evidence.has_program:
            return self._made(0, evidence.program), split
        recording = next((each for each in evidence.known if each.micro_batch >= split[0]), None)
        if recording is None:
            raise LookupError(f"nothing was recorded at {split[0]} samples or more")
        size = recording.micro_batch
        return self._made(size, lambda: as_recorded(recording, evidence.first_step_events)), (size,) * len(split)

    def _made(self, key: int, program: Callable[[], StepProgram]) -> Training:
        if key not in self._trainings:
            assert self.evidence.first_step is not None
            self._trainings[key] = training_of(program(), self.evidence.first_step, self.build)
        return self._trainings[key]

    def peak_bytes(self, split: Split, history: str) -> int:
        """The most that is reserved: within the budget where that fits, else what it would come to without one."""
        return self._peak(split, history, self.keeps(split))

    def _peak(self, split: Split, history: str, kept: bool) -> int:
        unlimited = self.replayed(split, history, None, kept=kept)
        capacity = self._as_written(self.budget.bytes)
        if unlimited.peak_reserved_bytes <= capacity:
            return self._as_compiled(unlimited.peak_reserved_bytes)
        limited = self.replayed(split, history, capacity, kept=kept)
        return self._as_compiled((limited if limited.fits else unlimited).peak_reserved_bytes)

    def needed_bytes(self, split: Split) -> int:
        """The smallest budget that the window fits; below what it takes without a limit, since a retry makes room."""
        low, high = (
            0,
            max(self.replayed(split, history, None).peak_reserved_bytes for history in self.request.histories),
        )
        high = int(high / (1 - CAPACITY_MARGIN)) + 1
        while high - low > 2 << 20:
            middle = (low + high) // 2
            fits = replace(self, budget=replace(self.budget, bytes=middle), _replays={}).fits(split)
            low, high = (low, middle) if fits else (middle, high)
        return high

    def misses(self, split: Split) -> str:
        """What it would take without a limit, and where it fails within what may be used."""
        kept, histories = self.keeps(split), self.request.histories
        needed = max(self.replayed(split, history, None, kept=kept).peak_reserved_bytes for history in histories)
        told = f"would need {show_bytes(self._as_compiled(needed))}"
        for capacity in (self.usable_bytes, self.budget.bytes):
            for history in histories:
                found = self.replayed(split, history, self._as_written(capacity), kept=kept)
                if found.out_of_memory is not None:
                    where = PHASE_TITLES.get(found.out_of_memory, found.out_of_memory)
                    return f"{told} (within {show_bytes(capacity)} memory runs out: {where})"
                if not found.fits:
                    return f"{told} (within {show_bytes(capacity)} every window empties the allocator's cache)"
        return told

    def helps(self, needed_bytes: int) -> list[str]:
        """Over how many devices parameters, gradients and state would have to be sharded."""
        static = self._static_bytes()
        for devices in (2, 4, 8, 16, 32, 64):
            if needed_bytes - static + static // devices <= self.budget.bytes:
                return [
                    f"sharded over {devices} such devices it would (reckoned: parameters, gradients and optimizer "
                    f"state are {show_bytes(static)} of it)"
                ]
        return []

    def _static_bytes(self) -> int:
        """Parameters, buffers, gradients and optimizer state."""
        gradients = sum(p.nbytes for p in self.subject.context.model.parameters() if p.requires_grad)
        return sum(event.bytes for event in self.build) + gradients + self.evidence.state_bytes

    def floor(self, n: int) -> int:
        """What is alive at once in a first micro-batch of a window that isn't the first."""
        return self._floor(n, later=False)

    def later_floor(self, n: int) -> int:
        """What is alive at once in a later one."""
        return self._floor(n, later=True)

    def _floor(self, n: int, *, later: bool) -> int:
        if (n, later) not in self._floors:
            self._floors[n, later] = self._floor_of(n, later=later)
        return self._floors[n, later]

    def _floor_of(self, n: int, *, later: bool) -> int:
        if self.evidence.fallback_reason is not None or self.evidence.first_step is None:
            return 0
        training, split = self._training((n, n) if later else (n,))
        held = sum(event.bytes for event in self.build) + training.state_bytes
        return held + live_peak(plain_window(training.program, split)[: len(split)])

    def phases(self, split: Split) -> dict[str, int]:
        """By the replay in a fresh process."""
        kept = self.keeps(split)
        unlimited = self.replayed(split, "new_process", None, kept=kept)
        within = unlimited.peak_reserved_bytes <= self.budget.bytes
        found = unlimited if within else self.replayed(split, "new_process", self.budget.bytes, kept=kept)
        return {name: size for name, size in found.phases.items() if name in PHASE_TITLES}

    def row(self, n: int) -> PeakRow:
        """By the replay of windows of two micro-batches, without a limit."""
        peaks = self.replayed((n, n), "new_process", None).phases
        above = {name: max(0, size - self.baseline_bytes) for name, size in peaks.items()}
        return PeakRow(n, above[FIRST], above[LATER], above[OPTIMIZER], above.get(BETWEEN, 0))

    @property
    def border_words(self) -> str:
        """The allocator fills what there is before it gives anything back, so its peak may be the whole budget."""
        return f"{show_bytes(self.budget.bytes)}, and would with {100 * CAPACITY_MARGIN:.0f} % less too"

    @property
    def base_words(self) -> str:
        """What the base is."""
        return "the model"

    def device_figures(self, split: Split, largest: int) -> DeviceFigures:
        """Return the GPU, the retries, and what other settings of the allocator would allow."""
        limited = self.replayed(split, self.request.histories[0], self.budget.bytes, kept=self.keeps(split))
        device, threshold = self.device, self.subject.mmap_threshold_bytes
        return DeviceFigures(
            DeviceSection(device.name, not device.computes, threshold, self.keeps(split)),
            retries=limited.retries,
            this_process_peak_bytes=self.peak_bytes(split, THIS_PROCESS),
            plain_loop_peak_bytes=None if self._sums_wide(split) else self._peak(split, "new_process", kept=True),
            largest_without_retries=self._largest(largest, expandable=None),
            largest_with_expandable_segments=self._largest(None, expandable=True),
        )

    def _sums_wide(self, split: Split) -> bool:
        """Whether the window's gradients add up in a wider precision than a plain loop's."""
        context = self.subject.context
        return bool(fp32_accumulation.wide_parameters(context.model.parameters(), context.accumulate, len(split)))

    def _largest(self, most: int | None, *, expandable: bool | None) -> int | None:
        """The largest micro-batch that never makes the allocator give its cache back.

        Expandable segments are set before a process begins, so that only a fresh one can have them.
        """
        if self.evidence.fallback_reason is not None:
            return None
        histories = self.request.histories if expandable is None else ("new_process",)

        def fits(split: Split) -> bool:
            found = (
                predictor.replayed(split, history, self.usable_bytes, expandable=expandable, stops_at_retry=True)
                for predictor in self._with_every_end(split[0])
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
        """In reserved bytes."""
        return {
            "baseline_bytes": "reserved for the model's parameters and buffers before training",
            "input_bytes": "none: samples wait on the host, and those of one micro-batch at a time are in its peak",
            "history_bytes": "fragments of what this process had on the device before",
            "budget_bytes": f"what the allocator may reserve ({self.budget.binding_constraint}), less the headroom",
        }

    def notes(self, split: Split) -> list[str]:
        """Of retries, and of what a virtual GPU can't know."""
        notes = []
        retries = self.replayed(split, self.request.histories[0], self.budget.bytes, kept=self.keeps(split)).retries
        if any(retries):
            notes.append(
                f"The allocator runs full in the first windows and gives its cache back ({sum(retries)} in all), which "
                "costs milliseconds, and never again after them. torch may log 'memory allocation failed with OOM' "
                "each time, though what was asked for comes right after."
            )
        if not self._sums_wide(split) and not self._fits_in(split, "new_process", kept=True):
            notes.append(
                "For the Runner: a loop written by hand would come to "
                f"{show_bytes(self._peak(split, 'new_process', kept=True))} in these micro-batches, and not fit."
            )
        if torch.backends.cudnn.benchmark:
            notes.append(
                "cudnn.benchmark is on: the first run at each size tries algorithms with workspaces beyond these "
                "figures, which are of the runs after it. A shorter last window is a new size."
            )
        if not self.device.computes:
            notes.append(
                "Real allocator on a virtual GPU, not measured on one: kernels compute nothing, so time and exactness "
                "are unknown, and workspaces of cuDNN's convolutions are counted as set there (docs/virtual-gpu.md)."
            )
        return notes

    def measure(self, train: Callable[..., None], split: Split) -> CudaMeasurement:
        """Three windows: the first of all, and two that follow."""
        context = self.subject.context
        context.keeps_workspaces = kept = self.keeps(split)
        try:
            return replace(self.device.measure(train, [split] * 3), kept=kept)
        finally:
            context.keeps_workspaces = False  # recordings tell both: what is given back can be left where it is

    def forget(self) -> None:
        """Drops what was replayed."""
        super().forget()
        self._replays.clear()
        self._floors.clear()
        self._trainings.clear()
        self._ended.clear()
        self._kept.clear()

    def confirms(self, split: Split, measured: CudaMeasurement) -> str | None:
        """The retries that were predicted, and the peak within 2 %; that it fits, where that is all there is to know.

        Compiled windows are predicted by a ratio; and without a program, by the next larger size that was recorded.
        """
        expected = self.replayed(split, THIS_PROCESS, self.budget.bytes, kept=measured.kept)
        if (self.compiled_share != 1 or self.evidence.fallback_reason is not None) and self.holds(measured):
            return None
        retries = expected.retries[: len(measured.retries)]
        if measured.retries != retries:
            return f"gave its cache back {measured.retries} times in its windows, not {retries}"
        if abs(measured.peak_bytes - expected.peak_reserved_bytes) > AGREES_WITHIN * expected.peak_reserved_bytes:
            return f"took {measured.peak_bytes:,} bytes, not {expected.peak_reserved_bytes:,}"
        return None

    def compared(self, split: Split, measured: CudaMeasurement) -> tuple[int, int]:
        """In reserved bytes."""
        expected = self.replayed(split, THIS_PROCESS, self.budget.bytes, kept=measured.kept)
        return expected.peak_reserved_bytes, measured.peak_bytes

    def holds(self, measured: CudaMeasurement) -> bool:
        """By what was reserved, and that the last window needed no retry."""
        return not measured.retries[-1] and measured.peak_bytes <= self.budget.bytes

    @property
    def is_open(self) -> bool:
        """Whether a large block steps with the size at the largest recording."""
        return self.evidence.has_program and saturation.may_saturate(self.evidence.program())

    def teaches(self, split: Split, measured: CudaMeasurement) -> bool:
        """Whether it has large blocks that weren't foreseen, or some that step and may end."""
        found = self._as_recording(split, measured)
        return found is not None and (
            self.is_open or not saturation.predicts_large_blocks(self.evidence.program(), found)
        )

    def _as_recording(self, split: Split, measured: CudaMeasurement | None) -> Recording | None:
        if measured is None or measured.recording is None or not self.evidence.has_program:
            return None
        recordings = self.evidence.recordings
        found = verified_recording(measured.recording, split, recordings)
        if found is not None and measured.kept and recordings and recordings[-1].workspaces:
            return with_released_workspaces(found, recordings[-1])  # to be of a kind with the recordings that it joins
        return found

    def learns(self, split: Split, measured: CudaMeasurement | None) -> bool:
        """By the verified window's recording, where that explains what was measured."""
        evidence, found = self.evidence, self._as_recording(split, measured)
        if found is None or measured is None:
            return False
        before = list(evidence.recordings)
        evidence.know([*distinct_recordings(before, found.micro_batch), found])
        self.forget()
        explained = self.confirms(split, measured) is None
        if not explained:
            evidence.know(before)
            self.forget()
        return explained

    def compare_compiled(self, split: Split, measured: CudaMeasurement | None) -> None:
        """By what the windows reserved above the model."""
        if measured is None:
            self.compiled_share *= RAN_OUT
            return
        expected = (
            self.replayed(split, THIS_PROCESS, None, kept=measured.kept).peak_reserved_bytes - self.baseline_bytes
        )
        self.compiled_share = max(measured.peak_bytes - self.baseline_bytes, expected // 10) / expected


def look(
    subject: RecordingTarget, request: PlanRequest, evidence: Evidence, sample_bytes: int, own_bytes: int
) -> CudaPredictor:
    """Reads what there is now."""
    context, device = subject.context, subject.device
    assert isinstance(device, CudaDevice)
    resumed = evidence.first_step is not None and not _makes_state(evidence.first_step)
    build = subject.build or model_blocks(context.model, context.optimizer if resumed else None)
    settings = device.read_rules()
    budget = device.read_budget(request.budget, request.headroom)
    base = reserved_bytes_of(build, settings)
    start = device.read_allocator()
    leaked = 0
    if (
        evidence.growth is not None and not evidence.growth.undone
    ):  # what is there beside the model and its state: planning's own windows left it
        state = observe.state_held(context)
        leaked = max(0, start.allocated_bytes - sum(event.bytes for event in kept_blocks(build)) - state)
    return CudaPredictor(
        subject, request, evidence, base, budget, sample_bytes, 0.0, build, start, settings, leaked_bytes=leaked
    )


def _makes_state(first_step: Recording) -> bool:
    """Whether the very first optimizer step made anything that stays.

    Where it did not, what state the optimizer has was there before: a fresh process that goes on with it loads it.
    """
    events = [event for phase in first_step.phases if phase.name == OPTIMIZER for event in phase.events]
    freed = {event.block for event in events if event.bytes <= 0}
    return any(event.bytes > 0 and event.block not in freed for event in events)
