"""Find equal micro-batches for tools that know one size only."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import UsageError
from ...plan import Plan
from ...simulation.solver import CAPACITY_MARGIN, Split, uniform_sizes
from ...units import show_bytes
from ..what_if import table_of


@dataclass(frozen=True)
class EqualSteps:
    """One micro-batch size, its steps and ranks, which multiply to the target.

    Attributes:
        micro_batch: Samples in each micro-batch.
        accumulation_steps: Micro-batches in an optimizer step of a rank.
        world_size: Ranks.
        remarks: What this costs against the plan's own split, and the nearest targets without that cost.
    """

    micro_batch: int
    accumulation_steps: int
    world_size: int
    remarks: tuple[str, ...] = ()

    @property
    def target_batch(self) -> int:
        """Samples in an optimizer step, over all ranks."""
        return self.micro_batch * self.accumulation_steps * self.world_size


def equal_steps(plan: Plan) -> EqualSteps:
    """Return the largest equal micro-batches that total a plan's target.

    The plan's own, where they are equal. Otherwise a divisor of the target no larger than the plan's micro-batch, whose
    window fits by the plan's table of peaks; no window of it was run.

    Raises:
        UsageError: No such size totals the target; the message names the nearest targets.
    """
    target, ranks = plan.target_batch, plan.world_size
    share = target // ranks
    if target % ranks:
        raise UsageError(
            f"A target of {target} cannot be shared evenly by {ranks} ranks, and {_KNOWS_ONE}.",
            _nearest(plan),
            "Plan for one of these targets.",
        )
    if min(plan.split) == max(plan.split):
        return EqualSteps(plan.micro_batch, plan.accumulation_steps, ranks)
    sizes = uniform_sizes(share, min_size=plan.request.min_micro_batch, max_size=plan.micro_batch)
    size = next((size for size in sizes if _fits(plan, size, share)), None)
    if size is None:
        raise UsageError(
            f"No equal micro-batches of {plan.request.min_micro_batch} to {plan.micro_batch} total {share} samples, "
            f"and {_KNOWS_ONE}.",
            _nearest(plan),
            "Plan for one of these targets, or train with autoaccum's own windows, which may be uneven.",
        )
    return EqualSteps(size, share // size, ranks, _costs(plan, size, share // size))


_KNOWS_ONE = "this tool knows one size of micro-batch only"


def _fits(plan: Plan, size: int, share: int) -> bool:
    """Return whether a window of equal micro-batches fits, by the plan's table."""
    peak = _peak_bytes(plan, (size,) * (share // size))
    return peak is None or peak <= max(plan.predicted_peak_bytes, int(plan.budget_bytes * (1 - CAPACITY_MARGIN)))


def _peak_bytes(plan: Plan, split: Split) -> int | None:
    """Return a window's predicted peak; None without a table."""
    table = table_of(plan)
    return None if table is None else table.peak_bytes(split)


def _costs(plan: Plan, size: int, steps: int) -> tuple[str, ...]:
    """Describe what equal micro-batches cost against the plan's split."""
    split = (size,) * steps
    peak = _peak_bytes(plan, split)
    predicted = "" if peak is None else f", {show_bytes(peak)} predicted"
    return (
        f"{steps} steps of {size}, since {_KNOWS_ONE}; the plan has {plan.accumulation_steps}. So each optimizer step "
        f"has {steps / plan.accumulation_steps:.3g} times the passes{predicted}; no such window was run "
        "(autoaccum plan --uniform runs it).",
        _nearest(plan),
    )


def _nearest(plan: Plan) -> str:
    """Name the nearest targets with the plan's number of equal steps."""
    ranks, steps = plan.world_size, plan.accumulation_steps
    below = plan.target_batch // (ranks * steps)
    sizes = [size for size in (below, below + 1) if plan.request.min_micro_batch <= size <= plan.micro_batch]
    times = f" x {ranks} ranks" if ranks > 1 else ""
    found = [f"{size * steps * ranks} ({size} x {steps}{times})" for size in sizes]
    step = "step" if steps == 1 else "steps"
    return f"The nearest targets with {steps} equal {step}: {' and '.join(found)}; another batch, so another run."
