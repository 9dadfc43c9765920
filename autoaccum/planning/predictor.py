"""What planning knows: what there is to be used, what was observed, and so what a window would come to.

Each kind of device has its own: `planning/predictor_cpu.py`, `planning/predictor_cuda.py`. Here is what they share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..budget import Budget
from ..data import tree
from ..plan import DeviceSection, PeakRow
from ..simulation.recording import Phase, kept_blocks, live_peak
from ..simulation.solver import CAPACITY_MARGIN, Solution, Split, is_even
from ..units import show_bytes
from . import observe
from .observe import Evidence, RecordingTarget
from .request import PlanRequest

VERIFIED_STEPS = 3  # micro-batches of a verified window: a fourth repeats the third
RAN_OUT = 1.25  # times as much as was thought, where a compiled window ran out of memory
FAR_OFF = 0.1  # of the whole peak: a prediction so far from a verification is questioned, even where that held
AGREES_WITHIN = 0.02  # of the whole peak: a verification that differs by more teaches instead of confirming


@dataclass(frozen=True)
class DeviceFigures:
    """Figures of a plan that depend on the kind of device; the defaults are a CPU's."""

    device: DeviceSection
    retries: tuple[int, ...] = ()
    this_process_peak_bytes: int | None = None
    plain_loop_peak_bytes: int | None = None
    largest_without_retries: int | None = None
    largest_with_expandable_segments: int | None = None


@dataclass(frozen=True)
class VerifiedFigures:
    """Figures of a plan that its verification run measured; the defaults are those of a plan without one."""

    measured_peak_bytes: int | None = None
    resident_peak_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    window_seconds: float | None = None
    kernel_time_fraction: float | None = None


@dataclass
class MemoryPredictor(ABC):
    """What is there to be used, and what is known so far.

    Attributes:
        subject: What is planned.
        request: What is asked for.
        evidence: What was recorded.
        baseline_bytes: What is taken before training begins.
        budget: What training may use.
        sample_bytes: What one sample more adds to a batch.
        compiled_share: What a window takes as it was compiled, of what it takes as it was written and recorded: found
            by verifying; 1 where nothing is compiled, or where that makes no difference.
        leaked_bytes: What planning's own windows have left behind in this process, where windows do so.
        remark: What verifying came to, where that has to be said.
    """

    subject: RecordingTarget
    request: PlanRequest
    evidence: Evidence
    baseline_bytes: int
    budget: Budget
    sample_bytes: int
    malloc_overhead: float = 0.0
    compiled_share: float = field(default=1.0, kw_only=True)
    leaked_bytes: int = field(default=0, kw_only=True)
    remark: str = field(default="", kw_only=True)

    @property
    def usable_bytes(self) -> int:
        """What the peak may come to, so that it still fits with a little less."""
        return int(self.budget.bytes * (1 - CAPACITY_MARGIN))

    @abstractmethod
    def input_bytes(self, samples: int) -> int:
        """What the samples of a window take on the device until they are used."""

    @abstractmethod
    def peak_bytes(self, split: Split, history: str) -> int:
        """What the process comes to with that window, in a "new_process" or in "this_process".

        Raises:
            LookupError: Nothing as large was recorded, and nothing follows from what was.
        """

    def growth_bytes(self, split: Split) -> int:
        """What each window keeps for ever."""
        return observe.growth_of(self.subject, self.evidence, split)

    def kept_bytes(self, split: Split) -> int:
        """What a peak has of windows before it, and its phases don't."""
        return 0

    @abstractmethod
    def fits(self, split: Split) -> bool:
        """Whether that window fits, with a little less than there is."""

    def fits_surely(self, split: Split) -> bool:
        """Whether that window fits whatever can't be known without recording as much."""
        return self.fits(split)

    @abstractmethod
    def floor(self, n: int) -> int:
        """Bytes without which no window whose first micro-batch is n can run."""

    @abstractmethod
    def later_floor(self, n: int) -> int:
        """Bytes without which no window that has a later micro-batch of n can run."""

    @abstractmethod
    def phases(self, split: Split) -> Mapping[str, int]:
        """The peak of each phase of a window, in a fresh process."""

    @abstractmethod
    def row(self, n: int) -> PeakRow:
        """What windows of micro-batches of n would take above the base, unlimited by any budget."""

    @property
    def border_words(self) -> str:
        """What a window has to fit."""
        return f"{show_bytes(self.usable_bytes)}, the budget less {100 * CAPACITY_MARGIN:.0f} %"

    @property
    @abstractmethod
    def base_words(self) -> str:
        """What the base is, in words."""

    @abstractmethod
    def device_figures(self, split: Split, largest: int) -> DeviceFigures:
        """Return the figures of a plan that depend on the kind of device."""

    @abstractmethod
    def verified_figures(self, measured: Any, split: Split) -> VerifiedFigures:
        """Return the figures of a plan that its verification run measured."""

    @abstractmethod
    def reasons(self, split: Split) -> dict[str, str]:
        """Why base, data, history and budget are what they are."""

    @abstractmethod
    def notes(self, split: Split) -> list[str]:
        """What else the reader should know."""

    def settle(self, split: Split, part: Split) -> None:
        """Has the part that is run for real be run as the whole window will be."""
        return

    def ran_as_chosen(self, split: Split, measured: Any) -> bool:
        """Whether what was measured was run as the window will be, by what is known now."""
        return True

    @abstractmethod
    def measure(self, train: Callable[..., None], split: Split) -> Any:
        """Runs the first optimizer step and two windows for real, watched.

        Args:
            train: Trains one window of a split; takes an `on_phase` too, as `step.train_window` does.
            split: The micro-batches of the window.
        """

    def forget(self) -> None:
        """Drops what was reckoned from recordings that have been added to."""
        self.evidence.memo.clear()

    @abstractmethod
    def confirms(self, split: Split, measured: Any) -> str | None:
        """What speaks against the prediction, after a window was run for real; None where it was confirmed."""

    @abstractmethod
    def holds(self, measured: Any) -> bool:
        """Whether what was run for real took no more than may be used."""

    def far_off(self, split: Split, measured: Any) -> str | None:
        """Whether the prediction was far from a verification that held, where each size stands for itself; in words."""
        if self.evidence.fallback_reason is None and not self.is_rough:
            return None
        predicted, took = self.compared(split, measured)
        if abs(predicted - took) <= FAR_OFF * took:
            return None
        way = "less" if took < predicted else "more"
        return (
            f"Windows took {way} than their recordings said: {show_bytes(took)}, not {show_bytes(predicted)}. "
            "Figures here are set right by that."
        )

    @abstractmethod
    def compared(self, split: Split, measured: Any) -> tuple[int, int]:
        """What a verified window was predicted to come to, and what it did, of the same history."""

    @property
    def is_rough(self) -> bool:
        """Whether recordings don't show all that windows take, so that only running one tells."""
        return False

    @property
    def is_open(self) -> bool:
        """Whether something grows in steps, and nothing tells yet where that ends."""
        return False

    def teaches(self, split: Split, measured: Any) -> bool:
        """Whether a verified window tells something new though its peak was as predicted."""
        return False

    def learns(self, split: Split, measured: Any) -> bool:
        """Learns from a verified window, by itself; whether that explains it."""
        return False

    @abstractmethod
    def compare_compiled(self, split: Split, measured: Any) -> None:
        """Corrects the share of a compiled window by its verification; `measured` is None where memory ran out."""

    def nearer(
        self, solution: Solution, measured: Any, train: Callable[..., None], start_over: Callable[[], None]
    ) -> tuple[Solution, Any]:
        """A better solution than a confirmed one, where trying costs nothing."""
        return solution, measured

    def helps(self, needed_bytes: int) -> list[str]:
        """What else would help where nothing fits."""
        return []

    def worst_bytes(self, split: Split) -> int:
        """What the process comes to in the worse of the histories that the plan is for."""
        worst = max(self.peak_bytes(split, history) for history in self.request.histories)
        return worst + int(self.malloc_overhead * (worst - self.baseline_bytes))

    def needed_bytes(self, split: Split) -> int:
        """The smallest budget that this window would fit."""
        return int(self.worst_bytes(split) / (1 - CAPACITY_MARGIN)) + 1

    def misses(self, split: Split) -> str:
        """How a window that doesn't fit misses, in words that go on from its sizes."""
        return f"would need {show_bytes(self.worst_bytes(split))}"

    def is_sure_to_fit(self, n: int) -> bool:
        """Whether recording at n can't go over the budget, by the most pessimistic of what is known."""
        evidence = self.evidence
        room = self.usable_bytes - self.baseline_bytes - self.input_bytes(2 * n) - self.leaked_bytes
        if evidence.recordings and evidence.has_program:
            return observe.peak_of(self.subject, evidence, (n, n)).peak_bytes <= room
        gradients = sum(p.nbytes for p in self.subject.context.model.parameters() if p.requires_grad)
        steady = gradients + evidence.state_bytes  # it is there whatever the batch
        if evidence.recordings:
            known, peak = evidence.recordings[-1].micro_batch, evidence.notes[-1].measured_bytes
        else:
            # The first step makes gradients and state itself: only what comes on top of them is of the batch.
            kept = {event.block for event in kept_blocks(evidence.first_step_events)}
            passing = tuple(event for event in evidence.first_step_events if event.block not in kept)
            known = evidence.first_step.micro_batch if evidence.first_step is not None else observe.SCOUT
            peak = steady + max(0, live_peak([Phase(observe.PRELUDE, passing)]) - gradients)
        scaling = max(peak - steady, peak // 10)  # all the rest growing with the batch is the worst there is
        return peak + scaling * max(0, n - known) // known <= room


def bytes_per_sample(subject: RecordingTarget) -> int:
    """What one sample more adds to a batch; what all samples share adds nothing."""
    one, two = (
        sum(leaf.nbytes for _, leaf in tree.leaves(subject.tile(n)) if isinstance(leaf, torch.Tensor)) for n in (1, 2)
    )
    return two - one


def verified_part(split: Split, *, compiles: bool = False) -> Split:
    """The micro-batches of a split that are run for real: its first ones, or where a rest is smaller, that among them.

    Of a compiled window both sizes, as each may be a graph of its own.
    """
    if len(split) > VERIFIED_STEPS and (compiles or not is_even(split)):
        return (*split[: VERIFIED_STEPS - 1], split[-1])
    return split[:VERIFIED_STEPS]
