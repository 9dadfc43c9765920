"""Weight one micro-batch's loss within its window, and run backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..devices.registry import get_device
from ..workload import Batch
from . import loss_terms
from . import norms as batchnorm
from .context import TrainingContext
from .loss_form import LossForm, LossKind, value_of


@dataclass(frozen=True, eq=False)
class Course:
    """What the micro-batches of a window share.

    Attributes:
        context: What is trained.
        form: What its loss is divided by.
        norms: What the window does with normalizations.
    """

    context: TrainingContext
    form: LossForm
    norms: batchnorm.Window


def is_nothing(context: TrainingContext, count: Any) -> bool:
    """Return whether a count is known to be 0.

    A device that computes nothing has no counts: all read as 0 there, and all of the window is to be recorded.

    Raises:
        UsageError: It is negative or not finite, so that it could weigh nothing.
    """
    if count is None or not get_device(context.device).computes:
        return False
    return value_of(count) == 0


def that_count(
    context: TrainingContext, form: LossForm, pieces: Sequence[Batch], sizes: Sequence[int], total: Any
) -> tuple[Sequence[Batch], Sequence[int]]:
    """Return the micro-batches that this rank runs for its own gradient.

    None where all of them count nothing, unless their samples meet those of other ranks. Where ranks run equally
    many, neither is one that counts nothing among others that do: a mean of nothing is NaN, and so is its gradient
    times 0. One that counts is repeated for it.
    """
    if context.encode is None and not context.runs_in_lanes and is_nothing(context, total):
        return (), ()
    if context.exchange is None or not context.exchange.in_step or form.count is None:
        return pieces, sizes
    found = [each for each in zip(pieces, sizes, strict=True) if not is_nothing(context, form.count(each[0]))]
    return [piece for piece, _ in found], [size for _, size in found]


def release_workspaces(context: TrainingContext) -> None:
    """Give cuBLAS's workspaces back, unless they are kept."""
    if not context.keeps_workspaces:
        get_device(context.device).release_workspaces()


def keywords(context: TrainingContext, form: LossForm, share: float, total: Any) -> dict[str, Any] | None:
    """Return the keywords of a model that divides by the count itself."""
    # Times the share, which the loss is multiplied by: so what the model adds to its loss is weighted by samples.
    share = share or 1.0  # of a batch that is repeated for nothing, whose 0 would be divided by
    return {"num_items_in_batch": _count_on_device(context, total, share)} if form.passes_count else None


def _count_on_device(context: TrainingContext, total: Any, share: float) -> torch.Tensor:
    """Return the count's part that a model divides its loss by.

    In the model's own type, fp32 at least: rounded to fp32 it would cost a model in fp64 half of its digits. It is made
    on the device: a model that moves a host's number there waits for all that was asked of a GPU.
    """
    dtype = torch.promote_types(next(map(_float_type, context.model.parameters()), torch.float32), torch.float32)
    if isinstance(total, torch.Tensor) and total.device.type == context.device.type != "cpu":
        part: torch.Tensor = loss_terms.nonzero(total).to(dtype) * share
        return part
    return torch.full((), float(loss_terms.nonzero(total)) * share, dtype=dtype, device=context.device)


def _float_type(parameter: torch.Tensor) -> torch.dtype:
    return parameter.dtype if parameter.is_floating_point() else torch.float32


def part_of_window(
    context: TrainingContext, form: LossForm, piece: Batch, out: Any, share: float, total: Any
) -> torch.Tensor | None:
    """Return a micro-batch's part of the window's loss, or None.

    None where it counts nothing.

    A mean of nothing is no part: its backward is 0 / 0, whatever it is multiplied by.

    Args:
        context: What is trained.
        form: What its loss is divided by.
        piece: The micro-batch.
        out: What the loss returned.
        share: The micro-batch's part of the window's samples.
        total: What the window counts; None where nothing is counted.
    """
    reads_count = None if form.passes_count or loss_terms.count_of(out) is not None else form.count
    count = None if reads_count is None else reads_count(piece)
    in_step = context.exchange is not None and context.exchange.in_step
    if is_nothing(context, count) and not in_step:
        return None
    weight = 1.0 if form.kind is LossKind.ADDED else share
    part = loss_terms.part(out, weight, count, None if total is None else loss_terms.nonzero(total))
    if in_step and share == 0:  # other ranks wait for its backward's collectives
        part = part * 0
    return part


def backward(context: TrainingContext, loss: torch.Tensor, run: Callable[[torch.Tensor], None] | None = None) -> None:
    """Run backward of a loss, scaled where the workload has a scaler."""
    if context.exchange is not None and context.exchange.loss_factor != 1.0:
        loss = loss * context.exchange.loss_factor
    scaled: Any = context.scaler.scale(loss) if context.scaler else loss
    run = run or torch.Tensor.backward  # looked up here: other libraries replace it
    with loss_terms.graph_is_there():
        run(scaled)
