"""Check that the optimizer trains the model.

Refused where it has no tensor of it, noted where it has some only.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UsageError
from ..state.closures import Holdings
from ..torch_compat import local_bytes
from ..units import show_bytes

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


def left_out_note(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Describe tensors that require a gradient and the optimizer lacks.

    Empty for none.
    """
    theirs = {id(p) for p in _tensors(optimizer)}
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    left = [(name, p) for name, p in wanted if id(p) not in theirs]
    if not left:
        return ""
    left_bytes = sum(local_bytes(p) for _, p in left)
    shown = ", ".join(name for name, _ in left[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
    return (
        f"{type(optimizer).__name__} has {len(wanted) - len(left)} of the model's {len(wanted)} tensors that require a "
        f"gradient. The other {len(left)} ({shown}) get gradients ({show_bytes(left_bytes)}) and "
        "are never changed by it: if they are to stay as they are, requires_grad_(False) spares that memory; "
        "if not, give it all of model.parameters()."
    )


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
