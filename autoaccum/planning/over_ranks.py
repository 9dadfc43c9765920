"""Plan on all ranks of a group, and agree on one plan.

claim     what each rank is asked for and what it trains: the same, or the same error on all ranks
share     by weights that ranks find alone: speed, or the largest micro-batch that fits
plan      each rank for its own share, without any collective
agree     one plan with all ranks in it
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import __version__
from ..data.sample import with_sample
from ..devices.registry import get_device
from ..errors import DoesNotFit, UsageError
from ..plan import FEWEST_STEPS, DistributionSection, Plan, RankEntry
from ..ranks.agreement import require_equal, together
from ..ranks.group import Place, apart, place_here
from ..ranks.sharded import device_of
from ..ranks.shares import EQUAL, MEMORY, SPEED, Shares, check_shares, proportional
from ..ranks.words import Control
from ..ranks.wrapped import (
    FSDP,
    Wrapper,
    is_trained_sharded,
    parallel_of,
    quiet,
    refuse_unsupported,
    unwrapped,
)
from ..simulation.solver import Split, balanced
from ..units import show_bytes
from ..window import norms as batchnorm
from ..window.context import held_in_window
from ..window.fingerprint import describe_model
from ..workload import Workload
from .build_plan import with_note
from .follow import Procession
from .request import PlanRequest
from .target_tokens import tokens_to_samples

PlanHere = Callable[..., Plan]  # of a workload and a request; a procession, where ranks plan together
GIVEN = "given"

_ASKED = ("target_batch", "min_micro_batch", "objective", "verify", "check", "uniform", "shares")


@dataclass(frozen=True)
class _Claim:
    """What a rank says before anything is recorded."""

    values: dict[str, Any]
    device: str
    host: str


def request_here(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size: as given, or the process group's.

    Raises:
        UsageError: Both are there, and differ.
    """
    place = place_here()
    if place is None:
        return rank or 0, 1 if world_size is None else world_size
    given = (place.rank if rank is None else rank, place.world if world_size is None else world_size)
    if given != (place.rank, place.world):
        raise UsageError(
            f"rank={given[0]} and world_size={given[1]} were given, and this process is rank {place.rank} of "
            f"{place.world} in its process group.",
            hint="Leave them out: they are taken from the group.",
        )
    return given


def plan_over_ranks(place: Place, workload: Workload, request: PlanRequest, plan_here: PlanHere) -> Plan:
    """Plan a workload on every rank of this process's group.

    Args:
        place: This process's place.
        workload: The workload; its model may be a DistributedDataParallel.
        request: The request; its target is that of all ranks together.
        plan_here: Plans on this rank alone.

    Returns:
        The plan with this rank's own split, and all ranks in it.

    Raises:
        UsageError: The request can't be met on some rank, or ranks differ; the same on all.
        DoesNotFit: Not even the smallest micro-batch fits some rank; the same on all.
        RanksFailed: A rank failed in another way, or doesn't answer.
    """
    agreement = _Agreement(Control(place, request.timeout_seconds), workload, request, plan_here)
    return agreement.run()


class _Agreement:
    """The steps that all ranks take together."""

    def __init__(self, control: Control, workload: Workload, request: PlanRequest, plan_here: PlanHere) -> None:
        self.control, self.request, self.plan_here = control, request, plan_here
        self.given, self.wish = workload, request.shares
        self.workload = workload
        self.wrapper: Wrapper | None = None
        self.remark = ""

    def run(self) -> Plan:
        """Claim, share, plan and agree."""
        claims = together(self.control, self._claim)
        together(self.control, lambda: require_equal([claim.values for claim in claims]))
        self.request = self._own_request(claims)
        if is_trained_sharded(self.workload.model):
            return self._in_step()
        shares, by, why, plans = self._shares(claims)
        if plans is None:
            plans = self._plans(None if shares is None else shares[self.control.rank], check=self.request.check)
        parallel = parallel_of(self.wrapper, self.control.world)
        return with_note(_combined(plans, self.control.rank, parallel, by, why), self.remark)

    def _in_step(self) -> Plan:
        """Plan a sharded model, whose windows run on all ranks."""
        request, world = self.request, self.control.world
        if self.wish in (SPEED, MEMORY) or request.objective != FEWEST_STEPS:
            raise UsageError(
                f"shares={self.wish!r} and objective={request.objective!r} were given for a sharded model.",
                "Its ranks run their micro-batches at the same time, each with the others' shards: no time is one "
                "rank's alone, and the first rank plans for all.",
                "Leave them out, or give each rank's samples: shares=(384, 128).",
            )
        target = request.target_batch
        given: Shares = () if self.wish is None or isinstance(self.wish, str) else tuple(self.wish)
        shares = given or (None if target is None else self._in_groups(target, [1.0] * world))
        own = replace(request, samples=None if shares is None else max(shares), timing_seconds=0, exchanges=True)
        if given:  # the largest share's plan, until it has the others in it
            own = replace(own, target_batch=max(given) * world)
        with apart():
            plan = self.plan_here(self.workload, own, procession=Procession(self.control))
        room = together(self.control, lambda: plan.budget_bytes if self.control.rank == 0 else self._room(own))
        entries = []
        for rank, share in enumerate(shares or [sum(plan.split)] * world):
            split = plan.split if share == sum(plan.split) else self._beside(share, plan.accumulation_steps)
            entries.append(replace(plan.entry(), split=split, budget_bytes=room[rank]))
        _require_room(entries)
        section = DistributionSection(tuple(entries), FSDP, GIVEN if given else EQUAL)
        found = replace(
            plan, distribution=section, request=replace(plan.request, target_batch=target or sum(plan.split) * world)
        )
        return with_note(found.for_rank(self.control.rank), self.remark)

    def _beside(self, share: int, steps: int) -> Split:
        """Split a smaller share beside the largest.

        There are at most as many micro-batches, each of at most as many samples.
        """
        group = self.workload.samples_per_group
        most = max(1, share // max(self._least(), group))
        return tuple(group * each for each in balanced(share // group, min(most, steps)))

    def _room(self, request: PlanRequest) -> int:
        """Return what this rank may use."""
        return get_device(self._device).read_budget(request.budget, request.headroom).bytes

    def _claim(self) -> _Claim:
        """Say what this rank is asked for."""
        workload, self.wrapper = unwrapped(self.given)
        self.workload = with_sample(workload)[0]
        self.request, self.remark = tokens_to_samples(self.request, self.workload)
        world, request = self.control.world, self.request
        refuse_unsupported(self.workload, world)
        check_shares(request.shares, request.target_batch, world, self._least(), self.workload.samples_per_group)
        if request.target_batch is None and request.shares is not None:
            raise UsageError(
                f"shares={request.shares!r} was given without a target batch.",
                "Without one each rank has the largest micro-batch that fits.",
                "Give target_batch=512, say, or leave out shares.",
            )
        joins = workload.encode is not None or workload.batch_interactions is not None
        if request.target_batch is None and joins:
            what = "batch_interactions=" if workload.encode is None else "encode="
            raise UsageError(
                f"{what} was given on {world} ranks, without a target batch.",
                "Its loss has the representations of all ranks at once, whose number has to be known.",
                "Give target_batch=512, say.",
            )
        asked = {name: getattr(request, name) for name in _ASKED}
        values = asked | {
            "model": describe_model(self.workload.model),
            "loss": getattr(self.workload.loss, "__qualname__", type(self.workload.loss).__name__),
            "batchnorm": batchnorm.chosen_norms(self.workload.batchnorm, self.workload.batch_interactions),
            "parallel": parallel_of(self.wrapper, world),
            "versions": f"torch {torch.__version__}, autoaccum {__version__}",
        }
        return _Claim(values, get_device(self._device).name, socket.gethostname())

    @property
    def _device(self) -> torch.device:
        return device_of(next(self.workload.model.parameters()))

    def _least(self) -> int:
        norms = batchnorm.find_norms(self.workload.model, held_in_window(self.workload).modules)
        least = self.request.min_micro_batch or batchnorm.least_micro_batch(norms, self.workload.batchnorm)
        return max(least, self.workload.samples_per_group)

    def _own_request(self, claims: Sequence[_Claim]) -> PlanRequest:
        """Return what this rank plans, within its part of the host."""
        place: dict[str, Any] = {"rank": self.control.rank, "world_size": self.control.world}
        request = replace(self.request, **place, shares=None, exchanges=True)
        here = sum(claim.host == claims[self.control.rank].host for claim in claims)
        if request.budget is not None or self._device.type != "cpu" or here == 1:
            return request
        budget = get_device(self._device).read_budget(headroom=request.headroom)
        return replace(request, budget=budget.bytes // here, headroom=None)

    def _shares(self, claims: Sequence[_Claim]) -> tuple[Shares | None, str, str, list[Plan] | None]:
        """Return the shares, by what and why, and any plans made."""
        wish, target, world = self.wish, self.request.target_batch, self.control.world
        if target is None:
            return None, EQUAL, "each rank has the largest micro-batch that fits", None
        if wish is not None and not isinstance(wish, str):
            return tuple(wish), GIVEN, "given by shares=", None
        devices = {claim.device for claim in claims}
        timed = self.request.verify and get_device(self._device).computes
        by = wish or (EQUAL if len(devices) == 1 else SPEED if timed else MEMORY)
        chosen = "" if wish else f", as the devices are {'alike' if len(devices) == 1 else 'unlike'}"
        equal = self._in_groups(target, [1.0] * world)
        if by == EQUAL:
            return equal, by, f"equal{chosen}", None
        if by == MEMORY:
            plans = self._plans(None, target=False, verify=False)
            weights = [float(plan.micro_batch) for plan in plans]
            shown = ", ".join(f"{weight:.0f}" for weight in weights)
            return self._in_groups(target, weights), by, f"by the largest micro-batches that fit: {shown}{chosen}", None
        plans = self._plans(equal[self.control.rank], check=self.request.check)
        weights = together(self.control, lambda: _speed(plans[self.control.rank]))
        shown = ", ".join(f"{weight:.3g}" for weight in weights)
        shares = self._in_groups(target, weights)
        why = f"by samples per second, measured while all ranks trained: {shown}{chosen}"
        return shares, by, why, plans if shares == equal else None

    def _in_groups(self, target: int, weights: Sequence[float]) -> Shares:
        group = self.workload.samples_per_group
        found = proportional(target // group, weights, -(-self._least() // group))
        return tuple(group * each for each in found)

    def _plans(
        self, samples: int | None, *, target: bool = True, verify: bool | None = None, check: bool = False
    ) -> list[Plan]:
        """Plan on each rank alone; return all ranks' plans."""
        without: dict[str, Any] = {} if target else {"target_batch": None, "timing_seconds": 0}
        request = replace(
            self.request,
            samples=samples,
            check=check and self.control.rank == 0,  # the same test on each
            verify=self.request.verify if verify is None else verify,
            **without,
        )
        return together(self.control, lambda: self._alone(request))

    def _alone(self, request: PlanRequest) -> Plan:
        with apart(), quiet(self.wrapper, self.workload.model):
            return self.plan_here(self.workload, request)


def _require_room(entries: Sequence[RankEntry]) -> None:
    """Refuse a plan that some rank has no memory for.

    Raises:
        DoesNotFit: Names the rank; on all ranks.
    """
    rank, least = min(enumerate(entries), key=lambda item: item[1].budget_bytes)
    missing = least.predicted_peak_bytes - least.budget_bytes
    if missing > 0:
        raise DoesNotFit(
            f"The plan needs {show_bytes(least.predicted_peak_bytes)} on every rank, and rank {rank} has "
            f"{show_bytes(least.budget_bytes)}.",
            "Ranks of a sharded model run the same micro-batches, and the first one planned them for its own memory.",
            f"Plan for the smallest: budget={least.budget_bytes}.",
            missing_bytes=missing,
        )


def _speed(plan: Plan) -> float:
    """Return the samples per second of a rank's window.

    Raises:
        UsageError: No window was run, or nothing is computed here.
    """
    seconds = plan.timing.window_seconds
    if not seconds:
        raise UsageError(
            "shares='speed' needs times, and no window was timed.",
            "Without verification none is run, and a virtual GPU computes nothing.",
            "Use shares='memory', 'equal', or each rank's samples.",
        )
    return sum(plan.split) / seconds


def _combined(plans: Sequence[Plan], rank: int, parallel: str, by: str, why: str) -> Plan:
    """Return a rank's plan with all ranks in it."""
    entries = tuple(plan.entry() for plan in plans)
    own, first = plans[rank], plans[0]
    target = sum(entry.samples for entry in entries)
    provenance = replace(own.provenance, reasons={**own.provenance.reasons, "shares": why})
    if rank:  # the test of exactness is the first rank's
        tested = [note for note in first.notes if note not in own.notes]
        provenance = replace(provenance, notes=(*own.notes, *tested))
    return replace(
        own,
        request=replace(own.request, target_batch=target),
        evidence=replace(own.evidence, exactness=first.exactness),
        provenance=provenance,
        distribution=DistributionSection(entries, parallel, by),
    )
