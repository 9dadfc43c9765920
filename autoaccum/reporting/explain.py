"""A plan, told to a person: a summary of a few lines, and the whole derivation. Needs no model and no torch."""

from __future__ import annotations

from collections import Counter

from ..files.escape import one_line
from ..phases import PHASE_TITLES
from ..plan import FASTEST, Plan
from ..simulation import knee
from ..units import show_bytes


def summary(plan: Plan) -> str:
    """The plan in a few lines."""
    budget = plan.budget
    lines = [
        ("device", f"{plan.device}, {show_bytes(budget.bytes)} to use ({_limit(plan)})"),
        ("baseline", f"{show_bytes(plan.baseline_bytes)} {plan.reasons['baseline_bytes']}"),
        ("recorded", _recorded(plan)),
        ("plan", _split(plan)),
        ("peak", _peak(plan)),
        *([("by hand", _by_hand(plan))] if plan.plain_loop_peak_bytes not in (None, plan.predicted_peak_bytes) else []),
        ("why", _why(plan)),
        ("largest", _largest(plan)),
    ]
    if plan.configuration:
        lines.insert(4, ("tuned", _tuned(plan)))
    if plan.window_seconds is not None:
        lines.append(("time", _time(plan)))
    found = knee.describe(plan)
    if found is not None:
        lines.append(("knee", f"{found}, {_place(plan)}{_longer(plan)}"))
    elif "--timing" in plan.reasons.get("times", ""):
        lines.append(("knee", plan.reasons["times"]))
    lines.append(("exactness", plan.exactness))
    lines += [("note", note) for note in plan.notes]
    return "\n".join(one_line(f"{name:<12}{text}") for name, text in lines)


def explain(plan: Plan) -> str:
    """How each number came to be, phase by phase, and what the next smaller number of steps would have needed."""
    derived = ["", *_budget(plan), "", *_phases(plan), "", *_fewer_steps(plan), "", *_origin(plan)]
    return "\n".join([summary(plan), *map(one_line, derived)])


def _limit(plan: Plan) -> str:
    term = next(term for term in plan.budget.terms if term.name == plan.budget.binding_constraint)
    headroom = f", less {show_bytes(plan.budget.headroom_bytes)} headroom" if plan.budget.headroom_bytes else ""
    return f"{term.why}{headroom}"


def _recorded(plan: Plan) -> str:
    sizes = ", ".join(str(note.micro_batch) for note in plan.recordings)
    last = plan.recordings[-1]
    told = f"windows of two micro-batches of {sizes}"
    if last.predicted_bytes is None:
        return told
    error = last.predicted_bytes / last.measured_bytes - 1
    return f"{told}; the last had been predicted to {error:+.2%}"


def _split(plan: Plan) -> str:
    parts = [f"{times} of {size}" for size, times in Counter(plan.split).items()]
    ranks = f" x {plan.world_size} ranks" if plan.world_size > 1 else ""
    steps = f"{plan.accumulation_steps} accumulation step{'s' * (plan.accumulation_steps > 1)}"
    return f"{steps}: {' and '.join(parts)} samples = {sum(plan.split)}{ranks}"


def _tuned(plan: Plan) -> str:
    from ..configuration import sentence

    return f"{sentence(plan.configuration)}: {plan.reasons.get('configuration', 'no reason was kept')}"


def _peak(plan: Plan) -> str:
    told = f"{show_bytes(plan.predicted_peak_bytes)} {'reserved' if plan.on_cuda else 'committed'}, predicted"
    if plan.measured_peak_bytes is None:
        return f"{told}; not verified"
    here = plan.this_process_peak_bytes or plan.predicted_peak_bytes
    error = here / plan.measured_peak_bytes - 1
    if here != plan.predicted_peak_bytes:
        told += f", {show_bytes(here)} in the process that planned"
    part = (
        f"{show_bytes(plan.allocated_peak_bytes or 0)} of it allocated"
        if plan.on_cuda
        else f"{show_bytes(plan.resident_peak_bytes or 0)} of it resident"
    )
    return f"{told}; {show_bytes(plan.measured_peak_bytes)} {_place(plan)} ({error:+.1%}), {part}"


def _by_hand(plan: Plan) -> str:
    return (
        f"{show_bytes(plan.plain_loop_peak_bytes or 0)} predicted for the same window in a plain loop: "
        "cuBLAS keeps its workspaces in it, wherever they came to lie"
    )


def _place(plan: Plan) -> str:
    """What a measured figure was measured on: four different things, never to be mixed up."""
    if plan.virtual:
        return "by the real allocator on a virtual GPU"
    return "measured on this GPU" if plan.on_cuda else "measured on this CPU"


def _why(plan: Plan) -> str:
    if "fewer_steps" in plan.reasons:
        return f"{plan.reasons['accumulation_steps']}; {plan.reasons['fewer_steps']}"
    needed = plan.fewer_steps_need()
    if needed is None or plan.objective == FASTEST:
        return plan.reasons["accumulation_steps"]
    steps = plan.accumulation_steps - 1
    return (
        f"{plan.reasons['accumulation_steps']}; {steps} step{'s' * (steps > 1)} of up to {needed[0]} "
        f"would need {show_bytes(needed[1])}"
    )


def _largest(plan: Plan) -> str:
    if plan.largest_is_capped:
        return f"at least {plan.largest_micro_batch}: nothing larger was asked for"
    told = f"a micro-batch of {plan.largest_micro_batch} is the largest that fits"
    if plan.largest_micro_batch < plan.micro_batch:
        told = f"{told} all through a window; {plan.micro_batch} does beside smaller ones"
    if not plan.on_cuda or plan.largest_without_retries is None:
        return told
    return (
        f"{told}; {plan.largest_without_retries} without the allocator ever giving its cache back, "
        f"{plan.largest_with_expandable_segments} with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )


def _time(plan: Plan) -> str:
    assert plan.window_seconds is not None
    told = f"{plan.window_seconds:.1f} s per optimizer step, reckoned from the verification, {_place(plan)}"
    if plan.mmap_threshold_bytes is None or plan.kernel_time_fraction is None:
        return told
    return (
        f"{told}; the kernel used {plan.kernel_time_fraction:.0%} of it, for new pages: the price of predictable "
        f"memory (blocks from {show_bytes(plan.mmap_threshold_bytes)} on are mapped; --malloc default is faster)"
    )


def _longer(plan: Plan) -> str:
    """What to type where so few rounds tell nothing."""
    found = knee.knee(plan.times)
    if found is None or found.is_sure:
        return ""
    seconds = 12 * sum(timed.step_seconds * timed.micro_batch for timed in plan.times) / sum(plan.split)
    return f" (--timing {max(10, round(seconds, -1)):.0f} measures longer)"


def _budget(plan: Plan) -> list[str]:
    lines = ["budget"]
    lines += [f"  {term.name:<20}{show_bytes(term.bytes):>12}  {term.why}" for term in plan.budget.terms]
    lines.append(f"  {'to use':<20}{show_bytes(plan.budget.bytes):>12}  {plan.reasons['budget_bytes']}")
    return lines


def _phases(plan: Plan) -> list[str]:
    lines = [f"peak of each phase (predicted; {plan.binding_constraint} binds)"]
    lines.append(f"  {'baseline':<20}{show_bytes(plan.baseline_bytes):>12}  {plan.reasons['baseline_bytes']}")
    lines.append(f"  {'data':<20}{show_bytes(plan.input_bytes):>12}  {plan.reasons['input_bytes']}")
    if plan.history_bytes:
        lines.append(f"  {'history':<20}{show_bytes(plan.history_bytes):>12}  {plan.reasons['history_bytes']}")
    if plan.malloc_overhead:
        extra = plan.predicted_peak_bytes - max(plan.phases.values()) - plan.history_bytes
        lines.append(f"  {'malloc overhead':<20}{show_bytes(extra):>12}  {plan.reasons['malloc_overhead']}")
    if "predicted_peak_bytes" in plan.reasons:
        lines.append(
            f"  {'in all':<20}{show_bytes(plan.predicted_peak_bytes):>12}  {plan.reasons['predicted_peak_bytes']}"
        )
    for name, size in plan.phases.items():
        above = show_bytes(size - plan.baseline_bytes - plan.input_bytes)
        lines.append(f"  {PHASE_TITLES[name]:<20}{show_bytes(size):>12}  {above} above these")
    return lines


def _fewer_steps(plan: Plan) -> list[str]:
    needed = plan.fewer_steps_need()
    lines = ["fewer steps"]
    if plan.accumulation_steps == 1:
        return [*lines, "  there are none: one step is the least"]
    steps = plan.accumulation_steps - 1
    if "fewer_steps" in plan.reasons:
        return [*lines, f"  {plan.reasons['fewer_steps']}"]
    if needed is None:
        return [*lines, f"  {steps} would need micro-batches beyond the plan's table"]
    size, total = needed
    over = total - plan.budget.bytes
    if over > 0:
        told = f"{show_bytes(over)} over the budget"
    elif total > 0.98 * plan.budget.bytes:
        told = "within the budget, but not with 2 % to spare"
    elif plan.objective == FASTEST:
        told = "it would fit, and isn't faster"
    else:
        told = "it would fit, but so large a micro-batch isn't allowed"
    return [*lines, f"  {steps} would need micro-batches of up to {size}, {show_bytes(total)} in all: {told}"]


def _origin(plan: Plan) -> list[str]:
    lines = ["where it comes from"]
    lines.append(f"  {'method':<20}{plan.method}: {plan.reasons['method']}")
    lines.append(f"  {'verified':<20}{plan.reasons['measured_peak_bytes']}")
    lines += _timed(plan)
    lines += [f"  {name:<20}{value}" for name, value in plan.fingerprint.items()]
    lines.append(f"  {'planning took':<20}{plan.seconds:.1f} s")
    return lines


def _timed(plan: Plan) -> list[str]:
    """Each size's optimizer step, and on what it was measured."""
    lines = [f"  {'timed':<20}{plan.reasons['times']}"] if "times" in plan.reasons else []
    for timed in sorted(plan.times, key=lambda timed: timed.micro_batch):
        spread = timed.round_seconds or (timed.step_seconds,)
        lines.append(
            f"  {f'  micro-batch {timed.micro_batch}':<20}{timed.step_seconds:.4g} s per optimizer step, "
            f"{min(spread):.4g} to {max(spread):.4g} s"
        )
    return lines
