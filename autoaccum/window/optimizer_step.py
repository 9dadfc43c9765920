"""End a window: unscale, clip, step, clear and schedule, each once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import NotFinite
from . import fp32_accumulation
from .scheduling import step_after_window
from .step_arguments import closure_needed, is_for_want_of_a_closure

if TYPE_CHECKING:
    from .context import TrainingContext

log = logging.getLogger("autoaccum")


def optimizer_step(
    context: TrainingContext, wide: fp32_accumulation.Parameters, *, counts_nothing: bool, loss: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Clips, steps and clears once.

    Args:
        context: What is trained; its gradients are the window's.
        wide: Parameters whose gradients are in fp32 and are to be cast for the optimizer.
        counts_nothing: No sample of the window counts: parameters, optimizer and scheduler stay as they are.
        loss: The window's, detached: what a scheduler gets that asks for a metric, where the workload gives none.

    Returns:
        The norm before clipping, None where nothing is clipped; and whether the step was taken.

    Raises:
        NotFinite: A gradient isn't finite, and the workload says `on_nonfinite="raise"`.
    """
    if counts_nothing:
        _clear(context)
        return None, False
    grad_norm = _clip(context, wide)
    finite = context.on_nonfinite is None or context.scaler is not None or _is_finite(context, grad_norm)
    fp32_accumulation.narrow(wide)
    stepped = finite or context.on_nonfinite == "warn"
    if context.scaler is not None:
        stepped = finite = _scaled_step(context)
    elif stepped:
        _step(context)
    context.steps_taken += stepped  # before anything else can fail: it was taken
    _clear(context)
    if stepped:
        step_after_window(context, loss)
    if not finite and context.on_nonfinite is not None:
        _tell(context, grad_norm)
    return grad_norm, stepped


def _step(context: TrainingContext) -> None:
    try:
        context.optimizer.step()
    except Exception as error:
        if is_for_want_of_a_closure(context.optimizer, error):
            raise closure_needed(context.optimizer) from error
        raise


def _clip(context: TrainingContext, wide: fp32_accumulation.Parameters) -> torch.Tensor | None:
    if context.scaler is not None and (context.clip_grad_norm is not None or wide):
        context.scaler.unscale_(context.optimizer)  # before clipping, and before small numbers are cast
    if context.clip_grad_norm is None:
        return None
    trained = _trained(context)
    # In two steps: before torch 2.11, `clip_grad_norm_` adds its 1e-6 to each shard's norm, not to the whole one.
    norm = _total_norm(trained)
    nn.utils.clip_grads_with_norm_(trained, context.clip_grad_norm, norm)
    return norm


def _trained(context: TrainingContext) -> list[torch.Tensor]:
    return [p for group in context.optimizer.param_groups for p in group["params"]]


def _total_norm(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients, of shards over all ranks."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = getattr(norm, "full_tensor", None)
    return norm if whole is None else whole()


def _is_finite(context: TrainingContext, grad_norm: torch.Tensor | None) -> bool:
    """Whether every gradient is finite, by their norm.

    That is one pass and one synchronization with the device.
    """
    if grad_norm is None:
        grad_norm = _total_norm(_trained(context))
    return bool(torch.isfinite(grad_norm))


def _scaled_step(context: TrainingContext) -> bool:
    """Step and update the scaler once; False for a non-finite gradient."""
    scale = context.scaler.get_scale()
    context.scaler.step(context.optimizer)
    context.scaler.update()
    return bool(context.scaler.get_scale() >= scale)


def _clear(context: TrainingContext) -> None:
    context.optimizer.zero_grad(set_to_none=True)
    context.model.zero_grad(set_to_none=True)  # what requires a gradient and is in no group would add up for ever


def _tell(context: TrainingContext, grad_norm: torch.Tensor | None) -> None:
    if context.on_nonfinite == "raise":
        raise NotFinite(
            "A window's gradient isn't finite.",
            "Its optimizer step was not taken: parameters, optimizer and scheduler are as they were before it.",
            "Look at its samples, lower the learning rate or clip_grad_norm=; on_nonfinite='skip' passes over it.",
        )
    what = "was taken all the same" if context.on_nonfinite == "warn" and context.scaler is None else "was skipped"
    log.warning("A window's gradient isn't finite (norm %s); its optimizer step %s.", _shown(grad_norm), what)


def _shown(grad_norm: torch.Tensor | None) -> str:
    return "not known" if grad_norm is None else f"{float(grad_norm)}"
