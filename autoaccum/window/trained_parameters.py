"""Check that the optimizer trains the model.

Refused where it has no tensor of it, noted where it has some only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UsageError
from ..state.closures import Holdings
from ..torch_compat import local_bytes
from ..units import show_bytes

if TYPE_CHECKING:
    from .context import TrainingContext

_SHOWN = 3  # names in a note


def refuse_foreign(model: nn.Module, held: Holdings, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer without any tensor of the model or loss.

    It would train nothing.

    Raises:
        UsageError: It is over other tensors.
    """
    theirs = _tensors(optimizer)
    own = {id(p) for p in model.parameters() if p.requires_grad}
    beside = {id(p) for p in held.parameters.values()} | {id(thing) for _, thing in held.things}
    if any(id(p) in own or id(p) in beside for p in theirs):
        return
    name, of = type(optimizer).__name__, type(model).__name__
    shapes = [tuple(p.shape) for p in theirs]
    if shapes and shapes == [tuple(p.shape) for p in model.parameters() if p.requires_grad]:
        why = (
            "They have the same shapes: it was made for this model before that was copied, loaded anew, wrapped or "
            "converted, or for a twin of it."
        )
    else:
        why = "It is over another model's tensors, so that this one's gradients would be computed and dropped."
    raise UsageError(
        f"{name} has {len(theirs)} tensors, and none of the {len(own)} of {of} that require a gradient: "
        "training would change nothing.",
        why,
        "Make it when the model is as it will be trained, or let the Workload make it: "
        f"optimizer=lambda parameters: torch.optim.{name}(parameters, ...).",
    )


def left_out_note(context: TrainingContext) -> str:
    """Describe tensors that require a gradient and the optimizer lacks.

    Those of the model, and of a loss that is a module. Empty for none.
    """
    model, optimizer = context.model, context.optimizer
    theirs = {id(p) for p in _tensors(optimizer)}
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    left = [(name, p) for name, p in wanted if id(p) not in theirs]
    notes = [_note_on_criterion(context, theirs)]
    if left:
        left_bytes = sum(local_bytes(p) for _, p in left)
        notes.insert(
            0,
            f"{type(optimizer).__name__} has {len(wanted) - len(left)} of the model's {len(wanted)} tensors that "
            f"require a gradient. The other {len(left)} ({_shown(left)}) get gradients ({show_bytes(left_bytes)}) and "
            "are never changed by it: if they are to stay as they are, requires_grad_(False) spares that memory; "
            "if not, give it all of model.parameters().",
        )
    return " ".join(filter(None, notes))


def _note_on_criterion(context: TrainingContext, theirs: Collection[int]) -> str:
    """Describe a criterion's own tensors that nothing trains."""
    criterion = getattr(context.loss, "criterion", context.loss)
    if not isinstance(criterion, nn.Module) or criterion is context.model:
        return ""
    own = [(name, p) for name, p in criterion.named_parameters() if p.requires_grad]
    left = [(name, p) for name, p in own if id(p) not in theirs]
    if not left:
        return ""
    name = type(context.optimizer).__name__
    return (
        f"{name} lacks {len(left)} of the {len(own)} tensors of the loss {type(criterion).__name__} that require a "
        f"gradient ({_shown(left)}): they stay as they are. If they are to be trained, give it both: "
        f"optimizer={name}([*model.parameters(), *loss.parameters()])."
    )


def _shown(named: Sequence[tuple[str, torch.Tensor]]) -> str:
    return ", ".join(name for name, _ in named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "")


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
