"""Step a learning rate scheduler as its kind asks for."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

    from .context import TrainingContext

_METRICS = ("metrics", "metric")  # ReduceLROnPlateau's own name, and what others call theirs


class Scheduling(Enum):
    """When a scheduler is stepped, and with what."""

    STEP = "after each window, with nothing"
    METRIC = "after each window, with a metric"
    EPOCH = "at the end of each epoch, with nothing"
    EPOCH_METRIC = "at the end of each epoch, with a metric"
    COUNTED = "with the number of epochs at the end of each, and of updates after each window, as timm's"


def read_scheduling(scheduler: Any, interval: str) -> Scheduling:
    """Return when a scheduler is stepped, by the parameters of its `step`.

    Args:
        scheduler: The scheduler.
        interval: "step" or "epoch".

    Raises:
        UsageError: It is to be given something else than a metric or a number of epochs.
    """
    needed = [
        p.name
        for p in inspect.signature(scheduler.step).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if needed == ["epoch"]:
        return Scheduling.COUNTED
    if not needed:
        return Scheduling.STEP if interval == "step" else Scheduling.EPOCH
    if len(needed) == 1 and needed[0] in _METRICS:
        return Scheduling.METRIC if interval == "step" else Scheduling.EPOCH_METRIC
    raise UsageError(
        f"{type(scheduler).__name__}.step is to be given {' and '.join(needed)}, which a window doesn't know.",
        "A scheduler is stepped with nothing, with a metric, or with the number of epochs.",
        "Give an object whose step() counts by itself, or step this one in between_steps=, by a counter of your own.",
    )


def refuse_other_optimizer(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a scheduler of another optimizer's rates.

    Raises:
        UsageError: Its optimizer and the one that steps share no group of parameters.
    """
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
    if not isinstance(groups, list) or any(one is other for one in groups for other in optimizer.param_groups):
        return
    name = type(scheduler).__name__
    raise UsageError(
        f"{name} schedules another optimizer ({type(scheduler.optimizer).__name__}) than the one that steps "
        f"({type(optimizer).__name__}): its rates would never change.",
        "It was made for an optimizer before that was made again.",
        f"Give a function of the optimizer: scheduler=lambda optimizer: {name}(optimizer, ...).",
    )


def wants_metric(scheduler: Any) -> bool:
    """Return whether a scheduler of windows takes a metric.

    Raises:
        UsageError: It is to be given something else.
    """
    found = read_scheduling(scheduler, "step")
    if found is Scheduling.COUNTED:
        raise UsageError(
            f"{type(scheduler).__name__}.step is to be given the epoch, which a window doesn't know.",
            hint="Step it in your loop: step_update(updates) after a window, and step(epoch) after an epoch.",
        )
    return found is Scheduling.METRIC


def step_after_window(context: TrainingContext, loss: torch.Tensor) -> None:
    """Step the scheduler after an optimizer step.

    The metric is computed without one, too, since planning must see its memory.

    Args:
        context: What is trained.
        loss: The window's, detached: the metric, where the workload gives none.
    """
    metric = context.metric(context.model) if context.metric is not None else loss
    if context.metric is not None and context.exchange is not None:  # the loss is that of all ranks
        metric = context.exchange.average(metric)
    scheduler = context.scheduler
    if scheduler is None:
        return
    if context.scheduling is Scheduling.COUNTED:
        if hasattr(scheduler, "step_update"):
            scheduler.step_update(num_updates=context.steps_taken)
    elif context.scheduling is Scheduling.STEP:
        scheduler.step()
    elif context.scheduling is Scheduling.METRIC and metric is not None:  # one taken now and then is None in between
        scheduler.step(float(metric))
    elif context.scheduling is Scheduling.EPOCH_METRIC:  # a number: a tensor would keep a block that no plan counts
        context.last_metric = None if metric is None else float(metric)


def step_after_epoch(context: TrainingContext) -> None:
    """Count an epoch, and step a scheduler of epochs."""
    context.epochs_done += 1
    if context.scheduling is Scheduling.EPOCH:
        context.scheduler.step()
    elif context.scheduling is Scheduling.EPOCH_METRIC and context.last_metric is not None:
        context.scheduler.step(float(context.last_metric))
    elif context.scheduling is Scheduling.COUNTED:
        context.scheduler.step(context.epochs_done)
