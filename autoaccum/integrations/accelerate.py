"""Let an Accelerator run a window's backward, clipping and step.

What its own accumulation does is undone or left out: `Accelerator.backward` divides by the configured steps, and
`accumulate` closes a window at the loader's end whatever it holds. Its wrappers of optimizer and scheduler keep their
rules: they act where `sync_gradients` is set, pass over a step that its scaler skipped, and a scheduler is stepped once
for each process (unless `split_batches` or `step_scheduler_with_optimizer=False`).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..window.loss_terms import graph_is_there
from .loop_backend import LoopBackend, parameters_of

_UNSUPPORTED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA", "TP")


class AcceleratorBackend(LoopBackend):
    """Runs backward, clips and steps by an Accelerator.

    Args:
        accelerator: The `accelerate.Accelerator`.
        model: The prepared model; None for the one that the accelerator prepared.
        loader: The prepared loader.

    Raises:
        UsageError: The accelerator, or how it prepared the loader, can't give exact windows.
    """

    def __init__(self, accelerator: Any, model: nn.Module | None, loader: Any) -> None:
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if kind in _UNSUPPORTED:
            raise UsageError(
                f"The Accelerator's distributed type is {kind}.",
                "It accumulates by a count of its own, or shards the model.",
                "Use DistributedDataParallel (accelerate launch --multi_gpu) or one process.",
            )
        super().__init__(model or _prepared(accelerator))
        self._accelerator = accelerator
        _check_loader(loader, accelerator.num_processes)

    def without_sync(self) -> AbstractContextManager[Any]:
        """Keep gradients on this rank while it is entered."""
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self.model)
        return context

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate by the accelerator, undivided."""
        with graph_is_there():
            self._accelerator.backward(loss * self._accelerator.gradient_accumulation_steps)

    def clip(self, optimizers: Sequence[Any], max_norm: float) -> torch.Tensor:
        """Unscale and clip by the accelerator; return the norm."""
        self._accelerator.sync_gradients = True
        norm: torch.Tensor = self._accelerator.clip_grad_norm_(parameters_of(optimizers), max_norm)
        return norm

    def step(self, optimizers: Sequence[Any]) -> bool:
        """Step the prepared optimizers; return whether it was taken."""
        self._accelerator.sync_gradients = True
        for optimizer in optimizers:
            optimizer.step()
        return not any(getattr(optimizer, "step_was_skipped", False) for optimizer in optimizers)

    def schedule(self, scheduler: Any, loss: torch.Tensor) -> None:
        """Step a scheduler by its wrapper's rules."""
        inner = getattr(scheduler, "scheduler", scheduler)
        if isinstance(inner, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(float(loss))
        elif inner is scheduler:
            super().schedule(scheduler, loss)
        else:
            scheduler.step()


def _prepared(accelerator: Any) -> nn.Module | None:
    """Return the model that an accelerator prepared; None for none or several.

    It keeps the model as it was before it was wrapped, and only the loop has the wrapper, so that is looked for among
    all objects.
    """
    models = list(getattr(accelerator, "_models", ()))
    if len(models) != 1 or accelerator.num_processes == 1:
        return models[0] if len(models) == 1 else None
    wrapper = nn.parallel.DistributedDataParallel
    found = (each for each in gc.get_objects() if isinstance(each, wrapper) and each.module is models[0])
    return next(found, None)


def _check_loader(loader: Any, processes: int) -> None:
    """Refuse loaders that repeat samples, or hand them out by collectives.

    Raises:
        UsageError: Says how to prepare it otherwise.
    """
    if processes < 2:
        return
    if type(loader).__name__ == "DataLoaderDispatcher":
        raise UsageError(
            "The loader is a DataLoaderDispatcher, which reads on one rank and sends batches to the others.",
            "Ranks read windows at their own pace, and would wait for each other for ever.",
            "Use DataLoaderConfiguration(dispatch_batches=False): each rank reads its own samples.",
        )
    batches = getattr(loader, "batch_sampler", None)
    if not getattr(batches, "even_batches", False) or getattr(batches, "drop_last", False):
        return
    inner = getattr(batches, "batch_sampler", None)
    samples, size = len(getattr(inner, "sampler", ())), getattr(inner, "batch_size", None) or 1
    even = size if getattr(batches, "split_batches", False) else size * processes
    if samples % even:
        raise UsageError(
            f"The loader repeats samples at the end of an epoch, as {samples} samples are no multiple of {even}.",
            "even_batches=True, Accelerate's default, gives all ranks as many, and the last window would count some "
            "twice.",
            "Use Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False)).",
        )
