"""The window: micro-batches, their weights, the optimizer step.

The one function that the recorder, the verification and the Runner share. Whatever it keeps alive is part of the
memory that is recorded, so nothing records a copy of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..devices.registry import get_device
from ..phases import BETWEEN, FIRST, LATER, OPTIMIZER, OnPhase
from ..ranks.exchange import Exchange
from ..ranks.representations import Met
from ..ranks.sharded import reshard
from ..workload import Batch
from . import cached_representations, fp32_accumulation, loss_terms
from . import norms as batchnorm
from .context import TrainingContext, autocast, encode, forward, open_context
from .forward_only import forward_only
from .lanes.gather import gathering_absent
from .lanes.training import train_in_lanes
from .loss_form import LossKind, settle_loss_form, window_count
from .micro_batch import Course, backward, is_nothing, keywords, part_of_window, release_workspaces, that_count
from .norms_over_ranks import OwnStatistics
from .optimizer_step import optimizer_step

__all__ = ["TrainingContext", "WindowResult", "forward", "open_context", "run_between", "train_window"]


@dataclass(frozen=True)
class WindowResult:
    """What one window did.

    Attributes:
        loss: The loss of the whole window, as one batch would have given it (a detached scalar on the device).
        samples: Samples in the window, on all ranks.
        grad_norm: Norm of the window's gradient before clipping; None where nothing is clipped.
        stepped: False where no step was taken: nothing in the window counts (all its labels are ignored), a
            GradScaler found a gradient that isn't finite, or `on_nonfinite="skip"` did.
    """

    loss: torch.Tensor
    samples: int
    grad_norm: torch.Tensor | None
    stepped: bool


def train_window(
    context: TrainingContext, pieces: Sequence[Batch], sizes: Sequence[int], *, on_phase: OnPhase | None = None
) -> WindowResult:
    """Train one window: all pieces' gradient as one batch's, then step.

    Args:
        context: What is trained. Its gradients must be unset (None) or zero.
        pieces: The micro-batches, on the host or on the device; moved to the device one at a time.
        sizes: Samples in each piece.
        on_phase: Called with each phase's name; the context manager it returns spans the phase.

    Returns:
        The window's loss, samples and gradient norm.
    """
    phase, exchange = on_phase or _no_phase, context.exchange
    steps, samples = len(pieces), sum(sizes)
    form = settle_loss_form(context, pieces)
    # In lanes all losses are there before the first backward, and no forward pass has to count for them.
    counted = not (context.runs_in_lanes and form.kind is LossKind.SUM)
    total = window_count(context, form, pieces) if counted else None
    if exchange is not None:
        pieces, sizes = that_count(context, form, pieces, sizes, total)
        total, samples = exchange.count(total, samples, len(pieces))
        pieces, sizes = exchange.level(pieces, sizes)
        steps += 1  # those of other ranks
    _begin(context, pieces, sizes)
    window_loss: torch.Tensor | None = None
    cache: cached_representations.Cache | None = None
    norms = batchnorm.Window(context.norms, context.batchnorm, steps, waits=exchange is not None)
    in_lanes = context.runs_in_lanes and (len(pieces) > 1 or exchange is not None)
    half = fp32_accumulation.wide_parameters(context.model.parameters(), context.accumulate, steps)
    with fp32_accumulation.wide_gradients(half), context.copies.window():
        with norms.entered():
            if in_lanes:
                with phase(FIRST):
                    window_loss, total = train_in_lanes(Course(context, form, norms), pieces, sizes, total, samples)
            for index, (piece, size) in enumerate(() if in_lanes else zip(pieces, sizes, strict=True)):
                with phase(FIRST if index == 0 else LATER), gathering_absent(context.absent_rows(size)):
                    if context.encode is not None and steps > 1:
                        cache = cache or _all_representations(context, norms, pieces)
                        loss = _from_cache(context, norms, cache, index, piece)
                    else:
                        loss, total = _micro_batch(Course(context, form, norms), piece, size / samples, total)
                    window_loss = loss if window_loss is None else window_loss.add_(loss)
                    del loss
                    release_workspaces(context)
            if cache is not None:
                cache.after.restore()
            elif exchange is not None and context.encode is not None:  # others wait for a rank without samples
                window_loss = _all_representations(context, norms, ()).loss
        with phase(OPTIMIZER):
            context.copies.release_copied_ahead()
            window_loss = _of_all_ranks(context, norms, half, window_loss)
            counts_nothing = is_nothing(context, total)
            grad_norm, stepped = optimizer_step(context, half, counts_nothing=counts_nothing, loss=window_loss)
            context.copies.release()
            release_workspaces(context)
    return WindowResult(window_loss, samples, grad_norm, stepped)


def _begin(context: TrainingContext, pieces: Sequence[Batch], sizes: Sequence[int]) -> None:
    """Prepare the allocator for a window."""
    if not context.has_begun:  # whatever this process did before: the first window finds what a fresh one would
        get_device(context.device).release_cache()
        context.has_begun = True
    if context.widths is not None:
        context.widths.begin_window(pieces, sizes)


def _of_all_ranks(
    context: TrainingContext, norms: batchnorm.Window, wide: Sequence[torch.Tensor], loss: torch.Tensor | None
) -> torch.Tensor:
    """Sum gradients and statistics over ranks; return the window's loss."""
    loss, exchange = _no_loss(context) if loss is None else loss, context.exchange
    if exchange is None:
        return loss
    own = OwnStatistics(norms)  # before the reduction: here running out of memory is private
    loss = exchange.reduce(wide, loss, own.calls)
    norms.commit(own.merged(exchange.calls, exchange.add_up))
    return loss


def run_between(context: TrainingContext, *, on_phase: OnPhase | None = None) -> None:
    """Run what the workload does between windows, like an evaluation."""
    if context.between_steps is not None:
        with (on_phase or _no_phase)(BETWEEN):
            context.between_steps(context.model)
            reshard(context.model)
            release_workspaces(context)


def _no_loss(context: TrainingContext) -> torch.Tensor:
    """Return the loss of a rank without samples that count."""
    dtype = next((p.dtype for p in context.model.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros((), device=context.device, dtype=torch.promote_types(dtype, torch.float32))


def _micro_batch(course: Course, piece: Batch, share: float, total: Any) -> tuple[torch.Tensor, Any]:
    """Forward and backward of one piece.

    Args:
        course: What the window's micro-batches share.
        piece: The micro-batch.
        share: Its part of the window's samples.
        total: What the window counts, where that is known.

    Returns:
        Its part of the window's loss, detached, and what the window counts.
    """
    context, form = course.context, course.form
    with course.norms.forward():
        out = forward(context, piece, keywords(context, form, share, total))
    counted = loss_terms.count_of(out)
    total = counted if total is None else total
    loss = part_of_window(context, form, piece, out, share, total)
    if loss is None:
        return torch.zeros_like(out.detach()), total
    del out
    backward(context, loss)
    return loss.detach(), total


def _all_representations(
    context: TrainingContext, norms: batchnorm.Window, pieces: Sequence[Batch]
) -> cached_representations.Cache:
    """Encode all micro-batches, and compute their loss's gradients.

    The first passes of a loss over representations.
    """

    def encode_first(piece: Batch) -> Any:
        with norms.forward():
            return forward_only(context, lambda: encode(context, piece), keeps=True)

    def backward_of_all(representations: Any) -> torch.Tensor:
        with autocast(context):
            loss = loss_terms.whole(loss_terms.check(context.loss(context.model, representations)))
        backward(context, loss)
        return loss.detach()

    exchange = context.exchange
    if not isinstance(exchange, Exchange):
        return cached_representations.fill(
            context.model, encode_first, backward_of_all, pieces, context.window_samples, context.held
        )

    def meet(own: Any, rows: int) -> Met:
        return exchange.meet(own, rows, context.device)

    cache = cached_representations.fill(
        context.model, encode_first, backward_of_all, pieces, held=context.held, meet=meet
    )
    if exchange.control.rank:
        exchange.reduction.drop()
        cache.loss = torch.zeros_like(cache.loss)
    return cache


def _from_cache(
    context: TrainingContext, norms: batchnorm.Window, cache: cached_representations.Cache, index: int, piece: Batch
) -> torch.Tensor:
    """Run one micro-batch's second pass; return its share of the loss.

    The first one has all of it.
    """

    def encode_again(piece: Batch) -> Any:
        with norms.forward(again=True):
            return encode(context, piece)

    cached_representations.repeat(cache, index, encode_again, piece)
    return cache.loss if index == 0 else torch.zeros_like(cache.loss)


def _no_phase(name: str) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()
