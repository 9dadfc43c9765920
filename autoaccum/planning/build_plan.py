"""Build a plan from a solution, with reasons and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..phases import PHASE_TITLES, PHASES
from ..plan import (
    FASTEST,
    EvidenceSection,
    MemorySection,
    PeakRow,
    Plan,
    ProvenanceSection,
    RequestSection,
    ScheduleSection,
    TimingSection,
)
from ..simulation import breakdown
from ..simulation.knee import knee
from ..simulation.solver import Solution, Split, balanced, is_even, largest_micro_batch, uniform_sizes
from ..simulation.timeline import timeline
from ..torch_compat import local_bytes
from ..units import show_bytes
from ..window import compiled, fp32_accumulation
from ..window.fingerprint import fingerprint, signature
from ..window.loss_form import average_of
from ..workload import Workload
from .environment import versions
from .growth import describe_growth
from .predictor import DeviceFigures, MemoryPredictor, VerifiedFigures
from .resolved_request import dataset_note
from .timing import Times
from .windows import window_of

TABLE_ROWS = 256  # micro-batch sizes; if twice the largest that fits is above it, a grid
TABLE_ROWS_CUDA = 96  # a replay of the caching allocator takes longer


def plan(
    predictor: MemoryPredictor,
    solution: Solution,
    measured: Any,
    workload: Workload,
    assumed: Sequence[str],
    timed: Times,
    max_rows: int | None = None,
) -> Plan:
    """Build the plan of a solution, before the process's state is restored.

    Args:
        predictor: The predictor that found the solution.
        solution: The split.
        measured: The verification run's measurements; None if it was not run.
        workload: The workload, its sample at the longest.
        assumed: Remarks on what was assumed, for the notes.
        timed: The timed optimizer steps.
        max_rows: The most rows of short samples that were tried.
    """
    request, split = predictor.request, solution.split
    largest, capped = _largest(predictor, split)
    figures = predictor.device_figures(split, largest)
    verified = predictor.verified_figures(measured, split) if measured is not None else VerifiedFigures()
    remarks = [*assumed, dataset_note(request, split[0]), _tokens_note(workload, split, max_rows)]
    return Plan(
        request=RequestSection(
            target_batch=request.target_batch or split[0] * request.world_size,
            world_size=request.world_size,
            min_micro_batch=request.least,
            max_micro_batch=request.most if request.is_bounded else None,
            objective=request.objective,
            workload=workload.name,
        ),
        schedule=ScheduleSection(
            micro_batch=split[0],
            accumulation_steps=len(split),
            split=split,
            largest_micro_batch=largest,
            largest_is_capped=capped,
            largest_without_retries=figures.largest_without_retries,
            largest_with_expandable_segments=figures.largest_with_expandable_segments,
            max_tokens=token_budget(workload, split[0]),
            max_rows=max_rows,
        ),
        memory=_memory(predictor, split, figures, {largest, *(size.micro_batch for size in timed.sizes)}),
        evidence=_evidence(predictor, figures, verified),
        timing=TimingSection(verified.window_seconds, verified.kernel_time_fraction, timed.sizes),
        provenance=ProvenanceSection(
            signature=signature(workload.sample),
            fingerprint=fingerprint(predictor.subject.context),
            reasons=_reasons(predictor, split, measured, timed, largest),
            notes=_notes(predictor, split, remarks),
            environment=versions(),
        ),
        device=figures.device,
    )


def with_note(plan: Plan, text: str) -> Plan:
    """Return a plan with a further note in front."""
    notes = (text, *plan.notes) if text else plan.notes
    return replace(plan, provenance=replace(plan.provenance, notes=notes))


def _evidence(predictor: MemoryPredictor, figures: DeviceFigures, verified: VerifiedFigures) -> EvidenceSection:
    """Return recordings and measured peaks."""
    return EvidenceSection(
        method=predictor.evidence.method,
        recordings=tuple(predictor.evidence.notes),
        exactness="unchecked",
        measured_peak_bytes=verified.measured_peak_bytes,
        resident_peak_bytes=verified.resident_peak_bytes,
        allocated_peak_bytes=verified.allocated_peak_bytes,
        this_process_peak_bytes=figures.this_process_peak_bytes,
        loss_average=average_of(predictor.subject.context),
    )


def _memory(predictor: MemoryPredictor, split: Split, figures: DeviceFigures, known: set[int]) -> MemorySection:
    """Return the predicted memory of a split's window.

    Args:
        predictor: The predictor that found the split.
        split: Samples in each micro-batch.
        figures: The device's own figures.
        known: Micro-batches that the table of peaks must include.
    """
    phases = dict(predictor.phases(split))
    kept = predictor.kept_bytes(split)
    history = max(predictor.peak_bytes(split, name) for name in predictor.request.histories) - (
        predictor.peak_bytes(split, "new_process") - kept
    )
    binding = max((name for name in phases if name in PHASES), key=lambda name: phases[name])
    found, growth = predictor.evidence.growth, predictor.growth_bytes(split)
    return MemorySection(
        budget=predictor.budget,
        baseline_bytes=predictor.baseline_bytes,
        input_bytes=predictor.input_bytes(sum(split)),
        history_bytes=history,
        predicted_peak_bytes=predictor.worst_bytes(split),
        phases=phases,
        binding_constraint=f"{PHASE_TITLES[binding]}, {'this process' if history > kept else 'a new process'}",
        peaks=_table(predictor, split, known),
        malloc_overhead=predictor.malloc_overhead,
        sample_bytes=predictor.sample_bytes,
        retries=figures.retries,
        plain_loop_peak_bytes=figures.plain_loop_peak_bytes,
        segments=figures.varied[0],
        varied_peak_bytes=figures.varied[1],
        growth_bytes=growth,
        growth_where=describe_growth(found) if found is not None and growth else "",
        composition=_composition(predictor, split, phases),
        timeline=timeline(*window_of(predictor.evidence, split)),
    )


def token_budget(workload: Workload, micro_batch: int) -> int | None:
    """Return the limit on a micro-batch's padded tokens; None without `max_tokens`.

    It is at most the plan's micro-batch of the longest samples.
    """
    if workload.max_tokens is None or not workload.lengths:
        return None
    return min(workload.max_tokens, micro_batch * max(workload.lengths))


def _composition(predictor: MemoryPredictor, split: Split, phases: dict[str, int]) -> dict[str, dict[str, int]]:
    """Return live bytes by kind at the peak of each phase."""
    model = predictor.subject.context.model
    return breakdown.process_composition(
        breakdown.composition(*window_of(predictor.evidence, split)),
        phases,
        baseline_bytes=predictor.baseline_bytes,
        parameter_bytes=sum(local_bytes(tensor) for tensor in (*model.parameters(), *model.buffers())),
        input_bytes=predictor.input_bytes(sum(split)),
    )


def _largest(predictor: MemoryPredictor, split: Split) -> tuple[int, bool]:
    """Return the largest micro-batch, and whether the search ended there."""
    request, evidence = predictor.request, predictor.evidence
    recorded = evidence.recordings[-1].micro_batch
    most = recorded if evidence.fallback_reason else max(split[0], request.most if request.samples else split[0])
    if len(split) == 1:
        return split[0], request.samples is not None or split[0] == request.dataset_samples
    size = largest_micro_batch(
        predictor.fits_surely, predictor.later_floor, budget_bytes=predictor.usable_bytes, max_size=most
    )
    # A window of 37 + 37 + 36 doesn't show that windows of 37 alone fit: these may need a retry each time.
    own = split[-1] if split[0] - split[-1] == 1 else split[0]
    return max(size, own), size >= most


def _table(predictor: MemoryPredictor, split: Split, known: set[int]) -> tuple[PeakRow, ...]:
    """Return peaks for micro-batches of up to twice the largest known.

    If those are more than the table's rows: for a grid, the known sizes, and those of neighbouring numbers of steps.
    """
    samples = sum(split)
    count = TABLE_ROWS if predictor.subject.context.device.type == "cpu" else TABLE_ROWS_CUDA
    neighbours = {-(-samples // k) for k in range(max(1, len(split) - 1), min(samples, 4 * len(split)) + 1)}
    needed = {1, predictor.request.least, *split, *known, *predictor.request.sizes, *sorted(neighbours)[-count // 2 :]}
    most = max(2 * max(known), *needed)
    sizes = needed | {round(1 + (most - 1) * part / (count - 1)) for part in range(count)}
    if not predictor.request.explained:
        sizes = {*split, *known}
    rows = []
    for size in sorted(sizes):
        try:
            rows.append(predictor.row(size))
        except LookupError:
            break
    return tuple(rows)


def _reasons(predictor: MemoryPredictor, split: Split, measured: Any, timed: Times, largest: int) -> dict[str, str]:
    """Return how each number of the plan was derived, by field."""
    samples, steps = sum(split), len(split)
    reasons = {
        "accumulation_steps": (
            f"all {samples} samples fit in one micro-batch"
            if steps == 1
            else f"the fewest steps that micro-batches of at most {predictor.request.most} allow"
            if steps == -(-samples // predictor.request.most)
            else f"the fewest steps of one size that fit {predictor.limit_words}"
            if predictor.request.uniform
            else f"the fewest steps that fit {predictor.limit_words}{_why_uneven(predictor, split)}"
        ),
        "split": f"{samples} samples in {steps} micro-batches"
        + (
            " of one size"
            if predictor.request.uniform
            else " whose sizes differ by at most one, largest first"
            if is_even(split)
            else ": one size and the rest"
        ),
        "largest_micro_batch": f"the largest whose window of several steps fits {predictor.limit_words}",
        "malloc_overhead": f"{predictor.malloc_overhead:.0%} of training's memory, since malloc's default fragments",
        "budget_bytes": f"the tightest of the limits ({predictor.budget.binding_constraint}) less the headroom",
    }
    reasons |= predictor.reasons(split) | _why_not_fewer(predictor, split, largest)
    reasons["method"] = predictor.evidence.fallback_reason or (
        "a step program lifted from recordings at " + ", ".join(str(n.micro_batch) for n in predictor.evidence.notes)
    )
    reasons["measured_peak_bytes"] = (
        "not verified: no window of this size was run"
        if measured is None
        else f"the first step and two windows of {min(steps, 3)} micro-batches were run in this process"
    )
    reasons["times"] = timed.why
    found = knee(timed.sizes)
    if predictor.request.objective == FASTEST and found is not None:
        most = max(size.micro_batch for size in timed.sizes)
        certainty = "" if found.is_sure else ", by medians within measurement noise"
        others = f"; {-(-samples // most)} steps of up to {most} fit too" if split[0] < most else ""
        reasons["accumulation_steps"] = (
            f"{split[0]} is the smallest micro-batch within 1 % of the fastest optimizer step{certainty}{others}"
        )
    return reasons


def _why_uneven(predictor: MemoryPredictor, split: Split) -> str:
    """Return why the balanced split doesn't fit, if another was chosen."""
    even = balanced(sum(split), len(split))
    return "" if is_even(split) else f"; {split[0]} is repeated, since {_counted(even)} {predictor.shortfall(even)}"


def _why_not_fewer(predictor: MemoryPredictor, split: Split, largest: int) -> dict[str, str]:
    """Return why one step fewer doesn't fit, unless its sizes show it."""
    samples, steps = sum(split), len(split) - 1
    if not steps or predictor.request.objective == FASTEST or predictor.evidence.fallback_reason is not None:
        return {}
    if predictor.request.uniform:
        return _why_not_larger(predictor, split)
    even = balanced(samples, steps)
    if even[0] > min(largest, predictor.request.most):
        return {}
    text = f"{steps} step{'s don' if steps > 1 else ' doesn'}'t fit: {_counted(even)} {predictor.shortfall(even)}"
    return {"fewer_steps": text + (", and neither does a larger size, repeated, with the rest" if steps > 1 else "")}


def _why_not_larger(predictor: MemoryPredictor, split: Split) -> dict[str, str]:
    """Return why the next larger divisor of the samples doesn't fit."""
    samples = sum(split)
    larger = [size for size in uniform_sizes(samples, max_size=predictor.request.most) if size > split[0]]
    if not larger:
        return {"fewer_steps": f"no larger micro-batch up to {predictor.request.most} divides {samples}"}
    steps = samples // larger[-1]
    next_split = (larger[-1],) * steps
    return {
        "fewer_steps": f"the next larger size that divides {samples}, {larger[-1]} in {steps} "
        f"step{'s' * (steps > 1)}, {predictor.shortfall(next_split)}"
    }


def _counted(split: Split) -> str:
    """Describe a split, such as 3 of 37 and 1 of 36."""
    return " and ".join(f"{count} of {size}" for size, count in Counter(split).items())


def _notes(predictor: MemoryPredictor, split: Split, assumed: Sequence[str]) -> tuple[str, ...]:
    """Return the plan's notes; empty ones are left out."""
    notes = [text for text in assumed if text]
    if predictor.evidence.fallback_reason is not None:
        notes.append(f"Bracketed: {predictor.evidence.fallback_reason}.")
    if compiled.is_compiled(predictor.subject.context.model, predictor.subject.context.loss):
        notes.append(_compiled_note(predictor))
    notes += [predictor.remark] if predictor.remark else []
    notes += _growth_notes(predictor, split)
    notes += predictor.notes(split)
    return tuple(text for text in (*notes, _sums_note(predictor, split)) if text)


def _sums_note(predictor: MemoryPredictor, split: Split) -> str:
    """Describe how gradients of half-precision parameters add up, and the memory."""
    context = predictor.subject.context
    more = fp32_accumulation.widening_bytes(context.model.parameters())
    if len(split) < 2 or not more:
        return ""
    if context.accumulate == "fp32":
        return (
            f"Gradients of half-precision parameters add up in fp32: {show_bytes(more)} more than a plain loop"
            " while micro-batches run. The workload's accumulate='as_parameters' saves that, and loses addends that are"
            " small beside the sum."
        )
    return (
        "Gradients add up in the parameters' own half precision, which loses addends that are small beside the "
        f"sum; the workload's accumulate='fp32' avoids that and uses {show_bytes(more)} more."
    )


def _growth_notes(predictor: MemoryPredictor, split: Split) -> list[str]:
    """Describe memory that outlives each window, its source, and the windows left."""
    found, growth = predictor.evidence.growth, predictor.growth_bytes(split)
    if found is None or not growth:
        return []
    left = max(0, predictor.budget.bytes - predictor.worst_bytes(split)) // growth
    planning = (
        " Objects that planning's windows appended were taken out again."
        if found.undone
        else f" Planning's windows left {show_bytes(predictor.leaked_bytes)} behind, which it cannot find to free."
    )
    return [
        f"Memory grows: each window keeps {show_bytes(growth)} more than the one before, allocated at "
        f"{describe_growth(found)}. The peak is the third window's; {left:,} more windows fit the budget, then memory "
        "runs out. Keep less: "
        f"numbers instead of tensors, a running sum, or tensors detached and moved off the device.{planning}"
    ]


def _tokens_note(workload: Workload, split: Split, max_rows: int | None) -> str:
    """Describe the limit on padded tokens; "" if there is none."""
    tokens = token_budget(workload, split[0])
    if tokens is None:
        return ""
    tried = f"shorter ones in up to {max_rows} rows, as tried" if max_rows else "shorter ones in no more rows"
    return f"For the longest samples; {tried}, and no micro-batch has more than {tokens:,} padded tokens."


def _compiled_note(predictor: MemoryPredictor) -> str:
    """Describe how a compiled model was recorded."""
    if not compiled.runs_compiled(predictor.subject.context):
        return "Planned uncompiled: a virtual GPU cannot run compiled code."
    share = predictor.compiled_share
    scaled = "" if share == 1 else f" Compiled, it uses {share:.0%} of that; the plan's figures include this."
    return f"Recorded uncompiled; only the plan's own sizes are run compiled.{scaled}"
