"""Collect and put back all that training changes between windows."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..window.context import TrainingContext

_OPTIONAL = ("scheduler", "scaler")


def training_state(context: TrainingContext) -> dict[str, Any]:
    """Return the state of all parts of training, for a checkpoint."""
    optional = {name: getattr(context, name) for name in _OPTIONAL}
    return {
        "model": context.model.state_dict(),
        "optimizer": context.optimizer.state_dict(),
        **{name: None if part is None else part.state_dict() for name, part in optional.items()},
        "number": context.steps_taken,
        "epochs": context.epochs_done,
    }


def load_training_state(context: TrainingContext, state: dict[str, Any]) -> None:
    """Put back what `training_state` returned.

    Raises:
        UsageError: It belongs to another workload.
    """
    for part in _OPTIONAL:
        if (state[part] is None) != (getattr(context, part) is None):
            has, lacks = ("workload", "checkpoint") if state[part] is None else ("checkpoint", "workload")
            raise UsageError(
                f"The {has} has a {part}, and the {lacks} has none.",
                "Training would go on in another way than it was begun.",
                f"Resume with the workload that wrote the checkpoint, or give this one {part}= as that had it.",
            )
    context.model.load_state_dict(state["model"])
    context.optimizer.load_state_dict(state["optimizer"])
    for part in _OPTIONAL:
        if state[part] is not None:
            getattr(context, part).load_state_dict(state[part])
    context.steps_taken = state["number"]
    context.epochs_done = state.get("epochs", 0)
