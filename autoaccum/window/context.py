"""The context of a window: a workload with its optimizer made.

And its scheduler, and its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..criterion import Criterion, as_loss
from ..data.collated import Collated
from ..data.groups import check_groups
from ..data.prefetch import Copies
from ..errors import UsageError
from ..processes import quick_imports
from ..ranks.exchange import Alone
from ..ranks.group import ranks_here
from ..ranks.sharded import device_of
from ..ranks.wrapped import refuse_unsupported
from ..state.closures import Holdings, holdings
from ..workload import Batch, Loss, Workload, class_count, default_loss, is_pair
from . import loss_terms
from .lanes.host_store import HostStore
from .lanes.limits import refuse_lanes
from .norms import EXACT, Norms, check_choice, chosen_norms, find_norms
from .scheduling import Scheduling, read_scheduling, refuse_other_optimizer
from .step_arguments import refuse_closure
from .trained_parameters import refuse_foreign

if TYPE_CHECKING:
    from .loss_form import LossForm
    from .widths import Widths

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class TrainingContext:
    """A workload whose optimizer and scheduler exist: what a window works on.

    Attributes:
        scheduling: When the scheduler is stepped, and with what.
        last_metric: The last window's metric, for a scheduler that takes one at an epoch's end.
        steps_taken: Optimizer steps so far.
        epochs_done: Epochs of `Runner.epoch` so far, for a scheduler that counts them.
        collates: Whether batches are made by a loader's collate function alone, and can't be cut.
        samples_per_group: Samples that are never cut apart.
        adds_up: Whether the loss is a sum over the batch, so that micro-batches add up unweighted.
        held: What the loss and the other functions of a window hold, beside the model.
        norms: The modules whose forward is about more than its own sample, of the model and of what the loss holds.
        loss_form: What the loss is divided by, settled by the first window that needs it.
        loss_is_pair: Whether the loss returns `(sum, count)`, where that is known already; None to ask it.
        takes_gradients: Whether the loss, or the encoder, takes gradients itself, so that it can't run without;
            found out by the first forward that trains nothing.
        keeps_workspaces: Whether cuBLAS keeps its workspaces between micro-batches; else they are given back.
        has_begun: Whether a window was trained already; before the first, what is cached is given back.
        pins_memory: Whether the workload's loader pins memory, so that copies to a GPU can overlap with computing.
        exchange: What a window exchanges with other ranks; None on one rank.
        copies: Brings micro-batches to the device.
        gathers: Whether `gather_window` gives the rows of the whole window, unless it is recorded without lanes.
        batch_interactions: "exact" where the micro-batches of a window run in lanes that meet where samples interact.
        host_store: Where lanes on a GPU keep what they save for the backward, once they have.
        host_memory_bytes: What that may use of the host's memory; None for all but a tenth of what is available.
        moved_bytes_per_sample: Saved tensors of at least so many bytes for each sample of their lane move there; None
            for those of 1 MiB and more.
        moved_parts: Of each lane's parts between two meetings, so many move what they save, the first ones; None for
            all.
        recomputes: Whether lanes compute again in the backward what follows by cheap operations from what is kept.
        on_stretch: While planning: called where a lane's stretch between two meetings begins, and a meeting, with its
            name, the meetings before it, and the lane (-1 for all).
        widths: Notices micro-batches narrower than planned; None while planning, and on a CPU.
        window_samples: While planning: the samples of a whole window, which the short ones that are recorded stand
            for. Only a loss over all its representations asks.
    """

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    device: torch.device
    scaler: Any = None
    scheduler: Any = None
    clip_grad_norm: float | None = None
    count: Callable[[Batch], Any] | None = None
    accumulate: str = "fp32"
    between_steps: Callable[[nn.Module], object] | None = None
    autocast_dtype: torch.dtype | None = None
    encode: Callable[[nn.Module, Batch], Any] | None = None
    batchnorm: str | None = None
    batch_interactions: str | None = None
    on_nonfinite: str | None = None
    metric: Callable[[nn.Module], Any] | None = None
    scheduling: Scheduling = Scheduling.STEP
    last_metric: Any = None
    steps_taken: int = 0
    epochs_done: int = 0
    adds_up: bool = False
    collates: bool = False
    samples_per_group: int = 1
    held: Holdings = field(default_factory=Holdings)
    norms: Norms = field(default_factory=Norms)
    loss_form: LossForm | None = None
    loss_is_pair: bool | None = None
    takes_gradients: bool = False
    keeps_workspaces: bool = False
    has_begun: bool = False
    window_samples: int | None = None
    gathers: bool = field(init=False)
    configuration: str | None = None
    pins_memory: bool = False
    exchange: Alone | None = None
    host_store: HostStore | None = None
    host_memory_bytes: int | None = None
    moved_bytes_per_sample: int | None = None
    moved_parts: int | None = None
    recomputes: bool = False
    on_stretch: Callable[[str, int, int], None] | None = None
    widths: Widths | None = None
    copies: Copies = field(init=False)

    def __post_init__(self) -> None:
        self.gathers = self.runs_in_lanes
        self.copies = Copies(self.device, ahead=self.pins_memory)

    def absent_rows(self, samples: int) -> float:
        """Return the absent ranks' rows for each of so many samples."""
        if not self.gathers or self.exchange is None or self.exchange.trains:
            return 0.0
        return max(0.0, (self.window_samples or 0) / samples - 1)

    @property
    def runs_in_lanes(self) -> bool:
        """Whether windows of several micro-batches run in lanes."""
        return EXACT in (self.batchnorm, self.batch_interactions)


def open_context(workload: Workload) -> TrainingContext:
    """Make a workload's optimizer and scheduler where it names functions.

    Raises:
        UsageError: It can't be trained.
    """
    refuse_unsupported(workload, ranks_here())
    check_groups(workload.samples_per_group, workload.loader, has_lengths=workload.lengths is not None)
    model = workload.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = workload.optimizer
    if optimizer is None:
        optimizer = torch.optim.AdamW(trained)
    elif not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(trained)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"optimizer= gave {type(optimizer).__name__}, not a torch.optim.Optimizer.",
            hint="Give an optimizer, or a function of the parameters: optimizer=lambda p: torch.optim.SGD(p, lr=0.1).",
        )
    refuse_closure(optimizer)
    held = held_in_window(workload)
    refuse_foreign(model, held, optimizer)
    norms = find_norms(model, held.modules)
    how = chosen_norms(workload.batchnorm, workload.batch_interactions)
    check_choice(norms, how, model)
    if EXACT in (how, workload.batch_interactions):
        refuse_lanes(model, workload.loss)
    scheduler = _scheduler_of(workload.scheduler, optimizer)
    loss = workload.loss if workload.encode is not None else as_loss(workload.loss)
    count = loss.count if isinstance(loss, Criterion) else class_count if is_classes(workload) else None
    quick_imports.leave_out()
    return TrainingContext(
        model=model,
        loss=loss or default_loss,
        optimizer=optimizer,
        device=device_of(trained[0]),
        scaler=workload.scaler,
        scheduler=scheduler,
        metric=workload.metric,
        scheduling=Scheduling.STEP if scheduler is None else read_scheduling(scheduler, workload.scheduler_interval),
        clip_grad_norm=workload.clip_grad_norm,
        count=workload.count or count,
        collates=isinstance(workload.sample, Collated),
        samples_per_group=workload.samples_per_group,
        adds_up=getattr(loss, "adds_up", None) is True,
        accumulate=workload.accumulate,
        between_steps=workload.between_steps,
        autocast_dtype=_DTYPES.get(workload.precision or ""),
        encode=workload.encode,
        batchnorm=how,
        batch_interactions=workload.batch_interactions,
        on_nonfinite=workload.on_nonfinite,
        held=held,
        norms=norms,
        configuration=workload.configuration,
        pins_memory=bool(getattr(workload.loader, "pin_memory", False)),
    )


def is_classes(workload: Workload) -> bool:
    """Return whether the loss is the default one, of inputs and classes."""
    return workload.loss is None and is_pair(workload.sample)


def _scheduler_of(scheduler: Any, optimizer: torch.optim.Optimizer) -> Any:
    if isinstance(scheduler, type) or (scheduler is not None and not hasattr(scheduler, "step")):
        scheduler = _made_scheduler(scheduler, optimizer)
    refuse_other_optimizer(scheduler, optimizer)
    return scheduler


def _made_scheduler(make: Any, optimizer: torch.optim.Optimizer) -> Any:
    try:
        return make(optimizer)
    except TypeError as error:
        if not isinstance(make, type):
            raise
        raise UsageError(
            f"scheduler= is the class {make.__name__}, which cannot be made from the optimizer alone: {error}",
            hint=f"Give a function: scheduler=lambda optimizer: {make.__name__}(optimizer, ...).",
        ) from error


def held_in_window(workload: Workload) -> Holdings:
    """Return what the functions that a window calls hold."""
    return holdings(workload.model, loss=workload.loss, encode=workload.encode, count=workload.count)


def forward(context: TrainingContext, piece: Batch, more: dict[str, Any] | None = None) -> Any:
    """Compute one piece's loss and check it.

    `more` are keywords for a model with its own loss.
    """
    with autocast(context):
        batch = context.copies.bring(piece)
        if context.encode is not None:
            batch = context.encode(context.model, batch)
        return loss_terms.check(context.loss(context.model, {**batch, **more} if more else batch))


def autocast(context: TrainingContext) -> AbstractContextManager[Any]:
    """Enter the workload's precision, around a forward."""
    return torch.autocast(context.device.type, dtype=context.autocast_dtype, enabled=context.autocast_dtype is not None)


def encode(context: TrainingContext, piece: Batch) -> Any:
    """Compute the representations of one piece."""
    assert context.encode is not None
    with autocast(context):
        return context.encode(context.model, context.copies.bring(piece))
