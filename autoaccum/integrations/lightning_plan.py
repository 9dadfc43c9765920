"""Describe a LightningModule's training as a workload, and plan it.

The loss is the module's own training_step, in the Trainer's precision; the optimizer is the one that
configure_optimizers made; the sample is collated by the loader from its longest samples; validation during training is
part of the plan.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..data.loaders import is_map_style
from ..errors import UsageError
from ..plan import Plan
from ..planning.fit import plan_workload
from ..planning.request import PlanRequest
from ..state.rng import put_rng, take_rng
from ..workload import Batch, Workload
from .hugging_face_items import longest_items

_LOGGING = ("log", "log_dict")  # scalars; outside of a training loop they are refused


class ModuleStep:
    """Compute a module's losses as its Trainer does.

    It keeps the Trainer, which holds everything, out of the search for what a loss holds.

    Args:
        trainer: The Trainer, set up for fitting.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def training_loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Compute the loss of a micro-batch."""
        trainer = self.trainer
        with trainer.precision_plugin.train_step_context():
            out = model.training_step(*self.arguments(model, batch).values())
        return loss_of(out)

    def arguments(self, model: Any, batch: Batch) -> OrderedDict[str, Any]:
        """Return what training_step is given, by name."""
        found: OrderedDict[str, Any] = self.trainer.fit_loop.epoch_loop._build_kwargs(
            OrderedDict(), self.trainer.strategy.batch_to_device(batch, dataloader_idx=0), 0
        )
        return found

    def validate(self, model: Any, batch: Batch) -> None:
        """Run one validation step."""
        trainer = self.trainer
        with trainer.precision_plugin.val_step_context(), torch.no_grad():
            moved = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            model.validation_step(moved, 0)


def loss_of(out: Any) -> torch.Tensor:
    """Return the loss in what a training_step returned.

    Raises:
        UsageError: There is none.
    """
    loss = out.get("loss") if isinstance(out, Mapping) else out
    if not isinstance(loss, torch.Tensor):
        raise UsageError(
            f"training_step returned {'None' if out is None else f'a {type(out).__name__} without a loss'}.",
            "A micro-batch that is left out would change the gradient of its window.",
            "Return the mean loss, or a dict with it as 'loss'; leave samples out in the dataset.",
        )
    return loss


def describe(trainer: Any, module: Any, loader: Any, options: Mapping[str, Any]) -> Workload:
    """Describe a Trainer's training.

    Args:
        trainer: The Trainer, set up for fitting.
        module: Its LightningModule.
        loader: The user's training loader.
        options: Further arguments of the workload: count, batchnorm, shared, per_sample.
    """
    step = ModuleStep(trainer)
    clip = trainer.gradient_clip_val if trainer.gradient_clip_algorithm in (None, "norm") else None
    return Workload(
        module,
        _sample(trainer, module, loader),
        loss=_training_loss(step),
        optimizer=trainer.optimizers[0],
        scaler=getattr(trainer.precision_plugin, "scaler", None),
        clip_grad_norm=clip or None,
        between_steps=_validation(trainer, module, step),
        name=type(module).__name__,
        **options,
    )


def make_plan(workload: Workload, request: PlanRequest) -> Plan:
    """Plan a module's training; nothing is logged meanwhile."""
    with quietly(workload.model):
        return plan_workload(workload, request)


@contextlib.contextmanager
def quietly(module: Any) -> Iterator[None]:
    """Leave out the module's logging, and put random states back."""
    rng = take_rng()
    for name in _LOGGING:
        vars(module)[name] = _logs_nothing
    try:
        yield
    finally:
        for name in _LOGGING:
            vars(module).pop(name, None)
        put_rng(rng)


def _logs_nothing(*_: Any, **__: Any) -> None:
    return None


def _training_loss(step: ModuleStep) -> Callable[[Any, Batch], torch.Tensor]:
    return lambda model, batch: step.training_loss(model, batch)


def _sample(trainer: Any, module: Any, loader: Any) -> Batch:
    """Collate the longest samples, and prepare them as the Trainer does."""
    rng = take_rng()
    batch = loader.collate_fn(longest_items(loader.dataset)) if is_map_style(loader) else next(iter(loader))
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    put_rng(rng)
    return batch


def _validation(trainer: Any, module: Any, step: ModuleStep) -> Callable[[Any], None] | None:
    """Return a validation of the longest batch, where training validates."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if not trainer.enable_validation or not source.is_defined():
        return None
    loader = source.dataloader()
    loaders = list(loader.values()) if isinstance(loader, Mapping) else loader
    found = [each for each in (loaders if isinstance(loaders, (list, tuple)) else [loaders]) if is_map_style(each)]
    rng, batches = take_rng(), []
    for each in found:
        items = longest_items(each.dataset)
        rows = min(each.batch_size or len(items), len(each.dataset))
        batch = each.collate_fn([items[row % len(items)] for row in range(rows)])
        batches.append(module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch)))
    put_rng(rng)

    def validate(model: Any) -> None:
        model.eval()
        for batch in batches:
            step.validate(model, batch)
        model.train()

    return validate if batches else None


def without_sample(workload: Workload) -> Workload:
    """Return the workload for training, which doesn't hold planning's sample."""
    return replace(workload, sample=None, between_steps=None)
