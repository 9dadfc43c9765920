"""The window: micro-batches, their weights, the optimizer step.

The one function that the recorder, the verification and the Runner share. Whatever it keeps alive is part of the
memory that is recorded, so nothing records a copy of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import restore, tree
from .errors import UsageError
from .recording import BETWEEN, FIRST, LATER, OPTIMIZER
from .workload import Batch, Loss, Workload, class_count, default_loss, is_pair

OnPhase = Callable[[str], AbstractContextManager[Any]]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class Parts:
    """A workload whose optimizer and scheduler exist: what a window works on.

    Attributes:
        counts_by_forward: Found out by the first window: the loss is a `(sum, count)` pair and no `count=` was given,
            so that each window of several micro-batches first counts by a forward pass without gradients.
    """

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    device: torch.device
    scaler: Any = None
    scheduler: Any = None
    clip_grad_norm: float | None = None
    count: Callable[[Batch], Any] | None = None
    between: Callable[[nn.Module], object] | None = None
    autocast_dtype: torch.dtype | None = None
    counts_by_forward: bool = False
    loss_is_mean: bool = False


@dataclass(frozen=True)
class WindowResult:
    """What one window did.

    Attributes:
        loss: The loss of the whole window, as one batch would have given it (a detached scalar on the device).
        samples: Samples in the window.
        grad_norm: Norm of the window's gradient before clipping; None where nothing is clipped.
        stepped: False where a GradScaler found a gradient that isn't finite and skipped the step.
    """

    loss: torch.Tensor
    samples: int
    grad_norm: torch.Tensor | None
    stepped: bool


def open_parts(workload: Workload) -> Parts:
    """Makes the optimizer and the scheduler of a workload where it names functions for them."""
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
    scheduler = workload.scheduler
    if scheduler is not None and not hasattr(scheduler, "step"):
        scheduler = scheduler(optimizer)
    return Parts(
        model=model,
        loss=workload.loss or default_loss,
        optimizer=optimizer,
        device=trained[0].device,
        scaler=workload.scaler,
        scheduler=scheduler,
        clip_grad_norm=workload.clip_grad_norm,
        count=workload.count or (class_count if workload.loss is None and is_pair(workload.sample) else None),
        between=workload.between,
        autocast_dtype=_DTYPES.get(workload.precision or ""),
    )


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
    samples = sum(sizes)
    total = window_count(parts, pieces)
    window_loss: torch.Tensor | None = None
    for index, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        with phase(FIRST if index == 0 else LATER):
            loss = _micro_batch(parts, piece, None if len(pieces) == 1 else size / samples, total)
            window_loss = loss if window_loss is None else window_loss.add_(loss)
            del loss
    assert window_loss is not None
    with phase(OPTIMIZER):
        grad_norm, stepped = _optimizer_step(parts)
    return WindowResult(window_loss, samples, grad_norm, stepped)


def run_between(parts: Parts, *, on_phase: OnPhase | None = None) -> None:
    """Runs what the workload does between windows, an evaluation say; nothing where it does nothing."""
    if parts.between is not None:
        with (on_phase or _no_phase)(BETWEEN):
            parts.between(parts.model)


def window_count(parts: Parts, pieces: Sequence[Batch]) -> Any:
    """What the loss counts in the whole window, known before its first backward.

    Returns:
        The count; None where the loss is a mean over samples, or where the window is one piece, which needs none.
    """
    if len(pieces) < 2:
        return None
    if parts.count is not None:
        return _nonzero(sum(parts.count(piece) for piece in pieces))
    if not (parts.counts_by_forward or _is_pair(parts, pieces[0])):
        return None
    with _untouched(parts), torch.no_grad():
        return _nonzero(sum(_forward(parts, _copy(piece))[1] for piece in pieces))


def _is_pair(parts: Parts, piece: Batch) -> bool:
    """Whether the loss returns `(sum, count)`; asked once, of one micro-batch, and remembered."""
    if parts.loss_is_mean:
        return False
    with _untouched(parts), torch.no_grad():
        parts.counts_by_forward = isinstance(_forward(parts, _copy(piece)), tuple)
    parts.loss_is_mean = not parts.counts_by_forward
    return parts.counts_by_forward


def _copy(piece: Batch) -> Batch:
    """A loss may write into its batch; a forward that only counts must not spoil it for the real one."""
    return tree.map_leaves(piece, lambda _, leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)


def _untouched(parts: Parts) -> AbstractContextManager[Any]:
    """Puts back the random state and the buffers, which a forward that only counts must not move."""
    return restore.kept(model=parts.model, storages=False)


def _forward(parts: Parts, piece: Batch) -> Any:
    with torch.autocast(parts.device.type, dtype=parts.autocast_dtype, enabled=parts.autocast_dtype is not None):
        out = parts.loss(parts.model, tree.to_device(piece, parts.device))
    if isinstance(out, tuple):
        _check_pair(out)
    return out


def _check_pair(out: tuple[Any, ...]) -> None:
    """A tuple is `(sum, count)` and nothing else: `(loss, logits)` would be divided by its logits without a word."""
    numbers = [isinstance(part, (int, float)) or (isinstance(part, torch.Tensor) and part.numel() == 1) for part in out]
    if len(out) != 2 or not all(numbers) or getattr(out[1], "requires_grad", False):
        told = ", ".join(f"{tuple(p.shape)}" if isinstance(p, torch.Tensor) else type(p).__name__ for p in out)
        raise UsageError(
            f"The loss returned a tuple of {len(out)} ({told}), which is not (sum, count).",
            "A tuple is taken for the sum over the batch and what it is to be divided by.",
            "Return the mean alone as a scalar, or (sum, count) with a count that needs no gradient.",
        )


def _micro_batch(parts: Parts, piece: Batch, share: float | None, total: Any) -> torch.Tensor:
    """Forward and backward of one piece; returns its part of the window's loss, detached.

    Args:
        parts: What is trained.
        piece: The micro-batch.
        share: Its part of the window's samples; None where it is the whole window.
        total: What the window counts, where that is known.
    """
    out = _forward(parts, piece)
    if isinstance(out, tuple):
        loss = out[0] / (_nonzero(out[1]) if total is None else total)
    elif share is None:
        loss = out
    elif total is None or parts.count is None:
        loss = out * share
    else:
        loss = out * parts.count(piece) / total  # in this order: two integers divided would be a float32
    del out
    (parts.scaler.scale(loss) if parts.scaler else loss).backward()
    detached: torch.Tensor = loss.detach()
    return detached


def _optimizer_step(parts: Parts) -> tuple[torch.Tensor | None, bool]:
    """Clips, steps and clears once; returns the norm before clipping and whether the step was taken."""
    optimizer, scaler, grad_norm, stepped = parts.optimizer, parts.scaler, None, True
    if parts.clip_grad_norm is not None:
        if scaler:
            scaler.unscale_(optimizer)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(trained, parts.clip_grad_norm)
    if scaler:
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        stepped = scaler.get_scale() >= scale
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parts.model.zero_grad(set_to_none=True)  # what requires a gradient and is in no group would add up for ever
    if parts.scheduler is not None and stepped:
        parts.scheduler.step()
    return grad_norm, stepped


def _nonzero(count: Any) -> Any:
    """The count, or 1 where nothing is counted: the sum is 0 then, and 0 / 0 would poison the gradient."""
    return torch.where(count == 0, 1, count) if isinstance(count, torch.Tensor) else count or 1


def _no_phase(name: str) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()
