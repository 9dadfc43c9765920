"""Train a Runner's windows on every rank of a process group.

a window   the same on all ranks; each trains its share, in its own micro-batches        data/part.py, ranks/shares.py
words      before its first forward, and before the reduction                            ranks/exchange.py
failures   a bad batch is left out by all; whatever else ends all ranks with the reason
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..data.part import Part
from ..data.window import Window
from ..errors import BatchError, NotFinite, RanksFailed, UsageError
from ..plan import Plan
from ..ranks import shares
from ..ranks.agreement import require_equal, together
from ..ranks.exchange import Exchange
from ..ranks.group import Place, place_here
from ..ranks.lane_exchange import LaneExchange
from ..ranks.order import SharedOrder
from ..ranks.sharded import division_of, reduce_always, sharded_modules
from ..ranks.sharded_exchange import ShardedExchange
from ..ranks.words import Control, Kind
from ..ranks.wrapped import FSDP, Wrapper, broadcast, parallel_of, quiet
from ..window.context import TrainingContext
from ..window.fingerprint import describe_model
from ..window.over_ranks import describe_trained, reduction_of
from ..workload import Batch, Workload


class RanksAtWork:
    """The ranks that train the same windows.

    Args:
        control: The words.
        wrapper: The model's DistributedDataParallel; None for a bare model.
        model: The model inside.

    Attributes:
        exchange: What a window exchanges; there once `attach` was called.
    """

    exchange: Exchange

    def __init__(self, control: Control, wrapper: Wrapper | None, model: torch.nn.Module) -> None:
        self.control, self.wrapper, self.model = control, wrapper, model

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.control.rank

    def attach(self, context: TrainingContext, plan: Plan, least: int, group: int) -> None:
        """Compare ranks, share the first one's parameters, and begin to exchange.

        Args:
            context: What is trained.
            plan: The plan.
            least: The fewest samples of a micro-batch.
            group: Samples that belong together.

        Raises:
            UsageError: Ranks differ.
        """
        values = {
            "model": describe_model(context.model),
            "optimizer": type(context.optimizer).__name__,
            "trained tensors": describe_trained(context),
            "target batch": plan.target_batch,
            "shares": plan.shares,
            "batchnorm": context.batchnorm,
            "batch_interactions": context.batch_interactions,
            "parallel": self._parallel(context),
        }
        claims = together(self.control, lambda: values, Kind.START)
        require_equal(claims)
        self._shares, self._least, self._group = plan.shares, least, group
        reduction = reduction_of(context, self.wrapper)
        if sharded_modules(context.model):
            self._attach_sharded(context)
            return
        if context.runs_in_lanes:
            self.exchange = context.exchange = LaneExchange(self.control, reduction)
        else:
            self.exchange = context.exchange = Exchange(self.control, reduction, meets=context.encode is not None)
        if self.wrapper is None:  # DistributedDataParallel did so when it was made
            broadcast([*context.model.parameters(), *(each for group in reduction.buffers for each in group)])

    def _parallel(self, context: TrainingContext) -> str:
        return FSDP if sharded_modules(context.model) else parallel_of(self.wrapper, self.control.world)

    def _attach_sharded(self, context: TrainingContext) -> None:
        """Begin to exchange for a model whose forward and backward are collectives."""
        model = context.model
        found = together(self.control, lambda: division_of(model, self.control.world), Kind.START)
        require_equal([{"gradient divide factor": each.factor, "other factors": each.others} for each in found])
        reduce_always(model)
        own, parameters = found[self.rank], dict(model.named_parameters())
        others = [(parameters[name], factor) for name, factor in own.others]
        self.exchange = context.exchange = ShardedExchange(self.control, list(model.buffers()), own.factor, others)

    def part(self, loader: Iterable[Batch]) -> Part:
        """Begin an epoch: return which of each window's samples are this rank's."""
        _refuse_parted(loader)

        def of(samples: int) -> slice:
            found = shares.of_window(self._shares, samples, self._least, self._group)
            return shares.slice_of(found, self.rank)

        order = self.guarded(lambda: SharedOrder(self.control, loader))
        return Part(of, order.drawing)

    def loaded(self, windows: Iterator[Window | BatchError]) -> Iterator[Window | BatchError]:
        """Yield windows; what loading them raises ends all ranks."""
        while (item := self.guarded(lambda: next(windows, None))) is not None:
            yield item
        self.exchange.end()

    def passed_over(self, *, is_bad: bool) -> bool:
        """Return whether some rank left out a window that is passed over."""
        return bool(self.control.say(Kind.STATUS, [float(is_bad)])[0][0])

    def without(self, window: Window | BatchError, error: BatchError, *, skips: bool) -> Window:
        """Return the window without own samples, or leave it out everywhere.

        Raises:
            BatchError: The window is left out.
        """
        if skips:
            return Window((), (), digest=window.digest if isinstance(window, Window) else 0)
        self.exchange.leave_out(error)
        raise error

    def guarded(self, action: Callable[[], Any]) -> Any:
        """Run an action between two words; its error ends all ranks.

        Raises:
            RanksFailed: On this rank with the error as its cause, and on all others.
        """
        with self.failing_together():
            return action()

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Say in the next word that what is inside failed."""
        try:
            with quiet(self.wrapper, self.model):
                yield
        except (RanksFailed, BatchError, NotFinite):  # raised on all ranks already
            raise
        except Exception as error:
            raise self.exchange.give_up(error) from error


def open_ranks(workload: Workload, plan: Plan, wrapper: Wrapper | None, timeout_seconds: float) -> RanksAtWork | None:
    """Return the ranks of this process's group; None where it trains alone.

    Args:
        workload: What is trained.
        plan: The plan.
        wrapper: The model's DistributedDataParallel.
        timeout_seconds: How long the others are waited for.

    Raises:
        UsageError: The plan is for another number of ranks; on all of them.
    """
    place = place_here()
    if place is None:
        return None
    control = Control(place, timeout_seconds)
    together(control, lambda: _check_plan(plan, place), Kind.START)
    return RanksAtWork(control, wrapper, workload.model)


def agreed(ranks: RanksAtWork | None, *, stops: bool, saves: bool) -> tuple[bool, bool]:
    """Return whether any rank stops, and whether the first one saves."""
    if ranks is None:
        return stops, saves
    found, _ = ranks.control.say(Kind.STATUS, [float(stops), float(saves and ranks.rank == 0)])
    return bool(found[0]), bool(found[1])


def on_all_ranks(ranks: RanksAtWork | None, action: Callable[[], None]) -> None:
    """Run an action on every rank, and go on when all have.

    Raises:
        AutoaccumError: It failed on some rank; the same on all.
    """
    if ranks is None:
        action()
    else:
        together(ranks.control, action, Kind.STATUS)


def states_of_ranks(ranks: RanksAtWork | None, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each rank's state, by rank."""
    return [state] if ranks is None else together(ranks.control, lambda: state, Kind.STATUS)


def exists_everywhere(ranks: RanksAtWork | None, path: str) -> bool:
    """Return whether a checkpoint is there.

    Raises:
        UsageError: It is on some ranks only.
    """
    if ranks is None:
        return Path(path).exists()
    found = together(ranks.control, Path(path).exists, Kind.STATUS)
    if len(set(found)) > 1:
        raise UsageError(
            f"The checkpoint {path!r} is on ranks {', '.join(str(r) for r, there in enumerate(found) if there)} only.",
            "Every rank reads it, and the first one writes it.",
            "Put it where all ranks see it: on a file system that the machines share.",
        )
    return found[0]


def _check_plan(plan: Plan, place: Place) -> None:
    if plan.world_size != place.world:
        raise UsageError(
            f"The plan is for {plan.world_size} rank{'s' * (plan.world_size > 1)}, and {place.world} train here.",
            "Each rank's share of the target, and its micro-batches, are part of a plan.",
            f"Plan again on these ranks: fit_plan(workload, target_batch={plan.target_batch}).",
        )


def _refuse_parted(loader: Iterable[Batch]) -> None:
    """Refuse a loader that gives each rank other samples.

    Raises:
        UsageError: It has a DistributedSampler, or was prepared by Accelerate; on all ranks.
    """
    sampler = getattr(loader, "sampler", None)
    what = ""
    if isinstance(sampler, torch.utils.data.DistributedSampler):
        what = "The loader has a DistributedSampler"
    elif type(loader).__name__ in ("DataLoaderShard", "DataLoaderDispatcher"):
        what = f"The loader was prepared by Accelerate ({type(loader).__name__})"
    if what:
        raise UsageError(
            f"{what}, which gives each rank other samples.",
            "Runner.epoch takes the same loader on all ranks, and each trains its share of every window: none is "
            "repeated to make ranks equal.",
            "Give the plain loader: DataLoader(dataset, batch_size=..., shuffle=True).",
        )
