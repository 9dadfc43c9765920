"""Share a target among several kinds of GPUs. No torch.

Each kind is planned apart, and each rank trains as many of the target's samples as its memory is worth: in proportion
to the largest micro-batch that fits there. No time is known of a GPU that isn't here, so a fast one with little memory
gets little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..plan import DistributionSection, Plan, RankEntry
from ..ranks.shares import MEMORY, Shares, proportional
from ..simulation.solver import balanced
from .cluster import DDP
from .request import PlanRequest


@dataclass(frozen=True)
class GpuKind:
    """Equal GPUs of a cluster.

    Attributes:
        name: As in `--gpu`.
        count: How many of them.
    """

    name: str
    count: int


PlanKind = Callable[[GpuKind, PlanRequest], Plan]


def plan_unequal(kinds: Sequence[GpuKind], request: PlanRequest, plan_kind: PlanKind) -> Plan:
    """Plan each kind of GPU for its share of the target.

    Args:
        kinds: The kinds, in the order of their ranks.
        request: The request, for all ranks together.
        plan_kind: Plans one rank of a kind.

    Returns:
        The plan of the first rank, with all ranks in it.

    Raises:
        UsageError: There is no target.
        DoesNotFit: Not even the smallest micro-batch fits some kind.
    """
    if request.target_batch is None and request.target_tokens is None:
        raise UsageError(
            "GPUs of several kinds share a target, and none was named.", hint="Add --target-batch 512, or 4M-tokens."
        )
    alone = replace(request, target_batch=None, target_tokens=None, verify=False)
    largest = [plan_kind(kind, alone) for kind in kinds]
    target = request.target_batch or _samples(request, largest[0])
    weights = [plan.micro_batch for plan in largest]
    shares = proportional(target, [w for kind, w in zip(kinds, weights, strict=True) for _ in range(kind.count)])
    plans, rank = [], 0
    for kind in kinds:
        own = replace(request, target_batch=target, target_tokens=None, samples=max(shares[rank : rank + kind.count]))
        plans.append(plan_kind(kind, own))
        rank += kind.count
    return _combined(kinds, plans, shares, weights, target)


def _samples(request: PlanRequest, plan: Plan) -> int:
    """Return a target in tokens as samples of the plan's length."""
    leaves = plan.provenance.signature
    lengths = [leaf.trailing_shape[0] for leaf in leaves if "int" in leaf.dtype and len(leaf.trailing_shape) == 1]
    tokens = request.target_tokens or 0
    samples = round(tokens / max(lengths)) if lengths else 0
    if samples < 1:
        raise UsageError(
            f"A target of {tokens:,} tokens is no number of this workload's samples.", hint="Give it in samples."
        )
    return samples


def _combined(
    kinds: Sequence[GpuKind], plans: Sequence[Plan], shares: Shares, weights: Sequence[int], target: int
) -> Plan:
    """Return the first kind's plan with all ranks in it."""
    entries: list[RankEntry] = []
    for kind, plan in zip(kinds, plans, strict=True):
        for share in shares[len(entries) : len(entries) + kind.count]:
            entries.append(_entry(plan, share))
    shown = ", ".join(f"{weight} on {kind.name}" for kind, weight in zip(kinds, weights, strict=True))
    first = plans[0]
    return replace(
        first,
        request=replace(first.request, target_batch=target, world_size=len(entries)),
        provenance=replace(
            first.provenance,
            reasons={**first.provenance.reasons, "shares": f"by the largest micro-batches that fit: {shown}"},
        ),
        distribution=DistributionSection(tuple(entries), DDP, MEMORY),
    )


def _entry(plan: Plan, share: int) -> RankEntry:
    """Return a rank's part, in as many steps as its kind's."""
    split = plan.split if sum(plan.split) == share else balanced(share, min(share, plan.accumulation_steps))
    return replace(plan.entry(), split=split)
