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

from ..devices.cuda import workspaces
from ..phases import BETWEEN, FIRST, LATER, OPTIMIZER, OnPhase
from ..workload import Batch
from . import cached_representations, fp32_accumulation, loss_terms
from . import norms as batchnorm
from .context import Parts, autocast, encode, forward, open_parts
from .loss_count import asked, window_count
from .optimizer_step import optimizer_step

__all__ = ["Parts", "WindowResult", "forward", "open_parts", "run_between", "train_window"]


@dataclass(frozen=True)
class WindowResult:
    """What one window did.

    Attributes:
        loss: The loss of the whole window, as one batch would have given it (a detached scalar on the device).
        samples: Samples in the window.
        grad_norm: Norm of the window's gradient before clipping; None where nothing is clipped.
        stepped: False where no step was taken: nothing in the window counts (all its labels are ignored), a
            GradScaler found a gradient that isn't finite, or `on_nonfinite="skip"` did.
    """

    loss: torch.Tensor
    samples: int
    grad_norm: torch.Tensor | None
    stepped: bool


def train_window(
    parts: Parts, pieces: Sequence[Batch], sizes: Sequence[int], *, on_phase: OnPhase | None = None
) -> WindowResult:
    """Trains one window: the gradient of all pieces as of one batch, then one optimizer step.

    Args:
        parts: What is trained. Its gradients must be unset (None) or zero.
        pieces: The micro-batches, on the host or on the device; moved to the device one at a time.
        sizes: Samples in each piece.
        on_phase: Called with each phase's name; the context manager it returns spans the phase.

    Returns:
        The window's loss, samples and gradient norm.
    """
    phase = on_phase or _no_phase
    steps, samples = len(pieces), sum(sizes)
    total = window_count(parts, pieces)
    if not parts.has_begun:  # whatever this process did before: the first window finds what a fresh one would
        workspaces.give_back(parts.device)
        parts.has_begun = True
    window_loss: torch.Tensor | None = None
    cache: cached_representations.Cache | None = None
    norms = batchnorm.Window(parts.norms, parts.batchnorm, steps)
    half = fp32_accumulation.wide_parameters(parts.model.parameters(), parts.accumulate, steps)
    with fp32_accumulation.wide_gradients(half):
        with norms.entered():
            for index, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
                with phase(FIRST if index == 0 else LATER):
                    if parts.encode is not None and steps > 1:
                        cache = cache or _all_representations(parts, norms, pieces)
                        loss = _from_cache(parts, norms, cache, index, piece)
                    else:
                        loss, total = _micro_batch(parts, norms, piece, size / samples, total)
                    window_loss = loss if window_loss is None else window_loss.add_(loss)
                    del loss
                    _let_go_of_workspaces(parts)
            if cache is not None:
                cache.after.restore()
        assert window_loss is not None
        with phase(OPTIMIZER):
            parts.copies.let_go()
            counts_nothing = total is not None and not bool(total)
            grad_norm, stepped = optimizer_step(parts, half, counts_nothing=counts_nothing, loss=window_loss)
            _let_go_of_workspaces(parts)
    return WindowResult(window_loss, samples, grad_norm, stepped)


def run_between(parts: Parts, *, on_phase: OnPhase | None = None) -> None:
    """Runs what the workload does between windows, an evaluation say; nothing where it does nothing."""
    if parts.between is not None:
        with (on_phase or _no_phase)(BETWEEN):
            parts.between(parts.model)
            _let_go_of_workspaces(parts)


def _let_go_of_workspaces(parts: Parts) -> None:
    if not parts.keeps_workspaces:
        workspaces.let_go_of_workspaces(parts.device)


def _micro_batch(
    parts: Parts, norms: batchnorm.Window, piece: Batch, share: float, total: Any
) -> tuple[torch.Tensor, Any]:
    """Forward and backward of one piece.

    Args:
        parts: What is trained.
        norms: What the window does with normalizations.
        piece: The micro-batch.
        share: Its part of the window's samples.
        total: What the window counts, where that is known.

    Returns:
        Its part of the window's loss, detached, and what the window counts.
    """
    passed = parts.denominator is not None and parts.denominator.passed
    # Times the share, which the loss is multiplied by: so what the model adds to its loss is weighted by samples.
    more = {"num_items_in_batch": torch.as_tensor(loss_terms.nonzero(total) * share)} if passed else None
    with norms.forward():
        out = forward(parts, piece, more)
    counted = loss_terms.count_of(out)
    total = counted if total is None else total
    count = parts.count(piece) if parts.count is not None and not passed and counted is None else None
    if count is not None and not bool(count):
        return torch.zeros_like(out.detach()), total  # a mean of nothing: its backward is 0 / 0, whatever it is times
    loss = loss_terms.part(out, share, count, None if total is None else loss_terms.nonzero(total))
    del out
    _backward(parts, loss)
    return loss.detach(), total


def _all_representations(
    parts: Parts, norms: batchnorm.Window, pieces: Sequence[Batch]
) -> cached_representations.Cache:
    """The first passes of a loss over representations: those of all micro-batches, and their loss's gradients."""

    def encode_first(piece: Batch) -> Any:
        with norms.forward():
            return asked(parts, lambda: encode(parts, piece), keeps=True)

    def backward(representations: Any) -> torch.Tensor:
        with autocast(parts):
            loss = loss_terms.whole(loss_terms.check(parts.loss(parts.model, representations)))
        _backward(parts, loss)
        return loss.detach()

    return cached_representations.fill(parts.model, encode_first, backward, pieces, parts.window_samples, parts.held)


def _from_cache(
    parts: Parts, norms: batchnorm.Window, cache: cached_representations.Cache, index: int, piece: Batch
) -> torch.Tensor:
    """The second pass of one micro-batch; returns its part of the window's loss: all of it, in the first."""

    def encode_again(piece: Batch) -> Any:
        with norms.forward(again=True):
            return encode(parts, piece)

    cached_representations.repeat(cache, index, encode_again, piece)
    return cache.loss if index == 0 else torch.zeros_like(cache.loss)


def _backward(parts: Parts, loss: torch.Tensor) -> None:
    scaled: Any = parts.scaler.scale(loss) if parts.scaler else loss
    with loss_terms.graph_is_there():
        scaled.backward()


def _no_phase(name: str) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()
