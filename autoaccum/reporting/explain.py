"""Explain a plan as text: a summary, and the derivation. No torch."""

from __future__ import annotations

from collections import Counter

from ..files.escape import one_line
from ..phases import PHASE_TITLES
from ..plan import FASTEST, Plan
from ..simulation import knee
from ..units import show_bytes
from .batch_choice import batch_choice
from .kinds import place
from .words import over_ranks


def summary(plan: Plan) -> str:
    """Return the plan in a few lines."""
    budget = plan.memory.budget
    lines = [
        ("device", f"{plan.device.name}, {show_bytes(budget.bytes)} to use ({_limit(plan)})"),
        ("baseline", f"{show_bytes(plan.memory.baseline_bytes)} {plan.provenance.reasons['baseline_bytes']}"),
        ("recorded", _recorded(plan)),
        ("plan", _split(plan)),
        *(
            [("shares", plan.provenance.reasons["shares"])]
            if plan.ranks and "shares" in plan.provenance.reasons
            else []
        ),
        ("peak", _peak(plan)),
        *(
            [("by hand", _by_hand(plan))]
            if plan.memory.plain_loop_peak_bytes not in (None, plan.predicted_peak_bytes)
            else []
        ),
        *([("widths", _widths(plan))] if (plan.memory.varied_peak_bytes or 0) > plan.predicted_peak_bytes else []),
        *(
            [("host", _host(plan))]
            if plan.memory.host_bytes or plan.memory.stayed_bytes or plan.memory.recomputes
            else []
        ),
        ("why", _why(plan)),
        ("largest", _largest(plan)),
    ]
    if plan.schedule.configuration:
        lines.insert(4, ("tuned", _tuned(plan)))
    if plan.timing.window_seconds is not None:
        lines.append(("time", _time(plan)))
    found = knee.describe(plan)
    if found is not None:
        lines.append(("knee", f"{found}, {place(plan)}{_longer(plan)}"))
    elif "timing_seconds=" in plan.provenance.reasons.get("times", ""):
        lines.append(("knee", plan.provenance.reasons["times"]))
    lines.append(("exactness", plan.exactness))
    lines += [("note", note) for note in plan.notes]
    return "\n".join(one_line(f"{name:<12}{text}") for name, text in lines)


def explain(plan: Plan) -> str:
    """Return the summary and the derivation of each number.

    The derivation lists the budget's limits, the peak of each phase, the memory that one accumulation step fewer would
    need, and the origin of the figures.
    """
    derived = [
        "",
        *_budget(plan),
        "",
        *_phases(plan),
        "",
        *_fewer_steps(plan),
        *_batch_choice(plan),
        "",
        *_origin(plan),
    ]
    return "\n".join([summary(plan), *map(one_line, derived)])


def _batch_choice(plan: Plan) -> list[str]:
    """Return the advice on accumulating at all, under its own heading."""
    found = batch_choice(plan)
    return ["", "accumulating at all", *(f"  {sentence}" for sentence in found)] if found else []


def _limit(plan: Plan) -> str:
    term = next(term for term in plan.memory.budget.terms if term.name == plan.memory.budget.binding_constraint)
    headroom = (
        f", less {show_bytes(plan.memory.budget.headroom_bytes)} headroom" if plan.memory.budget.headroom_bytes else ""
    )
    return f"{term.why}{headroom}"


def _recorded(plan: Plan) -> str:
    sizes = ", ".join(str(note.micro_batch) for note in plan.evidence.recordings)
    last = plan.evidence.recordings[-1]
    text = f"windows of two micro-batches of {sizes}"
    if last.predicted_bytes is None:
        return text
    error = last.predicted_bytes / last.measured_bytes - 1
    return f"{text}; the last had been predicted to {error:+.2%}"


def _split(plan: Plan) -> str:
    parts = [f"{times} of {size}" for size, times in Counter(plan.split).items()]
    steps = f"{plan.accumulation_steps} accumulation step{'s' * (plan.accumulation_steps > 1)}"
    return f"{steps}: {' and '.join(parts)} samples = {sum(plan.split)}{over_ranks(plan)}"


def _tuned(plan: Plan) -> str:
    from ..configuration import sentence

    reason = plan.provenance.reasons.get("configuration", "without a stated reason")
    return f"{sentence(plan.schedule.configuration)}: {reason}"


def _peak(plan: Plan) -> str:
    text = f"{show_bytes(plan.predicted_peak_bytes)} {'reserved' if plan.on_cuda else 'committed'}, predicted"
    if plan.measured_peak_bytes is None:
        return f"{text}; not verified"
    predicted = plan.evidence.this_process_peak_bytes or plan.predicted_peak_bytes
    error = predicted / plan.measured_peak_bytes - 1
    if predicted != plan.predicted_peak_bytes:
        text += f", {show_bytes(predicted)} in the process that planned"
    part = (
        f"{show_bytes(plan.evidence.allocated_peak_bytes or 0)} of it allocated"
        if plan.on_cuda
        else f"{show_bytes(plan.evidence.resident_peak_bytes or 0)} of it resident"
    )
    return f"{text}; {show_bytes(plan.measured_peak_bytes)} {place(plan)} ({error:+.1%}), {part}"


def _host(plan: Plan) -> str:
    """Return what waits on the host, and its limit."""
    memory, limit = plan.memory, plan.memory.host_limit_bytes
    stays = f"{show_bytes(memory.stayed_bytes)} of it stays on the device, where it fits"
    again = f"{show_bytes(memory.recomputed_bytes)} are computed again, which spares {show_bytes(memory.spared_bytes)}"
    again = f"; {again}" if memory.recomputes else ""
    if not memory.host_bytes:
        return f"nothing of what lanes save for the backward: {stays}{again}"
    most = f"of at most {show_bytes(limit)}" if limit is not None else "of all but a tenth of what is available"
    text = f"{show_bytes(memory.host_bytes)} {most}: pinned buffers for what lanes save for the backward, {place(plan)}"
    if not memory.moved_bytes:
        return text
    text = f"{text}; each window moves {show_bytes(memory.moved_bytes)} there, and back"
    return f"{text}; {stays}{again}" if memory.stayed_bytes else f"{text}{again}"


def _by_hand(plan: Plan) -> str:
    return (
        f"{show_bytes(plan.memory.plain_loop_peak_bytes or 0)} predicted for the same window in a plain loop: "
        "there cuBLAS keeps its workspaces at the addresses of their first allocation"
    )


def _widths(plan: Plan) -> str:
    return (
        f"{show_bytes(plan.memory.varied_peak_bytes or 0)} predicted where micro-batches vary in width, in replayed "
        "windows of a fifth of the longest samples' to all of it"
    )


def _why(plan: Plan) -> str:
    if "fewer_steps" in plan.provenance.reasons:
        return f"{plan.provenance.reasons['accumulation_steps']}; {plan.provenance.reasons['fewer_steps']}"
    needed = plan.fewer_steps_need()
    if needed is None or plan.request.objective == FASTEST:
        return plan.provenance.reasons["accumulation_steps"]
    steps = plan.accumulation_steps - 1
    return (
        f"{plan.provenance.reasons['accumulation_steps']}; {steps} step{'s' * (steps > 1)} of up to {needed[0]} "
        f"would need {show_bytes(needed[1])}"
    )


def _largest(plan: Plan) -> str:
    if plan.schedule.largest_is_capped:
        return f"at least {plan.largest_micro_batch}: the request allows no larger size"
    text = f"a micro-batch of {plan.largest_micro_batch} is the largest that fits"
    if plan.largest_micro_batch < plan.micro_batch:
        text = f"{text} throughout a window; {plan.micro_batch} fits beside smaller ones"
    if not plan.on_cuda or plan.schedule.largest_without_retries is None:
        return text
    return (
        f"{text}; {plan.schedule.largest_without_retries} without the allocator flushing its cache, "
        f"{plan.schedule.largest_with_expandable_segments} with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )


def _time(plan: Plan) -> str:
    seconds, fraction = plan.timing.window_seconds, plan.timing.kernel_time_fraction
    text = f"{seconds:.1f} s per optimizer step, estimated from the verification run, {place(plan)}"
    if plan.device.malloc != "fixed" or plan.device.mmap_threshold_bytes is None or fraction is None:
        return text
    return (
        f"{text}; the kernel used {fraction:.0%} of it, mostly for new pages: the price of predictable memory "
        f'(blocks from {show_bytes(plan.device.mmap_threshold_bytes)} on are mapped; malloc="cached" keeps them)'
    )


def _longer(plan: Plan) -> str:
    """Suggest a longer timing if the knee is not certain."""
    found = knee.knee(plan.timing.timed_sizes)
    if found is None or found.is_sure:
        return ""
    seconds = 12 * sum(timed.step_seconds * timed.micro_batch for timed in plan.timing.timed_sizes) / sum(plan.split)
    return f" (timing_seconds={max(10, round(seconds, -1)):.0f} measures longer)"


def _budget(plan: Plan) -> list[str]:
    lines = ["budget"]
    lines += [f"  {term.name:<20}{show_bytes(term.bytes):>12}  {term.why}" for term in plan.memory.budget.terms]
    lines.append(f"  {'to use':<20}{show_bytes(plan.budget_bytes):>12}  {plan.provenance.reasons['budget_bytes']}")
    return lines


def _phases(plan: Plan) -> list[str]:
    memory, reasons = plan.memory, plan.provenance.reasons
    sizes = [("baseline", memory.baseline_bytes, "baseline_bytes"), ("inputs", memory.input_bytes, "input_bytes")]
    if memory.history_bytes:
        sizes.append(("history", memory.history_bytes, "history_bytes"))
    if memory.malloc_overhead:
        extra = memory.predicted_peak_bytes - max(memory.phases.values()) - memory.history_bytes
        sizes.append(("malloc overhead", extra, "malloc_overhead"))
    if "predicted_peak_bytes" in reasons:
        sizes.append(("total", memory.predicted_peak_bytes, "predicted_peak_bytes"))
    lines = [f"peak of each phase (predicted; the highest: {memory.binding_constraint})"]
    lines += [f"  {title:<20}{show_bytes(size):>12}  {reasons[name]}" for title, size, name in sizes]
    for name, size in memory.phases.items():
        above = show_bytes(size - memory.baseline_bytes - memory.input_bytes)
        lines.append(f"  {PHASE_TITLES[name]:<20}{show_bytes(size):>12}  {above} above baseline and inputs")
    return lines


def _fewer_steps(plan: Plan) -> list[str]:
    needed = plan.fewer_steps_need()
    lines = ["fewer steps"]
    if plan.accumulation_steps == 1:
        return [*lines, "  none: one step is the minimum"]
    steps = plan.accumulation_steps - 1
    if "fewer_steps" in plan.provenance.reasons:
        return [*lines, f"  {plan.provenance.reasons['fewer_steps']}"]
    if needed is None:
        return [*lines, f"  {steps} would need micro-batches beyond the plan's table"]
    size, total = needed
    over = total - plan.budget_bytes
    if over > 0:
        verdict = f"{show_bytes(over)} over the budget"
    elif total > 0.98 * plan.budget_bytes:
        verdict = "within the budget, but a plan keeps 2 % free"
    elif plan.request.objective == FASTEST:
        verdict = "they would fit, but are not faster"
    else:
        verdict = "they would fit, but the request does not allow this size"
    return [*lines, f"  {steps} would need micro-batches of up to {size}, {show_bytes(total)} in total: {verdict}"]


def _origin(plan: Plan) -> list[str]:
    lines = ["origin"]
    lines.append(f"  {'method':<20}{plan.method}: {plan.provenance.reasons['method']}")
    lines.append(f"  {'verified':<20}{plan.provenance.reasons['measured_peak_bytes']}")
    lines += _timed(plan)
    lines += [f"  {name:<20}{value}" for name, value in plan.provenance.fingerprint.items()]
    lines.append(f"  {'planning took':<20}{plan.provenance.planning_seconds:.1f} s")
    return lines


def _timed(plan: Plan) -> list[str]:
    """Return each size's seconds per optimizer step, with their range."""
    lines = [f"  {'timed':<20}{plan.provenance.reasons['times']}"] if "times" in plan.provenance.reasons else []
    for timed in sorted(plan.timing.timed_sizes, key=lambda timed: timed.micro_batch):
        spread = timed.round_seconds or (timed.step_seconds,)
        lines.append(
            f"  {f'  micro-batch {timed.micro_batch}':<20}{timed.step_seconds:.4g} s per optimizer step, "
            f"{min(spread):.4g} to {max(spread):.4g} s"
        )
    return lines
