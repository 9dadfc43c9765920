"""What a loop's window calls to run backward, clip and step.

The plain loop's own backend is here; another library's (integrations/accelerate.py) overrides what it does otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..ranks.group import ranks_here
from ..window.loss_terms import graph_is_there
from ..window.scheduling import wants_metric

_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine", "PipelineStage")


class LoopBackend:
    """Runs backward, clips and steps as a plain PyTorch loop does.

    Args:
        model: The model, where it is known; on several ranks the DistributedDataParallel module.
        scaler: A `torch.amp.GradScaler`, or None.

    Raises:
        UsageError: The model isn't known on several ranks, or is sharded.
    """

    def __init__(self, model: nn.Module | None = None, scaler: Any = None) -> None:
        self.model, self.scaler = model, scaler
        if model is None and ranks_here() > 1:
            raise UsageError(
                f"This process is one of {ranks_here()} ranks, and the model isn't known.",
                "Its gradients are to be reduced once a window, not once a micro-batch.",
                "Give it: autoaccum.windows(loader, plan, model=model), the DistributedDataParallel module.",
            )
        names = {cls.__name__ for module in (model.modules() if model else ()) for cls in type(module).__mro__}
        sharded = next((name for name in _SHARDED if name in names), None)
        if sharded is not None:
            raise UsageError(
                f"The model is sharded ({sharded}).",
                "Every forward and backward of it is a collective, so ranks need equal numbers of micro-batches.",
                "Use DistributedDataParallel, or one process.",
            )

    @property
    def synchronizes(self) -> bool:
        """Whether the model itself reduces gradients over ranks in backward."""
        return isinstance(self.model, nn.parallel.DistributedDataParallel)

    def without_sync(self) -> AbstractContextManager[Any]:
        """Keep gradients on this rank while it is entered."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def check_sync(self) -> None:
        """Refuse a synchronizing backward that something keeps from it.

        Raises:
            UsageError: The loop has a no_sync of its own.
        """
        if not getattr(self.model, "require_backward_grad_sync", True):
            raise UsageError(
                "The window's last micro-batch is inside a no_sync() or accelerator.accumulate() of the loop.",
                "Gradients would not be reduced over ranks; the window does this itself, once.",
                "Leave no_sync() and accumulate() out of the loop.",
            )

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate a weighted loss."""
        scaled: Any = self.scaler.scale(loss) if self.scaler is not None else loss
        with graph_is_there():
            scaled.backward()

    def clip(self, optimizers: Sequence[Any], max_norm: float) -> torch.Tensor:
        """Clip the gradients of all optimizers together; return their norm."""
        for optimizer in optimizers if self.scaler is not None else ():
            self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters_of(optimizers), max_norm)

    def step(self, optimizers: Sequence[Any]) -> bool:
        """Step each optimizer; return whether it was taken."""
        if self.scaler is None:
            for optimizer in optimizers:
                optimizer.step()
            return True
        scale = self.scaler.get_scale()
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return bool(self.scaler.get_scale() >= scale)

    def schedule(self, scheduler: Any, loss: torch.Tensor) -> None:
        """Step a scheduler once; a metric it asks for is the loss."""
        if wants_metric(scheduler):
            scheduler.step(float(loss))
        else:
            scheduler.step()


def parameters_of(optimizers: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tensors of optimizers, each once."""
    found = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    return list({id(p): p for p in found}.values())
