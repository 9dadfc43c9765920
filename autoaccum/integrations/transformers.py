"""Train with Hugging Face's Trainer at an exact effective batch.

    from autoaccum.integrations.transformers import ExactTrainer

    trainer = ExactTrainer(model=model, args=args, train_dataset=dataset, target_batch=256)
    trainer.train()

`ExactTrainerMixin` does the same for other trainers: `class Mine(ExactTrainerMixin, SFTTrainer): ...`.

An optimizer step is one window: the loader gives its whole batch, which stays on the host, and `training_step` trains
it in micro-batches as the plan says. To the Trainer each step is one batch without accumulation, so that logging,
clipping, saving, resuming, callbacks and schedulers are its own.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from ..errors import DoesNotFit
from ..plan import Plan
from ..planning.request import PlanRequest
from ..window.lanes.limits import refuse_one_by_one
from ..window.norms import EXACT, least_micro_batch
from .hugging_face_checks import (
    cannot_be_cut,
    check_loader_of,
    check_plan_of,
    no_window,
    refuse_unsupported,
    target_of,
    warn_if_inexact,
    whole_window_only,
)
from .hugging_face_memory import in_smaller_batches, optimizer_step_named
from .hugging_face_plan import describe, make_plan, quietly
from .hugging_face_training import WindowTraining
from .hugging_face_window import HostWindow, WindowCollator
from .replacement import replaced

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["ExactTrainer", "ExactTrainerMixin"]


class ExactTrainerMixin(_Base):
    """Let a Trainer train by a plan.

    Write it before the Trainer's class.

    Args:
        *args: The Trainer's own.
        target_batch: Samples in an optimizer step, over all ranks; None for what the TrainingArguments multiply to
            (per_device_train_batch_size x gradient_accumulation_steps x world size), or the plan's.
        plan: A plan, or its file, in place of planning; one that this training made (`trainer.plan.save(path)`).
        budget: Memory that the process may use, in bytes or like "2GiB"; None for all free memory.
        headroom: Bytes or percent of the budget to keep free.
        max_micro_batch: The largest micro-batch allowed, in samples.
        min_micro_batch: The smallest allowed.
        verify: Whether planning runs the plan's window.
        check: Whether planning tests that the window's gradient is the large batch's.
        malloc: On the CPU, "cached", "fixed" or "default", as for `fit_plan`.
        batchnorm: As for `Workload`; not "exact", which needs another order of computation.
        **kwargs: The Trainer's own.

    Attributes:
        plan: The plan, once it was made: when training begins.

    Raises:
        UsageError: The Trainer or its arguments can't be trained so; by name.
    """

    def __init__(
        self,
        *args: Any,
        target_batch: int | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        budget: str | int | None = None,
        headroom: str | int | None = None,
        max_micro_batch: int | None = None,
        min_micro_batch: int | None = None,
        verify: bool = True,
        check: bool = True,
        malloc: str = "cached",
        batchnorm: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.in_backward, self._batchnorm = False, batchnorm
        if batchnorm == EXACT:
            refuse_one_by_one()
        super().__init__(*args, **kwargs)
        refuse_unsupported(self)
        self.plan = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
        self._given_plan = self.plan
        target = target_of(self.args, target_batch, self.plan)
        self._request = PlanRequest(
            target, budget, headroom, max_micro_batch, min_micro_batch, self.args.process_index, self.args.world_size,
            verify=verify, check=check, malloc=malloc,
        )  # fmt: skip
        self.args = copy.copy(self.args)  # the person's own stay as they are
        self.args.per_device_train_batch_size = target // self.args.world_size
        self.args.gradient_accumulation_steps = 1
        self._train_batch_size = self.args.train_batch_size
        self._loader: Any = None
        self._windows: WindowTraining | None = None
        self._planned_for: tuple[Any, Any] = None, None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._plan_once()
        return prepared

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; name an out-of-memory of the optimizer."""
        own = self.get_train_dataloader  # a subclass's, too

        def of_windows() -> Any:
            with _left_on_host(self.accelerator):
                loader = own()
            self._loader = getattr(loader, "base_dataloader", loader)  # accelerate's loaders wrap torch's
            check_loader_of(self, self._loader)
            if not isinstance(self._loader.collate_fn, WindowCollator):
                self._loader.collate_fn = WindowCollator(self._loader.collate_fn)
            return loader

        with optimizer_step_named(self), replaced(self, "get_train_dataloader", of_windows):
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does, in smaller batches after an out-of-memory."""
        return in_smaller_batches(self, lambda: super(ExactTrainerMixin, self).evaluate(*args, **kwargs))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as the Trainer does, in smaller batches after an out-of-memory."""
        return in_smaller_batches(self, lambda: super(ExactTrainerMixin, self).predict(*args, **kwargs))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward of a window, in the plan's micro-batches."""
        if not isinstance(inputs, HostWindow):
            raise no_window(self)
        return self._plan_once().train(model, inputs)

    def step_on_piece(self, model: Any, piece: dict[str, Any], items: Any, weight: float) -> torch.Tensor:
        """Run the Trainer's own step on a micro-batch, its loss weighted."""
        own = self.compute_loss  # a subclass's, or one that was assigned to this Trainer

        def weighted(*args: Any, **kwargs: Any) -> Any:
            found = own(*args, **kwargs)
            self.in_backward = True
            if isinstance(found, tuple):
                return found[0] * weight, *found[1:]
            return found * weight

        self.in_backward = False
        with replaced(self, "compute_loss", weighted):
            loss: torch.Tensor = super().training_step(model, piece, items)
        return loss

    def count_items(self, batch: dict[str, Any], device: torch.device) -> Any:
        """Return what the Trainer counts in a batch; None for nothing."""
        return super().get_batch_samples(iter([batch]), 1, device)[1]

    def _plan_once(self) -> WindowTraining:
        """Return how windows are trained; plan where that isn't known yet."""
        made_for = self.model, getattr(self.optimizer, "optimizer", self.optimizer)
        if self._windows is not None and all(a is b for a, b in zip(made_for, self._planned_for, strict=True)):
            return self._windows
        with quietly(self):
            described = describe(self, self._loader, self._batchnorm)
        request = self._request
        if not described.average.can_be_cut:
            request = whole_window_only(self, request, described.average)
        plan = self._given_plan
        if plan is None:
            try:
                plan = make_plan(self, described, request, check=request.check)
                warn_if_inexact(plan)
            except DoesNotFit as error:
                if described.average.can_be_cut:
                    raise
                raise cannot_be_cut(self, described.average) from error
        check_plan_of(self, plan, request, described.average)
        self.plan = plan
        self._windows, self._planned_for = self._training_by(plan, described), made_for
        return self._windows

    def _training_by(self, plan: Plan, described: Any) -> WindowTraining:
        least = max(plan.request.min_micro_batch, self._request.min_micro_batch or 1)
        training = WindowTraining(self, described, plan, least)
        context = training.context
        training.sizing.least = max(least, least_micro_batch(context.norms, context.batchnorm))
        return training


class ExactTrainer(ExactTrainerMixin, Trainer):
    """Train as transformers.Trainer does, its effective batch exact.

    Args, attributes and errors are those of `ExactTrainerMixin` and of the Trainer.
    """


@contextlib.contextmanager
def _left_on_host(accelerator: Any) -> Iterator[None]:
    """Make loaders that leave their batches on the host."""
    before = accelerator.device_placement
    accelerator.device_placement = False
    try:
        yield
    finally:
        accelerator.device_placement = before
