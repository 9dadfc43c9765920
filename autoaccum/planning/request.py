"""What a plan is asked for, checked before anything is run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader

from ..data import split as cutting
from ..data.loaders import loader_length
from ..errors import AutoaccumError, UsageError
from ..plan import FASTEST, FEWEST_STEPS, OBJECTIVES
from ..simulation.solver import rank_share
from ..units import check_memory, check_samples, check_seconds
from ..window import norms as batchnorm
from ..window.context import held_in_window
from ..workload import Workload

log = logging.getLogger("autoaccum")

SEARCH_LIMIT = 1 << 20  # where to stop looking for the largest micro-batch when nothing asks for more


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for.

    Attributes:
        target_batch: Samples in an optimizer step, over all ranks; None for one micro-batch, the largest that fits.
        samples: This rank's share of it.
        world_size: Ranks.
        budget: What training may use; None for what there is.
        headroom: How much of it to keep free.
        least: The smallest micro-batch allowed.
        most: The largest.
        objective: "fewest-steps" or "fastest".
        timing_seconds: How long smaller micro-batches may be timed; None for a part of planning.
        histories: The processes that the plan has to hold in: "new_process", "this_process" as it is now, or both.
        sizes: Micro-batches that the plan's table of peaks has to have.
        dataset_samples: Samples that training data has in one epoch; None where that isn't known.
    """

    target_batch: int | None
    samples: int | None  # this rank's share of it
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

    @property
    def is_bounded(self) -> bool:
        """Whether a person named the largest micro-batch: neither the target, nor the data, nor the search ends it."""
        return self.most not in (self.samples, self.dataset_samples, SEARCH_LIMIT)


def read_request(
    workload: Workload,
    target_batch: int | None,
    budget: str | int | None,
    headroom: str | int | None,
    most: int | None,
    least: int | None,
    rank: int,
    world_size: int,
) -> PlanRequest:
    """Checks what was asked for.

    Raises:
        UsageError: It can't be had, whatever the memory.
    """
    for name, value in (("target_batch", target_batch), ("max_micro_batch", most), ("min_micro_batch", least)):
        check_samples(name, value)
    check_memory(budget, headroom)
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of {world_size} ranks.", hint="Ranks count from 0 to world_size - 1.")
    if target_batch is not None and target_batch < world_size:
        raise UsageError(
            f"A target batch of {target_batch} can't be shared by {world_size} ranks.",
            "Each needs at least one sample.",
            f"Give a target of at least {world_size}, or fewer ranks.",
        )
    _sample_size(workload)
    samples = None if target_batch is None else rank_share(target_batch, world_size, rank)
    norms = batchnorm.find_norms(workload.model, held_in_window(workload).modules)
    least = least or batchnorm.least_micro_batch(norms, workload.batchnorm)
    dataset = dataset_samples(workload)
    most = min(most or SEARCH_LIMIT, samples or dataset or SEARCH_LIMIT)
    if workload.max_tokens is not None and workload.lengths:  # at the longest, which is planned for
        most = min(most, max(least, workload.max_tokens // max(workload.lengths)))
    if least > most:
        raise UsageError(
            f"The smallest micro-batch allowed, {least}, is above the largest, {most}.",
            "Batch normalization in train mode needs 2 samples." if least == 2 else "",
            "Raise the target, or max_micro_batch.",
        )
    if samples is not None and samples // least < -(-samples // most):
        raise UsageError(
            f"{samples} samples can't be cut into micro-batches of at least {least} and at most {most}.",
            "Batch normalization in train mode needs 2 samples." if least == 2 else "",
            f"Allow micro-batches of {most + 1}, or change the target by one.",
        )
    return PlanRequest(target_batch, samples, world_size, budget, headroom, least, most, dataset_samples=dataset)


def dataset_samples(workload: Workload) -> int | None:
    """The samples of one epoch, by the loader or by `lengths`; None where neither says. Nothing is loaded for it."""
    loader = workload.loader
    if isinstance(loader, (DataLoader, list, tuple)):
        try:
            found = loader_length(loader, 1, shared=workload.shared, per_sample=workload.per_sample)
        except AutoaccumError as error:  # planning does without it; training will say what is wrong with it
            log.debug("the loader doesn't tell its samples: %s", error)
            found = None
        if found:
            return found
    return len(workload.lengths) if workload.lengths else None


def dataset_note(request: PlanRequest, micro_batch: int) -> str:
    """What the size of the training data has to do with the plan; "" where nothing."""
    known, asked = request.dataset_samples, request.target_batch
    if known is None:
        if asked is not None:
            return ""
        return (
            f"No target was named, and the data's size isn't known: {micro_batch:,} samples are what fits, however "
            "many there are. Name target_batch, or give loader= (a DataLoader) or lengths=: their size ends the search."
        )
    if asked is not None and asked > known:
        return (
            f"The data has {known:,} samples, fewer than the target of {asked:,}: an epoch is one window of {known:,}."
        )
    if asked is None and micro_batch == known:
        return f"The data has {known:,} samples, and so has the micro-batch: more was not looked for."
    return ""


def _sample_size(workload: Workload) -> int:
    return cutting.batch_size(workload.sample, shared=workload.shared, per_sample=workload.per_sample)


def with_objective(
    request: PlanRequest, objective: str, timing_seconds: float | None, *, verify: bool, virtual: bool
) -> PlanRequest:
    """The wish with what is sought by time.

    Raises:
        UsageError: There is no such objective, or no time can be measured for it.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is not known.", hint=f"Use {' or '.join(OBJECTIVES)}.")
    check_seconds("timing_seconds", timing_seconds)
    lacking = (
        (virtual, "A virtual GPU computes nothing, so no time can be measured on it."),
        (not verify, "Nothing is run for real without verifying."),
        (timing_seconds == 0, "Timing was switched off."),
        (request.samples is None, "Without a target, steps of different micro-batches aren't of the same samples."),
    )
    why = next((text for lacks, text in lacking if lacks), None)
    if objective == FASTEST and why is not None:
        raise UsageError(
            "The fastest micro-batch can't be found: no times.", why, "Plan with --target-batch N on a real device."
        )
    return replace(request, objective=objective, timing_seconds=timing_seconds)
