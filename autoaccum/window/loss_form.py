"""Decide once what a window's loss is divided by.

The form of a loss is a value, decided before the first window that needs it and kept in the training context. Where it
isn't plain from the workload, the loss or the model is asked with a forward on two samples that trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ..criterion import Criterion
from ..data import split as cutting
from ..data import tree
from ..devices.registry import get_device
from ..errors import BatchError, UsageError
from ..state.rng import put_rng, take_rng
from ..workload import Batch, class_count, default_loss, is_pair
from .context import TrainingContext, autocast, forward
from .forward_only import forward_only
from .hugging_face import Denominator, can_tell, find_denominator, has_labels
from .loss_terms import adding_up, count_of

_PROBE_SAMPLES = 2  # a forward that only asks should need less memory than one that trains


class LossKind(Enum):
    """What the micro-batches of a window are weighted by."""

    SAMPLES = "a mean over samples"
    COUNTED = "a mean over what count= returns"
    LABELS = "the model's own mean over its labels"
    UNKNOWN = "the model's own loss, of which no average over labels is known; weighted by samples"
    SUM = "(sum, count): a forward pass counts the window first"
    REPRESENTATIONS = "one loss of the representations of the whole window"
    ADDED = "a sum over the batch, as its criterion's reduction asks for; not weighted"
    SINGLE = "not asked, as the window has one micro-batch"
    NOTHING = "not asked, as no label of the window counts"


# What a plan says of its loss; a count read off the batch alone is named where that is known (`average_of`).
AVERAGES = {
    LossKind.SAMPLES: "samples",
    LossKind.COUNTED: "count=",
    LossKind.UNKNOWN: "unknown",
    LossKind.SUM: "(sum, count)",
    LossKind.REPRESENTATIONS: "representations",
    LossKind.ADDED: "count=",
}


@dataclass(frozen=True)
class LossForm:
    """What a loss is divided by over a window.

    Attributes:
        kind: What the micro-batches are weighted by.
        count: What a micro-batch counts, read off the batch alone; None where the batch alone doesn't show it.
        denominator: For the model's own loss: which labels it averages over.
    """

    kind: LossKind
    count: Callable[[Batch], Any] | None = None
    denominator: Denominator | None = None

    @property
    def passes_count(self) -> bool:
        """Whether the model divides by `num_items_in_batch` where it is given one."""
        return self.denominator is not None and self.denominator.passed

    @property
    def is_settled(self) -> bool:
        """Whether it holds for later windows too."""
        return self.kind not in (LossKind.SINGLE, LossKind.NOTHING)


def average_of(context: TrainingContext) -> str:
    """Name what a loss averages over; empty where not asked."""
    form = context.loss_form
    if form is None:
        return ""
    if form.denominator is not None:
        return "shifted labels" if form.denominator.shifted else "labels"
    if isinstance(context.loss, Criterion) and form.count == context.loss.count:
        return context.loss.average
    return "classes" if form.count is class_count else AVERAGES.get(form.kind, "")


def settle_loss_form(context: TrainingContext, pieces: Sequence[Batch]) -> LossForm:
    """Return the form of the loss, decided once.

    The first window that needs it decides.

    Args:
        context: What is trained; keeps the form once it is settled.
        pieces: The window's micro-batches.
    """
    if context.loss_form is not None:
        return context.loss_form
    if not pieces:  # a rank without samples, at the end of an epoch
        return LossForm(LossKind.NOTHING)
    form = _find_loss_form(context, pieces)
    if form.is_settled:
        context.loss_form = form
    return form


def _find_loss_form(context: TrainingContext, pieces: Sequence[Batch]) -> LossForm:
    if context.count is not None:
        return LossForm(LossKind.COUNTED, context.count)
    if context.encode is not None:
        return LossForm(LossKind.REPRESENTATIONS)
    if context.adds_up:
        return LossForm(LossKind.ADDED)
    if context.loss is default_loss and is_pair(pieces[0]):  # its sample was not known when the context was made
        return LossForm(LossKind.COUNTED, class_count)
    mean = LossKind.SAMPLES
    if context.loss is default_loss and has_labels(pieces[0]):
        telling = next((piece for piece in pieces if can_tell(piece)), None)
        if telling is None:
            return LossForm(LossKind.NOTHING)
        few = _few(context, telling)
        denominator = _ask_for_denominator(context, few if can_tell(few) else telling)
        if denominator is not None:
            return LossForm(LossKind.LABELS, denominator.count, denominator)
        mean = LossKind.UNKNOWN
    elif len(pieces) < 2 and context.exchange is None:
        return LossForm(LossKind.SINGLE)
    return LossForm(LossKind.SUM if _returns_pair(context, pieces[0]) else mean)


def window_count(context: TrainingContext, form: LossForm, pieces: Sequence[Batch]) -> Any:
    """Count the whole window before its first backward.

    Returns:
        The count, 0 where nothing counts; None where micro-batches are weighted by samples, or where the window is one
        micro-batch whose loss brings its own count (on one rank).
    """
    if form.kind is LossKind.NOTHING:
        return 0
    if form.count is not None:
        total = sum(adding_up(_number(form.count(piece))) for piece in pieces)
        is_here = not isinstance(total, torch.Tensor) or total.device.type == "cpu"
        if is_here:  # a number on a GPU is waited for when the window ends
            value_of(total)
        return total
    if form.kind is not LossKind.SUM or (len(pieces) < 2 and context.exchange is None):
        return None
    return forward_only(context, lambda: sum(_value(_count_by_forward(context, piece)) for piece in pieces))


def value_of(count: Any) -> float:
    """Return a count as a float.

    Raises:
        UsageError: It is negative or not finite, so that it can weigh nothing.
    """
    value = float(count.detach() if isinstance(count, torch.Tensor) else count)
    if not 0 <= value < math.inf:
        raise UsageError(
            f"A micro-batch or a window counts {value:g}.",
            "A micro-batch's weight is its count divided by the window's, so each is 0 or more.",
            "Return a number of tokens, boxes or samples, or a sum of weights.",
        )
    return value


def _number(count: Any) -> Any:
    """Return a count; refuse what is no number."""
    if isinstance(count, (int, float)) or (hasattr(count, "__float__") and getattr(count, "size", 1) in (1, ())):
        return count
    if isinstance(count, torch.Tensor) and count.numel() == 1:
        return count
    shape = f"a tensor of shape {tuple(count.shape)}" if isinstance(count, torch.Tensor) else f"{count!r}"
    raise UsageError(
        f"count= gave {shape}.",
        "It is what the loss averages over in a batch: a number.",
        "Add it up: count=lambda batch: (batch['labels'] != -100).sum()",
    )


def _ask_for_denominator(context: TrainingContext, piece: Batch) -> Denominator | None:
    """Ask a model that brings its own loss what that averages over."""

    def find() -> Denominator | None:
        rng, batch = take_rng(), tree.to_device(piece, context.device)

        def ask(keywords: dict[str, Any]) -> Any:
            put_rng(rng)
            with autocast(context):
                return context.model(**{**batch, **keywords})

        return find_denominator(ask, batch)

    denominator = forward_only(context, find)
    # Blocks that this left would decide where the window's large ones lie.
    get_device(context.device).release_cache()
    return denominator


def _returns_pair(context: TrainingContext, piece: Batch) -> bool:
    """Ask a loss whether it returns `(sum, count)`, with one micro-batch."""
    if context.loss_is_pair is not None:
        return context.loss_is_pair
    few = _few(context, piece)
    is_pair = forward_only(context, lambda: _count_by_forward(context, few) is not None)
    get_device(context.device).release_cache()
    return is_pair


def _count_by_forward(context: TrainingContext, piece: Batch) -> Any:
    """Return what a loss counts in a copy of a micro-batch."""
    copy = tree.map_leaves(piece, lambda _, leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)
    return count_of(forward(context, copy))


def _value(count: Any) -> Any:
    return count.detach() if isinstance(count, torch.Tensor) else count


def _few(context: TrainingContext, piece: Batch) -> Batch:
    """Return two samples of a micro-batch; all of one that isn't cut."""
    if context.collates or context.samples_per_group > 1:
        return piece
    try:
        return cutting.tile(piece, min(_PROBE_SAMPLES, cutting.batch_size(piece)))
    except BatchError:
        return piece
