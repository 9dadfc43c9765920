"""Train a Lightning Trainer's batch as one window of micro-batches.

This takes the place of the Trainer's automatic optimization. All forwards and backwards run before the optimizer's
step, so that an out-of-memory in any of them can be survived; the step gets a closure that has been run already.
Forward, backward, zeroing, clipping and the step are the Trainer's own calls with their hooks.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch

from ..data import split as cutting
from ..data.window import Window
from ..phases import FIRST, LATER, OnPhase
from ..plan import Plan
from ..runner import compatibility
from ..runner.oom_recovery import OomRecovery
from ..runner.peak_monitor import PeakMonitor
from ..runner.sizing import Sizing
from ..window import fp32_accumulation
from ..window import norms as batchnorm
from ..window.context import TrainingContext, open_context
from ..window.step import WindowResult
from ..window.widths import watch_widths
from ..workload import Batch, Workload
from .lightning_plan import loss_of
from .replacement import replaced

_AFTER_BACKWARD = "on_after_backward"
_TRANSFER_HOOKS = ("transfer_batch_to_device", "on_after_batch_transfer")


class LightningWindows:
    """Train the windows of one Trainer.

    Args:
        trainer: The Trainer, set up for fitting.
        workload: Its training, as it was planned.
        plan: The plan.

    Raises:
        PlanMismatch: The plan was made for another model, optimizer, precision, device or version.

    Attributes:
        sizing: The sizes of micro-batches.
        skipped: Whether the last window counted nothing, and no step was taken.
    """

    def __init__(self, trainer: Any, workload: Workload, plan: Plan) -> None:
        self.trainer, self.plan, self.skipped = trainer, plan, False
        self.context = open_context(workload)
        compatibility.open_plan(self.context, workload, plan)
        self.context.widths = watch_widths(self.context.device, plan)
        least = max(plan.request.min_micro_batch, batchnorm.least_micro_batch(self.context.norms, workload.batchnorm))
        self.sizing = Sizing(plan, least, shared=workload.shared, per_sample=workload.per_sample)
        self._recovery = OomRecovery(self.context, plan, self.sizing, self._train_pieces)
        self._monitor = PeakMonitor(self.context.device, plan)
        self._on_host = True

    def run(self, loop: Any, optimizer: Any, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        """Train one window, and step.

        Args:
            loop: The Trainer's automatic optimization.
            optimizer: The optimizer.
            batch_idx: The window's number in the epoch.
            kwargs: What training_step is given, the whole window as its batch.

        Returns:
            What callbacks get as the outputs of the batch: its loss, and what else the last micro-batch returned.
        """
        self._call = loop, optimizer, kwargs
        batch = kwargs["batch"]
        sizes = self.sizing.sizes(cutting.batch_size(batch, **self.sizing.batch_keys))
        window = Window(tuple(cutting.split(batch, sizes, **self.sizing.batch_keys)), sizes)
        zero_gradients = loop._make_zero_grad_fn(batch_idx, optimizer)
        if zero_gradients is not None:
            zero_gradients()
        self._extra: dict[str, Any] = {}
        self._monitor.begin()
        result = self._recovery.train(window).result
        self._monitor.end()
        self.skipped = not result.stepped
        if self.skipped:
            return {}
        loop._optimizer_step(batch_idx, lambda: result.loss)
        return {"loss": result.loss, **self._extra}

    def _train_pieces(
        self,
        context: TrainingContext,
        pieces: Sequence[Batch],
        sizes: Sequence[int],
        *,
        on_phase: OnPhase | None = None,
    ) -> WindowResult:
        """Train the micro-batches that count; the Trainer steps its optimizer itself."""
        phase = on_phase or (lambda name: contextlib.nullcontext())
        if context.widths is not None:
            context.widths.begin_window(pieces, sizes)
        counts = sizes if context.count is None else [float(context.count(piece)) for piece in pieces]
        total = sum(counts)
        counted = [index for index, count in enumerate(counts) if count]
        norms = batchnorm.Window(context.norms, context.batchnorm, len(counted))
        half = fp32_accumulation.wide_parameters(context.model.parameters(), context.accumulate, len(counted))
        loss = torch.zeros((), device=context.device)
        with fp32_accumulation.wide_gradients(half), norms.entered():
            for number, index in enumerate(counted):
                with phase(FIRST if number == 0 else LATER), self._backward_goes_on(is_last=index == counted[-1]):
                    part = self._train_piece(pieces[index], counts[index] / total, norms)
                    loss = part if number == 0 else loss + part
            fp32_accumulation.narrow(half)
        return WindowResult(loss, sum(sizes), None, stepped=bool(total))

    def _train_piece(self, piece: Batch, weight: float, norms: batchnorm.Window) -> torch.Tensor:
        loop, optimizer, kwargs = self._call
        results = self.trainer._results
        results.batch, results.batch_size = piece, None  # by which the module's log weighs this micro-batch
        with self._bringing():
            moved = self.trainer.strategy.batch_to_device(piece, dataloader_idx=0)
        with norms.forward():
            result = loop._training_step(OrderedDict({**kwargs, "batch": moved}))
        loss = loss_of(result.closure_loss) * weight
        self._extra = result.extra
        backward = loop._make_backward_fn(optimizer)
        if backward is not None:
            backward(loss)
        return loss.detach()

    @contextlib.contextmanager
    def _backward_goes_on(self, *, is_last: bool) -> Iterator[None]:
        """Leave out on_after_backward until the whole gradient is there.

        A hook that scales, clips or notes gradients would do so with parts.
        """
        holders = [] if is_last else [self.trainer.lightning_module, *self.trainer.callbacks]
        with contextlib.ExitStack() as stack:
            for holder in holders:
                stack.enter_context(replaced(holder, _AFTER_BACKWARD, _nothing))
            yield

    @contextlib.contextmanager
    def _bringing(self) -> Iterator[None]:
        """Let the module's transfer hooks act, on one micro-batch."""
        self._on_host = False
        try:
            yield
        finally:
            self._on_host = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take the place of the Trainer's automatic optimization."""
        epoch_loop = self.trainer.fit_loop.epoch_loop
        before = epoch_loop.automatic_optimization
        accumulates = epoch_loop._should_accumulate
        with self._windows_stay_on_the_host():
            epoch_loop.automatic_optimization = _loop_of(self, before)
            # Where nothing was counted there is no step, so that its scheduler isn't stepped and nothing is logged.
            epoch_loop._should_accumulate = lambda: self.skipped or accumulates()
            try:
                yield
            finally:
                epoch_loop.automatic_optimization.optim_progress, progress = (
                    before.optim_progress,
                    epoch_loop.automatic_optimization.optim_progress,
                )
                before.optim_progress = progress
                epoch_loop.automatic_optimization = before
                del epoch_loop._should_accumulate

    @contextlib.contextmanager
    def _windows_stay_on_the_host(self) -> Iterator[None]:
        """Keep the Trainer from moving whole windows to the device."""
        selector, shadowed = self.trainer._data_connector._datahook_selector, []
        for name in _TRANSFER_HOOKS:
            holder = selector.get_instance(name)
            vars(holder)[name] = self._on_micro_batches_only(getattr(holder, name))
            shadowed.append((holder, name))
        try:
            yield
        finally:
            for holder, name in shadowed:
                del vars(holder)[name]

    def _on_micro_batches_only(self, hook: Any) -> Any:
        @functools.wraps(hook)
        def passing(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return batch if self.trainer.training and self._on_host else hook(batch, *args, **kwargs)

        return passing


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _loop_of(windows: LightningWindows, before: Any) -> Any:
    """Return a loop that trains windows in place of the Trainer's own."""
    parent: Any = import_module(type(before).__module__)._AutomaticOptimization

    class ExactOptimization(parent):  # type: ignore[misc]
        """Automatic optimization of windows."""

        def run(self, optimizer: Any, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
            """Train one window."""
            return windows.run(self, optimizer, batch_idx, kwargs)

    made = ExactOptimization(windows.trainer)
    made.optim_progress, made._skip_backward = before.optim_progress, before._skip_backward
    return made
