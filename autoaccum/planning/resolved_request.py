"""Check a plan request against a workload, before any forward."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch.utils.data import DataLoader

from ..data import split as cutting
from ..data.collated import Collated
from ..data.groups import Grouped
from ..data.loaders import loader_length
from ..devices.cpu.page_cache import MALLOCS
from ..errors import AutoaccumError, UsageError
from ..plan import FASTEST, FEWEST_STEPS, OBJECTIVES
from ..simulation.solver import rank_share, uniform_sizes
from ..units import check_memory, check_samples, check_seconds
from ..window import norms as batchnorm
from ..window.context import held_in_window
from ..window.fingerprint import signature
from ..workload import Workload
from .request import PlanRequest

log = logging.getLogger("autoaccum")

SEARCH_LIMIT = 1 << 20  # samples: the largest micro-batch to search for if neither request nor data bounds it


@dataclass(frozen=True)
class ResolvedRequest:
    """Hold a plan request that was checked against its workload.

    Attributes:
        target_batch: Samples in an optimizer step, over all ranks; None for one micro-batch, the largest that fits.
        samples: This rank's share of the target.
        world_size: Number of ranks.
        budget: Memory that training may use; None for all free memory.
        headroom: Part of the budget to keep free.
        least: The smallest micro-batch allowed, in samples.
        most: The largest micro-batch allowed, in samples.
        histories: The processes that the plan has to hold in: "new_process", "this_process" as it is now, or both.
        objective: "fewest-steps" or "fastest".
        timing_seconds: Seconds to time smaller micro-batches for; None for a part of planning.
        sizes: Micro-batches that the plan's table of peaks must include.
        dataset_samples: Samples in one epoch of the training data; None if unknown.
        uniform: Whether all micro-batches must have one size.
        explained: Whether the plan has what only explains it.
    """

    target_batch: int | None
    samples: int | None
    world_size: int
    budget: str | int | None
    headroom: str | int | None
    least: int
    most: int
    histories: tuple[str, ...] = ("new_process", "this_process")
    objective: str = FEWEST_STEPS
    timing_seconds: float | None = None
    sizes: tuple[int, ...] = ()
    dataset_samples: int | None = None
    uniform: bool = False
    explained: bool = True

    @property
    def is_bounded(self) -> bool:
        """Return whether the request, not target, data or search, bounds micro-batches."""
        return self.most not in (self.samples, self.dataset_samples, SEARCH_LIMIT)


def resolve(request: PlanRequest, workload: Workload, *, computes: bool) -> ResolvedRequest:
    """Check a request and compute the limits of the search.

    Args:
        request: The request.
        workload: The workload; only its sample's size is read.
        computes: Whether the device computes; a virtual GPU doesn't, so that it has no times.

    Raises:
        UsageError: The request cannot be met, whatever the memory.
    """
    _check_values(request)
    _refuse_lists(workload, _sample_size(workload))
    target_batch, world_size = request.target_batch, request.world_size
    samples = request.samples
    if samples is None and target_batch is not None:
        samples = rank_share(target_batch, world_size, request.rank)
    dataset = dataset_samples(workload)
    least, most = _micro_batch_limits(request, workload, samples, dataset)
    _check_times(request, samples, computes=computes)
    return ResolvedRequest(
        target_batch=target_batch,
        samples=samples,
        world_size=world_size,
        budget=request.budget,
        headroom=request.headroom,
        least=least,
        most=most,
        histories=("new_process",) if request.train_in_new_process else ("new_process", "this_process"),
        objective=request.objective,
        timing_seconds=request.timing_seconds,
        sizes=request.sizes,
        dataset_samples=dataset,
        uniform=request.uniform,
        explained=request.explained,
    )


def _check_values(request: PlanRequest) -> None:
    """Refuse values that no workload allows."""
    for name in ("target_batch", "max_micro_batch", "min_micro_batch"):
        check_samples(name, getattr(request, name))
    check_memory(request.budget, request.headroom)
    check_memory(request.host_memory, None)
    target_batch, rank, world_size = request.target_batch, request.rank, request.world_size
    if not 0 <= rank < world_size:
        raise UsageError(f"rank is {rank}, of {world_size} ranks.", hint="Give a rank from 0 to world_size - 1.")
    if target_batch is not None and target_batch < world_size:
        raise UsageError(
            f"A target batch of {target_batch} cannot be shared by {world_size} ranks.",
            "Each rank needs at least one sample.",
            f"Give a target of at least {world_size}, or fewer ranks.",
        )
    if request.malloc not in MALLOCS:
        raise UsageError(f"malloc {request.malloc!r} is not known.", hint=f"Use one of: {', '.join(MALLOCS)}.")


def _micro_batch_limits(
    request: PlanRequest, workload: Workload, samples: int | None, dataset: int | None
) -> tuple[int, int]:
    """Return the smallest and the largest micro-batch allowed.

    Raises:
        UsageError: The samples cannot be divided into such micro-batches.
    """
    norms = batchnorm.find_norms(workload.model, held_in_window(workload).modules)
    how = batchnorm.chosen_norms(workload.batchnorm, workload.batch_interactions)
    least = request.min_micro_batch or batchnorm.least_micro_batch(norms, how)
    most = min(request.max_micro_batch or SEARCH_LIMIT, samples or dataset or SEARCH_LIMIT)
    if workload.max_tokens is not None and workload.lengths:  # at the longest, which is planned for
        most = min(most, max(least, workload.max_tokens // max(workload.lengths)))
    why = "Batch normalization in train mode needs 2 samples." if least == 2 else ""
    if least > most:
        raise UsageError(
            f"The smallest micro-batch allowed, {least}, is above the largest, {most}.",
            why,
            "Raise the target, or max_micro_batch.",
        )
    if samples is not None and samples // least < -(-samples // most):
        raise UsageError(
            f"{samples} samples cannot be divided into micro-batches of at least {least} and at most {most}.",
            why,
            f"Allow micro-batches of {most + 1}, or change the target by one.",
        )
    if request.uniform:
        _check_uniform(request, samples, least, most)
    return least, most


def _check_uniform(request: PlanRequest, samples: int | None, least: int, most: int) -> None:
    """Refuse a target that equal micro-batches on equal ranks cannot total."""
    target, ranks = request.target_batch, request.world_size
    if target is None or samples is None:
        return
    if target % ranks:
        raise UsageError(
            f"A target of {target} cannot be shared evenly by {ranks} ranks.",
            "With one size of micro-batch, every rank trains as many samples.",
            f"Give {target - target % ranks} or {target + ranks - target % ranks}.",
        )
    if not uniform_sizes(samples, min_size=least, max_size=most):
        raise UsageError(
            f"{samples} samples cannot be divided into equal micro-batches of {least} to {most}.",
            "None of these sizes divides it.",
            f"Give {ranks * (samples - samples % most) or ranks * most} or {ranks * (samples + most - samples % most)}"
            f", or leave the sizes uneven: {'uniform=False' if ranks > 1 else 'without --uniform'}.",
        )


def _check_times(request: PlanRequest, samples: int | None, *, computes: bool) -> None:
    """Refuse objective "fastest" if no time can be measured."""
    if request.objective not in OBJECTIVES:
        raise UsageError(f"objective {request.objective!r} is not known.", hint=f"Use {' or '.join(OBJECTIVES)}.")
    check_seconds("timing_seconds", request.timing_seconds)
    lacking = (
        (not computes, "A virtual GPU computes nothing, so no time can be measured on it."),
        (not request.verify, "Without verification, no window is run."),
        (request.timing_seconds == 0, "Timing was switched off."),
        (samples is None, "Without a target, steps of different micro-batches don't have the same samples."),
    )
    why = next((text for lacks, text in lacking if lacks), None)
    if request.objective == FASTEST and why is not None:
        raise UsageError(
            "The fastest micro-batch cannot be found without times.",
            why,
            "Plan with target_batch=512, say, on a real device, verified and timed.",
        )


def dataset_samples(workload: Workload) -> int | None:
    """Return the samples of one epoch; None if unknown.

    The loader or `lengths` states it; no batch is loaded.
    """
    loader = workload.loader
    if isinstance(loader, (DataLoader, list, tuple)):
        try:
            found = loader_length(loader, 1, shared=workload.shared, per_sample=workload.per_sample)
        except AutoaccumError as error:  # planning does without it; training reports the fault
            log.debug("the loader doesn't state its samples: %s", error)
            found = None
        if found:
            return found // (workload.samples_per_group if isinstance(workload.sample, Grouped) else 1) or None
    return len(workload.lengths) if workload.lengths else None


def dataset_note(request: ResolvedRequest, micro_batch: int) -> str:
    """Describe the training data's size; "" if it doesn't affect the plan."""
    known, asked = request.dataset_samples, request.target_batch
    if known is None:
        if asked is not None:
            return ""
        return (
            f"No target was named, and the data's size is unknown: {micro_batch:,} samples fit, if the data has as "
            "many. Name target_batch, or give loader= (a DataLoader) or lengths=: their size ends the search."
        )
    if asked is not None and asked > known:
        return (
            f"The data has {known:,} samples, fewer than the target of {asked:,}: an epoch is one window of {known:,}."
        )
    if asked is None and micro_batch == known:
        return f"The data has {known:,} samples, and so has the micro-batch: no larger one was searched for."
    return ""


def _sample_size(workload: Workload) -> int:
    """Return the samples of the workload's own batch."""
    return cutting.batch_size(workload.sample, shared=workload.shared, per_sample=workload.per_sample)


def _refuse_lists(workload: Workload, rows: int) -> None:
    """Refuse lists of tensors with one element for each sample.

    Cut, they have fewer tensors than the plan's form, and a micro-batch of another form is refused in training. A
    map-style loader's collate function makes such batches of any size.
    """
    sample = workload.sample
    if rows < 2 or not workload.per_sample or isinstance(sample, (Collated, Grouped)):
        return
    names = {"shared": workload.shared, "per_sample": workload.per_sample}
    (part,) = cutting.split(cutting.select(sample, [0], **names), (1,), **names)
    if len(signature(part)) != len(signature(sample)):
        loader = "none" if workload.loader is None else f"a {type(workload.loader).__name__} that isn't map-style"
        raise UsageError(
            f"The batch has a list with one element for each sample, and the loader is {loader}.",
            "Micro-batches of unlike size then have unlike numbers of tensors, whose memory follows no rule; and whole "
            "batches can't be joined to windows of an exact number of samples.",
            "Give a DataLoader over a dataset with __getitem__ and __len__: its collate_fn makes each micro-batch.",
        )
