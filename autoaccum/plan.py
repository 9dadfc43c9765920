"""The plan: a frozen value with a reason behind every chosen number, and its JSON. No torch here."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .budget import Budget
from .files.json_text import to_json

SCHEMA_VERSION = 1
FEWEST_STEPS, FASTEST = OBJECTIVES = ("fewest-steps", "fastest")
KIND = "autoaccum plan"


@dataclass(frozen=True)
class LeafForm:
    """One tensor of a batch: its place, its dtype and its shape without the samples."""

    path: str
    dtype: str
    trailing_shape: tuple[int, ...]


@dataclass(frozen=True)
class PeakRow:
    """What a window of equal micro-batches would take, in bytes above the base, by phase; unlimited by any budget.

    Attributes:
        micro_batch: Samples in each micro-batch.
        first_bytes: Peak of the first micro-batch of a window, when no gradients exist.
        later_bytes: Peak of the later ones, when they do.
        optimizer_bytes: Peak of the optimizer step.
        between_bytes: Peak of what runs between windows; 0 where nothing does.
    """

    micro_batch: int
    first_bytes: int
    later_bytes: int
    optimizer_bytes: int
    between_bytes: int = 0

    def peak_bytes(self, steps: int) -> int:
        """The peak of a window of `steps` of them: with one, there is no later micro-batch."""
        later = self.later_bytes if steps > 1 else 0
        return max(self.first_bytes, later, self.optimizer_bytes, self.between_bytes)


def window_peak_bytes(first: PeakRow, second: PeakRow, last: PeakRow, steps: int) -> int:
    """The peak of a window of `steps` whose first, second and last micro-batches are of those rows' sizes."""
    later = max(second.later_bytes, last.later_bytes) if steps > 1 else 0
    return max(first.first_bytes, later, last.optimizer_bytes, last.between_bytes)


@dataclass(frozen=True)
class RecordingNote:
    """A recording that the plan rests on, and how well it had been predicted by those before it."""

    micro_batch: int
    passes: int
    seconds: float
    measured_bytes: int
    predicted_bytes: int | None = None


@dataclass(frozen=True)
class TimelinePart:
    """What is alive during one phase of the window, thinned out: each figure is the highest of a stretch of events.

    Attributes:
        phase: The phase's name.
        micro_batch: Samples in its micro-batch; of the optimizer step, in the last one.
        events: Allocations and frees that the phase has.
        bytes: Alive above the base, as requested, in order of time; their highest is the phase's highest.
    """

    phase: str
    micro_batch: int
    events: int
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class TimedSize:
    """What an optimizer step of the plan's effective batch took with micro-batches of one size, measured.

    Attributes:
        micro_batch: The largest micro-batch of the split.
        step_seconds: Median of the rounds.
        windows: How many rounds there were.
        round_seconds: What each round came to; those of all sizes belong together by their place (planning/timing.py).
    """

    micro_batch: int
    step_seconds: float
    windows: int
    round_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How to train an effective batch on one device.

    Attributes:
        target_batch: Samples in an optimizer step, over all ranks.
        world_size: Ranks.
        micro_batch: The largest micro-batch of the split.
        accumulation_steps: Micro-batches in an optimizer step.
        split: Samples in each micro-batch of this rank, largest first: sizes that differ by at most one, or where an
            allocator has no room for these, one size and the rest.
        largest_micro_batch: The largest of which a window of two or more fits. The split's largest may be larger, where
            smaller ones beside it leave room.
        largest_is_capped: True where more would fit, and the search stopped there since nothing larger was asked for.
        budget: What training may use, and why.
        baseline_bytes: What the process takes before it trains: interpreter, libraries, the model itself.
        input_bytes: The window's own samples, on the host until their step is done.
        history_bytes: What the history of the process that planned adds; a fresh one does without.
        predicted_peak_bytes: What the window will take at most, base and data included.
        measured_peak_bytes: What the verification took; None unless verified.
        resident_peak_bytes: The most of it that was in memory at once, measured; None unless verified.
        phases: The predicted peak of each phase of this window, base included.
        binding_constraint: The phase with the highest peak, and the history it was estimated for.
        exactness: Whether the window's gradient was shown to be the large batch's.
        peaks: Table of peaks by micro-batch, so that this plan can be explained without the model.
        signature: The form of a sample.
        fingerprint: What the plan was made with.
        device: "cpu", or the GPU's name.
        method: "replayed" from a step program; or "bracketed", measured size by size.
        mmap_threshold_bytes: The setting of the C library's malloc that the plan holds for; None for its default.
        kernel_time_fraction: Part of the verification's processor time that the kernel spent, on fresh pages above all:
            what the malloc setting costs, but for caches. None unless verified.
        window_seconds: Time of one window, reckoned from the verification's. None unless verified.
        recordings: What was recorded.
        reasons: Why each chosen number is what it is.
        notes: What else the reader should know.
        malloc_overhead: Part of what training takes that is reckoned on top of it, where malloc is left at its default.
        min_micro_batch: The smallest allowed: 2 where the model takes batch statistics.
        virtual: Whether the GPU was a virtual one: the allocator was real, and nothing was computed.
        retries: How often the CUDA caching allocator gives its cache back to make room, by window, predicted.
        allocated_peak_bytes: The most that CUDA tensors took of what was reserved, measured; None on a CPU.
        this_process_peak_bytes: What the verification was predicted to take, in the process that planned: what was
            measured is compared with this. None on a CPU, where that is `predicted_peak_bytes`.
        plain_loop_peak_bytes: What a loop of somebody else's would reserve for the same window, predicted: in it cuBLAS
            keeps its workspaces wherever they came to lie. None where it isn't known: on a CPU, or where its gradients
            would add up in another precision.
        keeps_workspaces: Whether the Runner lets cuBLAS keep its workspaces from one micro-batch to the next, which
            takes less memory for some windows, or gives them back, which takes less for most.
        largest_without_retries: The largest micro-batch for which it never does.
        largest_with_expandable_segments: The same with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
        workload: Name of the workload, or FILE.py:FUNCTION, where the command line made the plan.
        seconds: What planning took.
        sample_bytes: What one sample more adds to a batch; 0 where that is not known.
        max_micro_batch: The largest micro-batch that was allowed; None where none was named.
        max_tokens: Within which padded tokens shorter samples may come in more rows than `micro_batch`; None where no
            budget of tokens was given.
        most_rows: The most rows of short samples that were tried within these; None where none were.
        composition: By phase, what lives at its peak, in bytes by category (simulation/breakdown.py); base included.
        timeline: What is alive through a window of at most three of the split's micro-batches (simulation/timeline.py).
        times: Optimizer steps that were timed at this micro-batch and smaller ones, if any; `reasons["times"]` says on
            what.
        objective: What was sought: "fewest-steps", or "fastest", the smallest micro-batch that is as fast as any.
        environment: Versions and machine that the plan was made on.
        configuration: What `autoaccum tune` chose beside the split, by name (configuration.py); `reasons` has
            why, and what of it changes numbers. Empty where nothing was tuned.
        growth_bytes: What each window keeps more than the one before; 0 where nothing was seen to outlive a window.
        growth_where: The lines that keep it.
    """

    target_batch: int
    world_size: int
    micro_batch: int
    accumulation_steps: int
    split: tuple[int, ...]
    largest_micro_batch: int
    largest_is_capped: bool
    budget: Budget
    baseline_bytes: int
    input_bytes: int
    history_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    resident_peak_bytes: int | None
    phases: Mapping[str, int]
    binding_constraint: str
    exactness: str
    peaks: tuple[PeakRow, ...]
    signature: tuple[LeafForm, ...]
    fingerprint: Mapping[str, str]
    device: str
    method: str
    mmap_threshold_bytes: int | None
    kernel_time_fraction: float | None
    window_seconds: float | None
    recordings: tuple[RecordingNote, ...]
    reasons: Mapping[str, str]
    notes: tuple[str, ...] = ()
    malloc_overhead: float = 0.0
    min_micro_batch: int = 1
    virtual: bool = False
    retries: tuple[int, ...] = ()
    allocated_peak_bytes: int | None = None
    this_process_peak_bytes: int | None = None
    plain_loop_peak_bytes: int | None = None
    keeps_workspaces: bool = False
    largest_without_retries: int | None = None
    largest_with_expandable_segments: int | None = None
    workload: str | None = None
    seconds: float = 0.0
    sample_bytes: int = 0
    max_micro_batch: int | None = None
    max_tokens: int | None = None
    most_rows: int | None = None
    composition: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    timeline: tuple[TimelinePart, ...] = ()
    times: tuple[TimedSize, ...] = ()
    objective: str = FEWEST_STEPS
    environment: Mapping[str, str] = field(default_factory=dict)
    configuration: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    growth_bytes: int = 0
    growth_where: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def budget_bytes(self) -> int:
        """What the whole process may use."""
        return self.budget.bytes

    @property
    def on_cuda(self) -> bool:
        """Whether bytes are reserved bytes of a CUDA device; else they are committed bytes of a process."""
        return self.device != "cpu"

    @property
    def verified(self) -> bool:
        """Whether the plan's window was run for real and took what was predicted."""
        return self.measured_peak_bytes is not None

    def fewer_steps_need(self) -> tuple[int, int] | None:
        """What one accumulation step fewer would need.

        Returns:
            Its largest micro-batch, and what its window would take in all; None where there are no fewer steps, or
            where the table of peaks doesn't have that size.
        """
        steps = self.accumulation_steps - 1
        size = -(-sum(self.split) // steps) if steps else 0
        rows = {row.micro_batch: row for row in self.peaks}
        if size not in rows:
            return None
        smallest, larger = divmod(sum(self.split), steps)
        first = rows[size]
        second, last = rows.get(smallest if larger == 1 else size, first), rows.get(smallest, first)
        training = self.input_bytes + self.history_bytes + window_peak_bytes(first, second, last, steps)
        return size, self.baseline_bytes + int((1 + self.malloc_overhead) * training)

    def to_json(self) -> str:
        """The plan as JSON, for `Plan.load` and for other tools."""
        return _folded(to_json({"kind": KIND, **asdict(self)}, indent=2)) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            PlanFileError: It is half-written, foreign, newer, or does not add up.
        """
        from .plan_json import read_plan

        return read_plan(text, source)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan file.

        Raises:
            PlanFileError: It is missing, half-written, foreign or newer.
        """
        from .plan_json import load_plan

        return load_plan(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan file, whole or not at all."""
        from .files.whole import write_whole

        write_whole(path, self.to_json().encode())

    def explain(self) -> str:
        """How each number came to be, and what the next smaller number of steps would have needed."""
        from .reporting.explain import explain

        return explain(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


_INNERMOST = re.compile(r"[\[{]\n[^\[\]{}]*?\n *[\]}]")


def _folded(text: str) -> str:
    """Indented JSON with its innermost lists and objects on a line each: a table is read by rows.

    A string's own line break is written as an escape, so that what is folded here is never inside of one.
    """
    return _INNERMOST.sub(lambda match: re.sub(r"\n *", " ", match[0]), text)
