"""Define the eight sections of a plan. No torch here.

No two sections have a field of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..budget import Budget
from .entries import LeafForm, PeakRow, RankEntry, RecordingNote, SegmentRow, TimedSize, TimelinePart

SCHEMA_VERSION = 2
KIND = "autoaccum plan"
FEWEST_STEPS, FASTEST = OBJECTIVES = ("fewest-steps", "fastest")


@dataclass(frozen=True)
class RequestSection:
    """The question that the plan answers.

    Attributes:
        target_batch: Samples in an optimizer step, over all ranks.
        world_size: Number of ranks.
        min_micro_batch: The smallest micro-batch allowed: 2 where the model uses batch statistics.
        max_micro_batch: The largest micro-batch allowed; None if none was named.
        objective: "fewest-steps", or "fastest", the smallest micro-batch that is as fast as any.
        workload: Name of the workload, or FILE.py:FUNCTION if the command line created the plan.
        samples_per_group: Samples that no micro-batch cuts apart; each size is a multiple of it.
    """

    target_batch: int
    world_size: int
    min_micro_batch: int = 1
    max_micro_batch: int | None = None
    objective: str = FEWEST_STEPS
    workload: str | None = None
    samples_per_group: int = 1


@dataclass(frozen=True)
class ScheduleSection:
    """The micro-batches of an optimizer step.

    Attributes:
        micro_batch: The largest micro-batch of the split.
        accumulation_steps: Micro-batches in an optimizer step.
        split: Samples in each micro-batch of this rank, largest first: sizes that differ by at most one, or, if the
            allocator has no room for these, one size and the rest.
        largest_micro_batch: The largest of which a window of two or more fits. The split's largest may be larger,
            where smaller ones beside it leave room.
        largest_is_capped: Whether more would fit, and the search stopped since nothing larger was requested.
        largest_without_retries: The largest micro-batch for which the CUDA caching allocator never frees its cache.
        largest_with_expandable_segments: The same with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
        max_tokens: Padded tokens within which shorter samples may form more rows than `micro_batch`; None without a
            token budget.
        max_rows: The most rows of short samples that were tried within these tokens; None if none were.
        configuration: Choices of `autoaccum tune` beside the split, by name (configuration.py); empty if nothing was
            tuned. The provenance's reasons state why, and which of them change numbers.
    """

    micro_batch: int
    accumulation_steps: int
    split: tuple[int, ...]
    largest_micro_batch: int
    largest_is_capped: bool
    largest_without_retries: int | None = None
    largest_with_expandable_segments: int | None = None
    max_tokens: int | None = None
    max_rows: int | None = None
    configuration: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class MemorySection:
    """Predicted memory of a window.

    Committed bytes of a process on the CPU, reserved bytes of the device on CUDA.

    Attributes:
        budget: What training may use, and why.
        baseline_bytes: In use before training: interpreter, libraries, the model.
        input_bytes: The window's samples, kept on the host until their optimizer step is done.
        history_bytes: Added by the history of the process that planned; a new process does without.
        predicted_peak_bytes: Peak of the window, baseline and inputs included.
        phases: Peak of each phase of the window, baseline included.
        binding_constraint: The phase with the highest peak, and the process (new, or this one) it was estimated for.
        peaks: Peaks by micro-batch, so that the plan can be explained without the model.
        malloc_overhead: Fraction of training's memory added for fragmentation, if malloc is left at its default.
        sample_bytes: Bytes that one more sample adds to a batch; 0 if unknown.
        retries: Predicted number of times that the CUDA caching allocator frees its cache to make room, by window.
        plain_loop_peak_bytes: Peak of the same window in a loop other than the Runner's, in which cuBLAS keeps its
            workspaces where it first put them. None if unknown: on a CPU, or if that loop would accumulate gradients in
            another precision.
        growth_bytes: Bytes that each window keeps in addition to the one before; 0 if nothing outlives a window.
        growth_where: The lines that keep them.
        composition: By phase, bytes alive at its peak by category (simulation/breakdown.py), baseline included.
        timeline: Bytes alive through a window of at most three of the split's micro-batches (simulation/timeline.py).
        host_bytes: On a GPU, with micro-batches in lanes: host memory of what they save for the backward, in pinned
            buffers; 0 otherwise.
        host_limit_bytes: What these may use; None for all but a tenth of what is available when training begins.
        moved_bytes_per_sample: In lanes: saved tensors of at least so many bytes for each sample move to the host; None
            for those of 1 MiB and more.
        moved_parts: In lanes: of each lane's parts between two meetings, so many move what they save, the first ones;
            what later parts save stays on the device. None for all.
        moved_bytes: What a window in lanes moves to the host; it comes back in the backward.
        stayed_bytes: What it could move there, and keeps on the device, since it fits.
        segments: On CUDA, the large segments that windows of the longest samples reserve beside the model's, largest
            first: where micro-batches vary in width, training reserves these before the first. Empty where it doesn't.
        varied_peak_bytes: The most that is reserved then, over replayed windows of micro-batches of a fifth of the
            width to all of it; None without segments.
        recomputes: In lanes: whether the backward computes again what follows by cheap operations from what is kept.
        recomputed_bytes: What a window computes again.
        spared_bytes: What it would move more to the host otherwise.
    """

    budget: Budget
    baseline_bytes: int
    input_bytes: int
    history_bytes: int
    predicted_peak_bytes: int
    phases: Mapping[str, int]
    binding_constraint: str
    peaks: tuple[PeakRow, ...]
    malloc_overhead: float = 0.0
    sample_bytes: int = 0
    retries: tuple[int, ...] = ()
    plain_loop_peak_bytes: int | None = None
    growth_bytes: int = 0
    growth_where: str = ""
    composition: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    timeline: tuple[TimelinePart, ...] = ()
    host_bytes: int = 0
    host_limit_bytes: int | None = None
    moved_bytes_per_sample: int | None = None
    moved_parts: int | None = None
    moved_bytes: int = 0
    stayed_bytes: int = 0
    segments: tuple[SegmentRow, ...] = ()
    varied_peak_bytes: int | None = None
    recomputes: bool = False
    recomputed_bytes: int = 0
    spared_bytes: int = 0


@dataclass(frozen=True)
class EvidenceSection:
    """Recordings, verification and gradient test that the plan rests on.

    Attributes:
        method: "replayed" from a step program, or "bracketed", measured size by size.
        recordings: The recorded windows.
        exactness: Result of testing whether the window's gradient is the large batch's.
        measured_peak_bytes: Peak of the verification run; None unless verified.
        resident_peak_bytes: Maximum of it that was resident in memory; None unless verified, and on CUDA.
        allocated_peak_bytes: Maximum that CUDA tensors used of it; None on a CPU.
        this_process_peak_bytes: Predicted peak of the verification run, in the process that planned, to compare with
            the measurement. None on a CPU, where it is `predicted_peak_bytes`.
        loss_average: What the workload's loss averages over: "samples", "classes" or "labels" that aren't ignored,
            "shifted labels", "count=", "(sum, count)", "representations", "unknown"; empty where it was not asked.
    """

    method: str
    recordings: tuple[RecordingNote, ...]
    exactness: str
    measured_peak_bytes: int | None = None
    resident_peak_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    this_process_peak_bytes: int | None = None
    loss_average: str = ""


@dataclass(frozen=True)
class TimingSection:
    """Measured times of optimizer steps.

    Attributes:
        window_seconds: Time of one window, estimated from the verification run; None unless verified.
        kernel_time_fraction: Fraction of the verification run's processor time spent in the kernel, mostly on new
            pages: the price of malloc='fixed', apart from caches. None unless verified.
        timed_sizes: Optimizer steps that were timed at this micro-batch and smaller ones; the provenance's
            `reasons["times"]` states on what.
    """

    window_seconds: float | None = None
    kernel_time_fraction: float | None = None
    timed_sizes: tuple[TimedSize, ...] = ()


@dataclass(frozen=True)
class ProvenanceSection:
    """Origin of the plan, and the reasons of its numbers.

    Attributes:
        signature: The tensors of a batch.
        fingerprint: The workload that the plan was created with; the Runner compares it.
        reasons: Why each chosen number is what it is.
        notes: Further remarks for the reader.
        environment: Versions and machine.
        planning_seconds: How long planning took.
    """

    signature: tuple[LeafForm, ...]
    fingerprint: Mapping[str, str]
    reasons: Mapping[str, str]
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    planning_seconds: float = 0.0


@dataclass(frozen=True)
class DeviceSection:
    """Device of the plan, and the allocator settings it depends on.

    Attributes:
        name: "cpu", or the GPU's name.
        is_virtual: Whether the GPU was a virtual one: its allocator is the real one, and nothing is computed.
        mmap_threshold_bytes: malloc's fixed mmap threshold; None for its default.
        malloc: Where large tensors come from on a CPU: "cached" (a cache of pages), "fixed" (a mapping each), "default"
            or "jemalloc" (docs/cpu.md). Empty on CUDA.
        keeps_workspaces: Whether the Runner lets cuBLAS keep its workspaces from one micro-batch to the next, which
            uses less memory for some windows, or frees them, which uses less for most.
    """

    name: str
    is_virtual: bool = False
    mmap_threshold_bytes: int | None = None
    keeps_workspaces: bool = False
    malloc: str = ""


@dataclass(frozen=True)
class DistributionSection:
    """The ranks that share an optimizer step.

    Attributes:
        ranks: Each rank's part, by rank; empty where the plan is of one process.
        parallel: How the model is trained over ranks: "ddp", "bare", "fsdp", or "single" for one process.
        shares_by: What the shares were chosen by: "equal", "speed", "memory", "given"; empty for one process.
    """

    ranks: tuple[RankEntry, ...] = ()
    parallel: str = "single"
    shares_by: str = ""
