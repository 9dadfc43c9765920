"""Train with a plan, window by window.

A window is one optimizer step, with the gradient of one whole batch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data import bad_batches
from ..data import split as cutting
from ..data.resplit import counted
from ..data.sample import float_type
from ..data.tree import as_tensors
from ..data.window import Window, widest_first
from ..data.windows import windows
from ..errors import BatchError, UsageError
from ..plan import Plan
from ..ranks.agreement import together
from ..ranks.wrapped import unwrapped
from ..simulation.solver import rank_share
from ..state.rng import put_rng
from ..units import check_seconds
from ..window import norms, step
from ..window.fingerprint import check_signature, is_collated
from ..window.scheduling import step_after_epoch
from ..window.widths import watch_widths
from ..workload import Batch, Workload, as_workload
from . import compatibility
from .attempt import drop_gradients
from .oom_recovery import OomRecovery
from .over_ranks import open_ranks
from .peak_monitor import PeakMonitor
from .sizing import Sizing
from .training_state import load_training_state, training_state
from .window_checks import WindowChecks

log = logging.getLogger("autoaccum")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        number: Optimizer steps of this Runner so far, this one included where it was taken.
        loss: Mean loss of the window, a detached scalar on the device.
        samples: Samples in the window, on all ranks.
        split: Samples in each micro-batch of this rank, as trained.
        grad_norm: Norm of the window's gradient before clipping; None where nothing is clipped.
        stepped: False where a GradScaler skipped the step.
        retries: How often the window ran out of memory here and was started over.
        ranks_retried: Ranks on which it did, this one included; 0 or 1 on one rank.
    """

    number: int
    loss: torch.Tensor
    samples: int
    split: tuple[int, ...]
    grad_norm: torch.Tensor | None
    stepped: bool
    retries: int
    ranks_retried: int = 0


class Runner:
    """Trains a workload with a plan, window by window.

    A window is one optimizer step, with the gradient of one whole batch.

    Args:
        workload: What is trained; the same that was planned. Or its model, with `Workload`'s other arguments as
            keywords, as for `fit_plan`.
        plan: The plan.
        rank: This process's rank among the plan's `world_size`; under a process group, that of the group.
        timeout_seconds: Under a process group: how long ranks wait for one that doesn't answer. Longer than any
            window takes, its retries included.
        **workload_kwargs: `Workload`'s other arguments, if a model is given.

    Raises:
        PlanMismatch: The plan was made for another model, loss, optimizer, precision, device or version.
        RanksFailed: A rank failed, or doesn't answer.

    Under a process group every rank makes a Runner, and what one raises is raised on all.

    Attributes:
        micro_batch: The largest micro-batch now; lower than the plan's after an out-of-memory.
        collates: Whether batches are made by the loader's collate function alone, and can't be cut.
        context: The model, the optimizer and the scheduler at work.
    """

    def __init__(
        self,
        workload: Workload | torch.nn.Module,
        plan: Plan,
        *,
        rank: int = 0,
        timeout_seconds: float = 600.0,
        **workload_kwargs: Any,
    ) -> None:
        if not isinstance(plan, Plan):
            raise UsageError(
                f"The plan is of type {type(plan).__name__}.", hint="Give fit_plan(...) or Plan.load(file)."
            )
        check_seconds("timeout_seconds", timeout_seconds, zero=False)
        workload, wrapper = unwrapped(as_workload(workload, None, workload_kwargs, caller="Runner"))
        self.ranks = open_ranks(workload, plan, wrapper, timeout_seconds)
        if self.ranks is None:
            self._make_ready(workload, plan, rank)
            return
        at_work = self.ranks
        together(at_work.control, lambda: self._make_ready(workload, plan.for_rank(at_work.rank), at_work.rank))
        self.samples = plan.target_batch  # all ranks' windows are read here, and this rank's part is taken
        at_work.attach(self.context, plan, self.least, workload.samples_per_group)

    def _make_ready(self, workload: Workload, plan: Plan, rank: int) -> None:
        self.workload, self.plan = workload, plan
        self.context = step.open_context(workload)
        self.context.keeps_workspaces = plan.device.keeps_workspaces
        self.context.host_memory_bytes = plan.memory.host_limit_bytes
        self.context.moved_bytes_per_sample = plan.memory.moved_bytes_per_sample
        self.context.moved_parts = plan.memory.moved_parts
        self.context.recomputes = plan.memory.recomputes
        compatibility.open_plan(self.context, workload, plan)
        self.context.widths = watch_widths(self.context.device, plan)
        self.samples = rank_share(plan.target_batch, plan.world_size, rank)
        least = max(plan.request.min_micro_batch, norms.least_micro_batch(self.context.norms, self.context.batchnorm))
        keys = {"shared": workload.shared, "per_sample": workload.per_sample}
        self.sizing = Sizing(plan, least, max_tokens=workload.max_tokens, **keys)
        self.collates = self.context.collates = is_collated(plan.provenance.signature)
        self.checks = WindowChecks(self.context, self.sizing.batch_keys)
        self.checks.rechecked = self.collates or workload.samples_per_group > 1  # that test cuts batches
        self.peak_monitor = PeakMonitor(self.context.device, plan)
        self._recovery = OomRecovery(self.context, plan, self.sizing)
        if not self.context.model.training:
            self.context.model.train()

    @property
    def number(self) -> int:
        """Optimizer steps so far; a skipped one doesn't count."""
        return self.context.steps_taken

    @property
    def least(self) -> int:
        """The fewest samples that a micro-batch may have."""
        return self.sizing.least

    @property
    def micro_batch(self) -> int:
        """The largest micro-batch now, in samples.

        It is lower than the plan's after an out-of-memory.
        """
        return self.sizing.limits.micro_batch

    @micro_batch.setter
    def micro_batch(self, samples: int) -> None:
        self.sizing.limits = replace(self.sizing.limits, micro_batch=samples)

    def step(self, batch: Batch) -> StepResult:
        """Train one window: a whole batch of any size.

        It is cut as the plan says.

        What the workload does in `between_steps` is the caller's business here.

        Args:
            batch: A pytree of tensors with the samples in dimension 0, on the host or on the device. Over ranks: this
                rank's own, in any number; all ranks' together are the window.

        Raises:
            BatchError: It can't be cut, or its form isn't the planned one.
            OutOfMemory: It doesn't fit even in micro-batches of one sample.
        """
        if self.collates:
            raise BatchError(
                "The plan's batches are made by a loader's collate function, and one batch can't be cut.",
                "Where it is cut along dimension 0, samples would fall apart.",
                "Train with Runner.epoch(loader), which collates each micro-batch.",
            )
        if self.ranks is None:
            return self._train(self._cut(batch))
        try:
            window = self.ranks.guarded(lambda: self._cut(batch))
        except BatchError as error:
            self.ranks.exchange.begin()
            self.ranks.exchange.leave_out(error)
            raise
        return self._train(window)

    def _cut(self, batch: Batch) -> Window:
        """Cut a batch into a window's micro-batches, and check them."""
        batch = as_tensors(batch, float_type(self.context.model))
        sizes = self.sizing.sizes(cutting.batch_size(batch, **self.sizing.batch_keys))
        return self._checked(Window(tuple(cutting.split(batch, sizes, **self.sizing.batch_keys)), sizes))

    def epoch(
        self,
        loader: Iterable[Batch],
        *,
        skip: int = 0,
        rng: dict[str, Any] | None = None,
        on_bad_batch: str = bad_batches.RAISE,
    ) -> Iterator[StepResult]:
        """Train once over a loader, yielding a result per optimizer step.

        A map-style DataLoader is read at the level of its indices: same sampler, same collate function, same workers,
        but one collate per micro-batch, so that each is padded to its own longest only. Other loaders are cut within
        their batches. No sample is lost; the last window has its real size. Where batch statistics need two samples and
        one is left at the end, it joins the window before.

        Args:
            loader: A DataLoader, or any iterable of batches; its own batch size doesn't matter. Over ranks: the same
                one on all; each rank trains its share of every window.
            skip: Windows to pass over without training: those before a checkpoint.
            rng: Random states (of `rng.take_rng`) to go on with after them.
            on_bad_batch: What becomes of a batch that can't be cut, or has another form than the planned one. "raise"
                raises the `BatchError`, with the samples' indices, before any of its window is trained; asked for the
                next result, the iterator goes on with the next window. "skip" warns, leaves out the micro-batch, and
                trains the rest of its window, with the gradient of that.
        """
        bad_batches.check_choice(on_bad_batch)
        return bad_batches.Surviving(self._epoch(loader, skip, rng, skips=on_bad_batch == bad_batches.SKIP))

    def _epoch(
        self, loader: Iterable[Batch], skip: int, rng: dict[str, Any] | None, *, skips: bool
    ) -> Iterator[StepResult | BatchError]:
        ranks = self.ranks
        found = windows(
            loader,
            self.samples,
            self.sizing.sizes,
            lengths=self.workload.lengths,
            split_of_lengths=self.sizing.sizes_of_lengths,
            least=self.least,
            floats=float_type(self.context.model),
            collates=self.collates,
            group=self.workload.samples_per_group,
            part=None if ranks is None else ranks.part(loader),
            **self.sizing.batch_keys,
        ).items
        found = found if ranks is None else ranks.loaded(found)
        while skip and (window := next(found, None)) is not None:  # counted are those that were trained before
            skip -= self._was_trained(window, skips=skips)
        if rng is not None:
            put_rng(rng)
        window = None
        for window in found:
            result = self._result(window, skips=skips)
            del window  # or its samples would still be held while the next window's are loaded
            if isinstance(result, StepResult):
                with contextlib.nullcontext() if ranks is None else ranks.failing_together():
                    step.run_between(self.context)
            if result is not None:
                yield result
        step_after_epoch(self.context)

    def _was_trained(self, window: Window | BatchError, *, skips: bool) -> bool:
        """Return whether a window that is passed over was trained before."""
        is_bad = False
        try:
            self._checked(window, leaves_out=skips)
        except BatchError:
            is_bad = True
        if self.ranks is None or skips:
            return not is_bad
        return not self.ranks.passed_over(is_bad=is_bad)

    def _result(self, window: Window | BatchError, *, skips: bool) -> StepResult | BatchError | None:
        """Train a window of an epoch; return None where it is skipped."""
        try:
            try:
                checked = self._checked(window, leaves_out=skips)
            except BatchError as error:
                if self.ranks is None:
                    raise
                checked = self.ranks.without(window, error, skips=skips)
            return self._train(checked)
        except BatchError as error:
            if not skips:
                return error
            log.warning("A window is left out: %s", error)
            return None

    def _checked(self, window: Window | BatchError, *, leaves_out: bool = False) -> Window:
        """Check that each micro-batch of a window has the planned form.

        None is trained before all were checked.

        Args:
            window: The window, or why there is none.
            leaves_out: Whether to go on without micro-batches of another form, where there are any others.

        Raises:
            BatchError: It has none, or one of another form, with its samples.
        """
        if isinstance(window, BatchError):
            raise window
        good: list[int] = []
        for index, piece in enumerate(window.pieces):
            try:
                check_signature(piece, self.plan.provenance.signature, window.sizes[index])
                good.append(index)
            except BatchError as error:
                known = bad_batches.of_samples(error, window.samples_of(index), window.origin)
                if not leaves_out or (index == len(window.pieces) - 1 and not good):
                    raise known from None
                log.warning("A micro-batch of %d samples is left out: %s", window.sizes[index], known)
        left = window if len(good) == len(window.pieces) else window.only(good)
        try:
            return counted(left, self.sizing.batch_keys)
        except BatchError as error:
            raise bad_batches.of_samples(error, left.samples, left.origin) from None

    def _train(self, window: Window) -> StepResult:
        if self.ranks is None:
            return self._train_here(window)
        self.ranks.exchange.begin(window.digest)
        with self.ranks.failing_together():
            return self._train_here(window)

    def _train_here(self, window: Window) -> StepResult:
        window = self.sizing.fitted(window)
        if self.context.widths is not None:
            window = widest_first(window)
        drop_gradients(self.context)  # of a backward outside the Runner, or of a window that an error broke off
        self.checks.before_window(window)
        self.peak_monitor.begin()
        trained = self._recovery.train(window)
        self.peak_monitor.end()
        self.checks.after_window(trained)
        result = trained.result
        return StepResult(
            number=self.number,
            loss=result.loss,
            samples=result.samples,
            split=trained.window.sizes,
            grad_norm=result.grad_norm,
            stepped=result.stepped,
            retries=trained.retries,
            ranks_retried=int(trained.retries > 0) if self.ranks is None else self.ranks.exchange.ranks_retried,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that training changes between windows, for a checkpoint.

        Raises:
            UsageError: It is called in the middle of a window, by its loss or a hook: it doesn't hold gradients.
        """
        if self._recovery.attempt is not None:
            raise UsageError(
                "A checkpoint in the middle of a window would lose the gradients that have added up.",
                "Training can only be resumed after a whole window.",
                "Take it between windows: in the loop over Runner.epoch(), or in between_steps=.",
            )
        return {**training_state(self.context), "limits": self.sizing.limits.as_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            UsageError: It belongs to another workload.
        """
        load_training_state(self.context, state)
        self.sizing.limits = self.sizing.limits.lowered_to(state["limits"])
