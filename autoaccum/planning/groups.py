"""Turn a plan whose samples are groups into one of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..data.groups import Grouped
from ..errors import UsageError
from ..plan import Plan
from ..workload import Workload
from .request import PlanRequest

_OF_REQUEST = ("target_batch", "max_micro_batch", "min_micro_batch")
_OF_SCHEDULE = ("micro_batch", "largest_micro_batch", "largest_without_retries", "largest_with_expandable_segments")


def plan_in_groups(plan: Callable[[Workload, PlanRequest], Plan], workload: Workload, request: PlanRequest) -> Plan:
    """Plan in groups, and return the plan in samples.

    Args:
        plan: Plans a workload whose sample is `Grouped`.
        workload: The workload, with its sample.
        request: The request, in samples.

    Raises:
        UsageError: The target isn't a number of whole groups, or the sample isn't.
    """
    size = workload.samples_per_group
    for name in _OF_REQUEST:
        value = getattr(request, name)
        ranks = 1 if request.samples is not None else request.world_size
        if value is not None and (value < size or (name == "target_batch" and value % (size * ranks))):
            raise UsageError(
                f"{name} is {value}, and a group has {size} samples.",
                "Groups are never cut apart, so every size is a multiple of a group's.",
                f"Give {name}={max(1, value // (size * ranks)) * size * ranks}, say.",
            )
    asked = {name: getattr(request, name) // size for name in _OF_REQUEST if getattr(request, name) is not None}
    if request.samples is not None:
        asked["samples"] = request.samples // size
    sample = workload.sample if isinstance(workload.sample, Grouped) else Grouped(workload.sample, size)
    found = plan(replace(workload, sample=sample), replace(request, **asked))
    return in_samples(found, size)


def in_samples(plan: Plan, size: int) -> Plan:
    """Return a plan's counts of groups as counts of samples."""

    def each(entries: Any) -> Any:
        return tuple(replace(entry, micro_batch=size * entry.micro_batch) for entry in entries)

    request: dict[str, Any] = {name: _times(getattr(plan.request, name), size) for name in _OF_REQUEST}
    schedule: dict[str, Any] = {name: _times(getattr(plan.schedule, name), size) for name in _OF_SCHEDULE}
    note = f"Samples stay together in groups of {size}; reasons and notes that count samples count groups."
    return replace(
        plan,
        request=replace(plan.request, samples_per_group=size, **request),
        schedule=replace(plan.schedule, split=tuple(size * each for each in plan.split), **schedule),
        memory=replace(
            plan.memory,
            peaks=each(plan.memory.peaks),
            timeline=each(plan.memory.timeline),
            sample_bytes=-(-plan.memory.sample_bytes // size),
        ),
        evidence=replace(
            plan.evidence,
            recordings=each(plan.evidence.recordings),
            exactness=plan.exactness.replace(" samples", f" groups of {size}"),
        ),
        timing=replace(plan.timing, timed_sizes=each(plan.timing.timed_sizes)),
        provenance=replace(plan.provenance, notes=(note, *plan.notes)),
    )


def _times(value: int | None, size: int) -> int | None:
    return None if value is None else value * size
