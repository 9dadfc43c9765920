"""Train a Trainer's window by its own `training_step`.

And again in smaller micro-batches where memory runs out.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..devices.oom import drop_frames, is_out_of_memory
from ..errors import OutOfMemory
from ..phases import FIRST, LATER, OnPhase
from ..plan import Plan
from ..ranks.group import apart
from ..runner import compatibility
from ..runner.oom_recovery import OomRecovery
from ..runner.peak_monitor import PeakMonitor
from ..window import fp32_accumulation
from ..window import norms as batchnorm
from ..window.context import TrainingContext, open_context
from ..window.step import WindowResult
from ..window.widths import watch_widths
from .hugging_face_loss import samples_of
from .hugging_face_plan import TrainerWorkload, alone, num_items_of
from .hugging_face_window import Batch, HostSizing, HostWindow

log = logging.getLogger("autoaccum")


class WindowTraining:
    """Train the windows of one Trainer.

    Args:
        trainer: The Trainer.
        described: Its training, as it was planned.
        plan: Its plan.
        least: The fewest samples of a micro-batch.

    Raises:
        PlanMismatch: The plan was made for another model, optimizer, precision, device or version.
    """

    def __init__(self, trainer: Any, described: TrainerWorkload, plan: Plan, least: int) -> None:
        self.trainer, self.plan, self.average = trainer, plan, described.average
        with apart():
            self.context = open_context(described.workload)
        compatibility.open_plan(self.context, described.workload, plan)
        self.context.widths = watch_widths(self.context.device, plan)
        if self.average.remark:
            log.warning("%s", self.average.remark)
        self.sizing = HostSizing(plan, least)
        self.recovery = OomRecovery(self.context, plan, self.sizing, self._train_pieces)
        self.peak_monitor = PeakMonitor(self.context.device, plan)
        self.ranks = trainer.accelerator.num_processes
        self._model: Any = None
        self._all_ranks_count: int | None = None

    def train(self, model: Any, host: HostWindow) -> torch.Tensor:
        """Train a window in as many attempts as it takes.

        Args:
            model: The Trainer's wrapped model.
            host: The window's batch.

        Returns:
            The window's loss, detached, on the device.
        """
        host.trims = host.trims and self.average.trims
        self._model = model
        self._all_ranks_count = self._count_of_all_ranks(host)
        window = host.cut(self.sizing.sizes(host.samples))
        self.peak_monitor.begin()
        with _buffers_broadcast(model):
            trained = self.recovery.train(window)
        self.peak_monitor.end()
        return trained.result.loss

    def _train_pieces(
        self,
        context: TrainingContext,
        pieces: Sequence[Batch],
        sizes: Sequence[int],
        *,
        on_phase: OnPhase | None = None,
    ) -> WindowResult:
        """Train the micro-batches; the Trainer steps its optimizer itself."""
        phase = on_phase or (lambda name: contextlib.nullcontext())
        if context.widths is not None:
            context.widths.begin_window(pieces, sizes)
        counts = [self._count(piece, size) for piece, size in zip(pieces, sizes, strict=True)]
        counted = [index for index, count in enumerate(counts) if count] or [len(pieces) - 1]
        total = self._all_ranks_count or sum(counts)
        norms = batchnorm.Window(context.norms, context.batchnorm, len(counted))
        wide = [] if self.ranks > 1 else context.model.parameters()
        half = fp32_accumulation.wide_parameters(wide, context.accumulate, len(counted))
        loss = torch.zeros((), device=context.device)
        with fp32_accumulation.wide_gradients(half), norms.entered():
            for number, index in enumerate(counted):
                with phase(FIRST if number == 0 else LATER), norms.forward():
                    items, weight = self._share(pieces[index], counts[index], total)
                    part = self._train_piece(pieces[index], items, weight, is_last=index == counted[-1])
                    loss = part if number == 0 else loss + part
            fp32_accumulation.narrow(half)
        return WindowResult(loss, sum(sizes), None, stepped=True)

    def _share(self, piece: Batch, count: int, total: int) -> tuple[Any, float]:
        """Return a micro-batch's `num_items_in_batch`, and its weight."""
        items = num_items_of(self.trainer, piece)
        if self.average.adds_up:
            return items, 1.0
        if items is None:
            return None, self.ranks_factor(items) * count / (total or 1)
        items = torch.as_tensor(items, device=self.context.device)
        if self.average.passes:
            return torch.full_like(items, total), 1.0
        return items, self.ranks_factor(items) * count / (total or 1)

    def _train_piece(self, piece: Batch, items: Any, weight: float, *, is_last: bool) -> torch.Tensor:
        trainer, several = self.trainer, self.ranks > 1
        synchronizes = contextlib.nullcontext() if is_last or not several else trainer.accelerator.no_sync(self._model)
        try:
            with synchronizes, alone(trainer.accelerator):
                return trainer.step_on_piece(self._model, dict(piece), items, weight)  # type: ignore[no-any-return]
        except (RuntimeError, MemoryError) as error:
            if not (several and is_last and trainer.in_backward and is_out_of_memory(error)):
                raise
            failure = drop_frames(error)
        raise OutOfMemory(
            f"Out of memory in the backward that adds up the gradients of {self.ranks} ranks ({failure}).",
            "Other ranks may have this rank's part of some gradients already, so that the window can't be repeated.",
            "Plan with less memory (budget=, headroom='10%'), and go on from the last checkpoint.",
        )

    def ranks_factor(self, items: Any) -> int:
        """Return what makes up for DDP's division by ranks."""
        trainer = self.trainer
        if self._all_ranks_count is None:
            return 1  # each rank has its own mean, as the Trainer's arguments say
        multiplied = items is not None and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None)
        return 1 if multiplied else self.ranks

    def _count(self, piece: Batch, size: int) -> int:
        counts_samples = self.average.count is None or self.average.count is samples_of
        return size if counts_samples else int(self.average.count(piece))  # type: ignore[misc]

    def _count_of_all_ranks(self, host: HostWindow) -> int | None:
        """Return the window's count over all ranks.

        None where each rank has its own mean.
        """
        if self.ranks == 1 or not self.trainer.args.average_tokens_across_devices:
            return None
        mine = torch.tensor(self._count(dict(host), host.samples), device=self.context.device)
        return int(self.trainer.accelerator.reduce(mine, "sum"))


@contextlib.contextmanager
def _buffers_broadcast(model: Any) -> Iterator[None]:
    """Broadcast buffers before a window, not in its first forward.

    DistributedDataParallel does it there, and would once more on a rank that starts the window over: a collective that
    no other rank takes part in.
    """
    if not getattr(model, "broadcast_buffers", False):
        yield
        return
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)
    model.broadcast_buffers = False
    try:
        yield
    finally:
        model.broadcast_buffers = True
