"""Write a report's sentences and labels. No torch."""

from __future__ import annotations

from collections import Counter

from ..phases import PHASE_TITLES
from ..plan import FASTEST, Plan
from ..simulation import knee
from ..simulation.solver import CAPACITY_MARGIN
from ..units import show_bytes
from .kinds import Kind, byte_word, cached_word, measured

NONE = "\u2013"
_SHOWN_RANKS = 8  # in a sentence


def title(plan: Plan) -> str:
    """Return the report's title: the workload's or the model's name."""
    return plan.request.workload or plan.provenance.fingerprint.get("model", "a workload").split(" ")[0]


def over_ranks(plan: Plan) -> str:
    """Describe the ranks that a split is for; empty for one process."""
    if plan.world_size == 1:
        return ""
    if len(set(plan.shares)) == 1:
        return f" x {plan.world_size} ranks"
    shares = plan.shares if len(plan.shares) <= _SHOWN_RANKS else (*plan.shares[:_SHOWN_RANKS], "...")
    return f"; {plan.world_size} ranks have {', '.join(map(str, shares))} of {plan.target_batch}"


def answer(plan: Plan) -> str:
    """Return the plan in one sentence."""
    parts = [f"{count:,} micro-batch{'es' * (count > 1)} of {size:,}" for size, count in Counter(plan.split).items()]
    ranks = f" on each of {plan.world_size} ranks" if plan.world_size > 1 else ""
    if len(set(plan.shares)) > 1:
        ranks = f" on this one of {plan.world_size} ranks"
    real = ""
    if plan.measured_peak_bytes is not None:
        by_the = "by the " if measured(plan) is Kind.VIRTUAL else ""
        real = f", {show_bytes(plan.measured_peak_bytes)} {by_the}{measured(plan)}"
    return (
        f"To train {plan.target_batch:,} samples per optimizer step within {show_bytes(plan.budget_bytes)}, accumulate "
        f"{' and '.join(parts)}{ranks}: the peak is {show_bytes(plan.predicted_peak_bytes)} predicted{real}."
    )


def time_sentence(plan: Plan) -> str:
    """Return the measured time of an optimizer step, or the knee."""
    found = knee.describe(plan)
    if found is not None:
        return f"The knee: {found}."
    seconds = plan.timing.window_seconds
    if seconds is None:
        return "Times were not measured."
    times = plan.provenance.reasons.get("times", "not timed")
    return (
        f"{seconds:.3g} s per optimizer step at the chosen size, estimated from the verification run "
        f"({measured(plan)}). Other sizes were {times}, so the knee is unknown."
    )


def fewer(plan: Plan) -> str:
    """Return what one accumulation step fewer would need."""
    needed = plan.fewer_steps_need()
    if plan.accumulation_steps == 1:
        return "One step is the minimum."
    if "fewer_steps" in plan.provenance.reasons:
        return f"{plan.provenance.reasons['fewer_steps']}."
    fewer_steps = plan.accumulation_steps - 1
    steps = f"{fewer_steps:,} step{'s' * (fewer_steps > 1)}"
    if needed is None:
        return f"{steps} would need micro-batches larger than the table's."
    size, total = needed
    over = total - plan.memory.budget.bytes
    if over <= 0 and plan.request.objective == FASTEST:
        return f"{steps} would fit too, but the plan minimizes time: see below."
    if total <= (1 - CAPACITY_MARGIN) * plan.memory.budget.bytes:
        return f"{steps} would fit too, according to the table of peaks: plan again to verify."
    left = f"{show_bytes(over)} over the budget" if over > 0 else f"only {show_bytes(-over)} under the budget"
    return f"{steps} would need micro-batches of up to {size:,} and {show_bytes(total)}, {left}; a plan keeps 2 % free."


def phase(name: str) -> str:
    """Return a phase's title."""
    return PHASE_TITLES.get(name, name)


def category(plan: Plan, name: str) -> str:
    """Return a category's title on the plan's device."""
    if name == "process" and plan.on_cuda:
        return "rest of the base"
    return cached_word(plan) if name == "cached" else name


def bytes_note(plan: Plan) -> str:
    """Return which bytes this plan counts."""
    what = "those that a memory limit counts" if plan.device.name == "cpu" else "those that the caching allocator holds"
    return f"Bytes are {byte_word(plan)} bytes: {what}."


def number(value: object) -> str:
    """Format a figure: integers with separators, floats to three digits."""
    if value is None or value != value:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
