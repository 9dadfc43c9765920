"""Train a LightningModule's effective batch exactly, by one callback.

    from autoaccum.integrations.lightning import ExactAccumulation

    Trainer(callbacks=[ExactAccumulation(target_batch=256)]).fit(module, loader)

For `lightning.pytorch` and for `pytorch_lightning`, whichever the script imports.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import UsageError
from ..plan import Plan
from ..planning.request import PlanRequest
from ..torch_compat import BatchNorm
from ..window.lanes.limits import refuse_one_by_one
from ..window.norms import EXACT
from ..workload import Batch
from .lightning_loader import WindowSource, in_windows
from .lightning_loop import LightningWindows
from .lightning_plan import describe, make_plan, quietly

log = logging.getLogger("autoaccum")

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callbacks() -> tuple[Any, ...]:
    """Return the Callback classes of the packages in use."""
    loaded = [name for name in _PACKAGES if name in sys.modules]
    installed = [name for name in _PACKAGES if find_spec(name.partition(".")[0]) is not None]
    names = loaded or installed[:1]
    if not names:
        raise ImportError("Neither lightning nor pytorch_lightning is installed: pip install lightning")
    return tuple(import_module(name).Callback for name in names)


class ExactAccumulation(*_callbacks()):  # type: ignore[misc]
    """Train exactly the target batch in each step, in micro-batches that fit.

    The Trainer then trains as with a DataLoader of that batch size: steps, schedulers, validation, logging, checkpoints
    and callbacks count windows. The module's training_step gets micro-batches.

    Args:
        target_batch: Samples in an optimizer step. None for the loader's batch size times the Trainer's
            accumulate_grad_batches.
        count: `count(batch)`, what the loss of training_step averages over (labels that aren't ignored, say), read off
            a batch on the host. None for its samples.
        budget: Memory that the whole process may use, in bytes or like "2GiB"; None for all free memory.
        headroom: Bytes or percent of the budget to keep free.
        max_micro_batch: The largest micro-batch allowed.
        plan: A plan made before, or its file's name; None to plan in on_fit_start.
        check: Whether planning tests that the window's gradient is the large batch's.
        batchnorm: As for `Workload`; not "exact", which needs another order of computation.
        shared: As for `Workload`.
        per_sample: As for `Workload`.

    Attributes:
        plan: The plan, from on_fit_start on.
    """

    def __init__(
        self,
        target_batch: int | None = None,
        *,
        count: Callable[[Batch], float | torch.Tensor] | None = None,
        budget: str | int | None = None,
        headroom: str | int | None = None,
        max_micro_batch: int | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        check: bool = True,
        batchnorm: str | None = None,
        shared: Collection[str] = (),
        per_sample: Collection[str] = (),
    ) -> None:
        super().__init__()
        if batchnorm == EXACT:
            refuse_one_by_one()
        self.plan = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
        self._target = self.plan.target_batch if self.plan is not None else target_batch
        if self.plan is not None and target_batch not in (None, self._target):
            raise UsageError(f"target_batch is {target_batch}, and the plan's is {self._target}.", hint="Give one.")
        self._request = {"budget": budget, "headroom": headroom, "max_micro_batch": max_micro_batch, "check": check}
        self._keys = {"shared": shared, "per_sample": per_sample}
        self._options = {"count": count, "batchnorm": batchnorm, **self._keys}
        self._limits: dict[str, Any] | None = None
        self._installed = contextlib.ExitStack()
        self._windows: LightningWindows | None = None

    @property
    def micro_batch(self) -> int | None:
        """The largest micro-batch now; lower than the plan's after an out-of-memory."""
        return None if self._windows is None else self._windows.sizing.limits.micro_batch

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Regroup the training loader.

        Optimizers and schedulers are made after it, and may ask for its length.
        """
        if stage != "fit":
            return
        _refuse(trainer, pl_module)
        self._installed.close()
        fit_loop, steps = trainer.fit_loop, trainer.accumulate_grad_batches
        self._source = WindowSource(fit_loop._data_source, lambda loader: self._in_windows(loader, steps, pl_module))
        fit_loop._data_source, fit_loop._combined_loader = self._source, None
        trainer.accumulate_grad_batches = 1
        self._installed.callback(setattr, trainer, "accumulate_grad_batches", steps)

    def _in_windows(self, loader: Any, steps: int, module: Any) -> Any:
        size = getattr(loader, "batch_size", None)
        if self._target is None and not isinstance(size, int):
            raise UsageError(
                "target_batch was not given, and the training loader has no batch size.",
                hint="Give ExactAccumulation(target_batch=...).",
            )
        target: int = self._target if self._target is not None else steps * size  # type: ignore[operator]
        self._resolved_target = target
        norms = any(isinstance(each, BatchNorm) for each in module.modules())
        return in_windows(loader, target, 2 if norms and self._options["batchnorm"] != "frozen" else 1, self._keys)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Plan the training, and take the place of the automatic optimization."""
        with quietly(pl_module):
            if self._source.loader is None:
                self._source.dataloader()
            workload = describe(trainer, pl_module, self._source.loader, self._options)
        if self.plan is None:
            request = PlanRequest(target_batch=self._resolved_target, **self._request)  # type: ignore[arg-type]
            self.plan = make_plan(workload, request)
            log.info("%s", self.plan.explain())
            if not self.plan.exactness.startswith(("exact", "same distribution", "unchecked", "unknown")):
                log.warning("%s", "\n".join((self.plan.exactness, *self.plan.notes)))
        self._windows = LightningWindows(trainer, workload, self.plan)
        if self._limits is not None:
            self._windows.sizing.limits = self._windows.sizing.limits.lowered_to(self._limits)
        self._installed.enter_context(self._windows.installed())

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the Trainer's own loop back."""
        self._installed.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the Trainer's own loop back."""
        self._installed.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what an out-of-memory may have lowered, for a checkpoint."""
        return {} if self._windows is None else {"limits": self._windows.sizing.limits.as_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._limits = state_dict.get("limits")


def _refuse(trainer: Any, module: Any) -> None:
    """Refuse what isn't one automatic optimization in one process.

    Raises:
        UsageError: Names what it is, and what to do.
    """
    name, strategy = type(module).__name__, type(trainer.strategy).__name__
    if not module.automatic_optimization:
        raise UsageError(
            f"{name} uses manual optimization (automatic_optimization = False), with optimizers that it steps itself.",
            "Its training_step decides when gradients are made and used, which a callback can't cut into parts.",
            "Use automatic optimization with one optimizer; or cut the windows in a loop: autoaccum.windows.",
        )
    if trainer.world_size > 1 or strategy != "SingleDeviceStrategy":
        raise UsageError(
            f"The Trainer's strategy is {strategy} on {trainer.world_size} ranks.",
            "ExactAccumulation trains in one process on one device.",
            "Use Trainer(devices=1), or autoaccum.windows with DistributedDataParallel.",
        )
