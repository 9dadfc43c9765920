"""The Runner: trains with a plan, exactly, and survives running out of memory in the middle of a window."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from .. import process_memory
from ..data import bad_batches
from ..data import split as cutting
from ..data.resplit import counted, cut_one, recut, refuse_changed, versions
from ..data.tokens import split_by_tokens
from ..data.windows import Window, windows_and_errors
from ..devices import oom
from ..devices.cuda import workspaces
from ..errors import BatchError, OutOfMemory, UsageError
from ..exactness.recheck import counts_differ, recheck
from ..phases import FIRST, LATER, OPTIMIZER, PHASE_TITLES
from ..plan import Plan
from ..simulation.solver import CAPACITY_MARGIN, is_even, repeated_within, share_of, split_within
from ..state import snapshot
from ..state.rng import put_rng
from ..units import show_bytes
from ..window import norms, step
from ..window.fingerprint import check_fingerprint, check_signature, fingerprint
from ..window.trained_parameters import told_of_left_out
from ..workload import IGNORED, Batch, Workload, default_loss
from . import compatibility, peak_monitor
from .frozen_parameters import Still
from .state_changes import Changes

log = logging.getLogger("autoaccum")

SHRINK = 0.9  # after an out-of-memory, the largest micro-batch becomes at most this part of what it was


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        number: Optimizer steps of this Runner so far, this one included where it was taken.
        loss: Mean loss of the window, a detached scalar on the device.
        samples: Samples in the window.
        split: Samples in each micro-batch, as trained.
        grad_norm: Norm of the window's gradient before clipping; None where nothing is clipped.
        stepped: False where a GradScaler skipped the step.
        retries: How often the window ran out of memory and was started over.
    """

    number: int
    loss: torch.Tensor
    samples: int
    split: tuple[int, ...]
    grad_norm: torch.Tensor | None
    stepped: bool
    retries: int


class Runner:
    """Trains a workload with a plan: one window, one optimizer step, the gradient of one whole batch.

    Args:
        workload: What is trained; the same that was planned.
        plan: The plan.
        rank: This process's rank among the plan's `world_size`.

    Raises:
        PlanMismatch: The plan was made for another model, loss, optimizer, precision, device or version.

    Attributes:
        micro_batch: The largest micro-batch now; lower than the plan's after an out-of-memory.
        context: The model, the optimizer and the scheduler at work.
    """

    def __init__(self, workload: Workload, plan: Plan, *, rank: int = 0) -> None:
        self.workload, self.plan = workload, plan
        self.context = step.open_context(workload)
        self.context.keeps_workspaces = plan.keeps_workspaces
        check_fingerprint(fingerprint(self.context), plan.fingerprint)
        if plan.mmap_threshold_bytes is not None:
            process_memory.fix_mmap_threshold(plan.mmap_threshold_bytes)
        self.samples = share_of(plan.target_batch, plan.world_size, rank)
        self.micro_batch = plan.micro_batch
        self._names = {"shared": workload.shared, "per_sample": workload.per_sample}
        self._phase, self._begun = "", 0  # of a window: where it is, and its micro-batches so far
        self._max_tokens = workload.max_tokens if plan.max_tokens is None else plan.max_tokens
        self._more_rows = plan.most_rows  # of short samples, within these tokens
        self._ignored_told = self._rechecked = self._in_window = False
        self._drift = peak_monitor.PeakMonitor(self.context.device, plan)
        self._still, self._changes = Still(self.context), Changes(self.context)
        self._least = max(plan.min_micro_batch, norms.least_micro_batch(self.context.norms, workload.batchnorm))
        if not self.context.model.training:
            self.context.model.train()
        self._refuse_and_warn()

    @property
    def number(self) -> int:
        """Optimizer steps so far; a skipped one is none."""
        return self.context.steps_taken

    @property
    def least(self) -> int:
        """The fewest samples that a micro-batch may have."""
        return self._least

    def _refuse_and_warn(self) -> None:
        """What goes wrong, or otherwise than one may think, in windows of several micro-batches."""
        steps = self.plan.accumulation_steps
        compatibility.refuse(self.context, steps)
        warned = compatibility.warnings(self.context, steps)
        if steps > 1:
            warned.append(norms.told(self.context.norms, self.context.batchnorm))
        warned += [self._told_of_lengths(), told_of_left_out(self.context.model, self.context.optimizer)]
        if self.context.device.type == "cuda":
            from ..devices.cuda.budget import read_cuda_budget, shrunk_since

            now = read_cuda_budget(self.context.device)
            warned.append(shrunk_since(self.plan.budget, now, margin=CAPACITY_MARGIN) or "")
        for text in filter(None, warned):
            log.warning("%s", text)

    def _told_of_lengths(self) -> str:
        """Where data is longer than what was planned with: said now, and not in the middle of an epoch."""
        longest = max(self.workload.lengths or [0], default=0)
        shaped = [leaf for leaf in self.plan.signature if leaf.trailing_shape]
        tokens = [leaf for leaf in shaped if "int" in leaf.dtype] or shaped
        known = max((leaf.trailing_shape[0] for leaf in tokens), default=longest)
        if longest > known:  # planned for other data: fit_plan plans at the longest
            return (
                f"The longest sample has {longest} by lengths=, and the plan's own has at most {known}. "
                "Such a micro-batch could need more memory than was planned, and is refused. "
                "Plan again with a sample of the longest data there is."
            )
        return ""

    def step(self, batch: Batch) -> StepResult:
        """Trains one window: the whole batch given, whatever its size, cut as the plan says.

        What the workload does `between` windows is the caller's business here.

        Args:
            batch: A pytree of tensors with the samples in dimension 0, on the host or on the device.

        Raises:
            BatchError: It can't be cut, or its form isn't the planned one.
            OutOfMemory: It doesn't fit even in micro-batches of one sample.
        """
        sizes = self._split(cutting.batch_size(batch, **self._names))
        return self._train(self._checked(Window(tuple(cutting.split(batch, sizes, **self._names)), sizes)))

    def epoch(
        self,
        loader: Iterable[Batch],
        *,
        skip: int = 0,
        rng: dict[str, Any] | None = None,
        on_bad_batch: str = bad_batches.RAISE,
    ) -> Iterator[StepResult]:
        """Trains once over a loader, yielding a result per optimizer step.

        A map-style DataLoader is read at the level of its indices: same sampler, same collate function, same workers,
        but one collate per micro-batch, so that each is padded to its own longest only. Other loaders are cut within
        their batches. No sample is lost; the last window has its real size. Where batch statistics need two samples and
        one is left at the end, it joins the window before.

        Args:
            loader: A DataLoader, or any iterable of batches; its own batch size doesn't matter.
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
        found = windows_and_errors(
            loader, self.samples, self._split, lengths=self.workload.lengths, split_of_lengths=self._split_lengths,
            least=self._least, **self._names,
        )  # fmt: skip
        while skip and (window := next(found, None)) is not None:  # counted are those that were trained before
            with contextlib.suppress(BatchError):
                self._checked(window, leaves_out=skips)
                skip -= 1
        if rng is not None:
            put_rng(rng)
        window = None
        for window in found:
            result = self._result(window, skips=skips)
            del window  # or its samples would still be held while the next window's are loaded
            if isinstance(result, StepResult):
                step.run_between(self.context)
            if result is not None:
                yield result

    def _result(self, window: Window | BatchError, *, skips: bool) -> StepResult | BatchError | None:
        """What comes of a window of an epoch; None where it is passed over."""
        try:
            return self._train(self._checked(window, leaves_out=skips))
        except BatchError as error:
            if not skips:
                return error
            log.warning("A window is left out: %s", error)
            return None

    def _checked(self, window: Window | BatchError, *, leaves_out: bool = False) -> Window:
        """The window, when each of its micro-batches has the planned form: none is trained before all were seen.

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
                check_signature(piece, self.plan.signature)
                good.append(index)
            except BatchError as error:
                known = bad_batches.of_samples(error, window.samples_of(index), window.origin)
                if not leaves_out or (index == len(window.pieces) - 1 and not good):
                    raise known from None
                log.warning("A micro-batch of %d samples is left out: %s", window.sizes[index], known)
        left = window if len(good) == len(window.pieces) else window.only(good)
        try:
            return counted(left, self._names)
        except BatchError as error:
            raise bad_batches.of_samples(error, left.samples, left.origin) from None

    def _split(self, samples: int) -> tuple[int, ...]:
        planned = self.plan.split
        if self.micro_batch == self.plan.micro_batch and samples == sum(planned):
            return planned  # which was verified; another of the same largest micro-batch may not fit
        if self.micro_batch == self.plan.micro_batch and not is_even(planned):
            return repeated_within(samples, self.micro_batch, self._least)  # sizes just below it don't fit
        return split_within(samples, self.micro_batch, self._least)

    def _split_lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Within the budget of tokens too, where there is one."""
        if self._max_tokens is None:
            return self._split(len(lengths))
        return split_by_tokens(lengths, self._most_rows, self._max_tokens, self._least)

    @property
    def _most_rows(self) -> int:
        return max(self.micro_batch, self._more_rows or 0)

    def _train(self, window: Window) -> StepResult:
        if max(window.sizes) > self._most_rows and window.sizes != self._split(sum(window.sizes)):
            window = self._recut(window)  # loaded before an out-of-memory lowered it
        self._drop_gradients()  # somebody's own backward, or a window that an error broke off
        self._recheck(window)
        retries = 0
        self._drift.begin()
        while True:
            self._phase, self._begun, before = "", 0, None
            before_versions, still, failure = versions(window), self._still.versions(), ""
            try:
                before = self._take()
                with self._within_window():
                    result = step.train_window(self.context, window.pieces, window.sizes, on_phase=self._in_phase)
                break
            except (RuntimeError, MemoryError) as error:
                if not oom.is_out_of_memory(error):
                    raise
                failure = oom.drop_frames(error)
            except ValueError as error:
                if "Expected more than 1 value per channel" not in str(error):
                    raise
                raise self._too_few(before, window, str(error)) from None
            # Out of the handler only: inside it the error still holds the activations of the failed micro-batch.
            retries += 1
            refuse_changed(window, before_versions, failure)
            self._still.refuse_moved(still, before, failure)
            window = self._start_over(before, window, failure)
        self._drift.end()
        self._warn_of_ignored(window)
        if told := self._changes.look(before, len(window.pieces)):
            log.warning("%s", told)
        return StepResult(
            self.number, result.loss, result.samples, window.sizes, result.grad_norm, result.stepped, retries
        )

    def _take(self) -> snapshot.Snapshot:
        """What a window that is started over is put back to."""
        context = self.context
        return snapshot.take(model=context.model, scaler=context.scaler, held=context.held, storages=False)

    def _recheck(self, window: Window) -> None:
        """Tests the gradient once more on the first real window that the plan's sample may not have stood for."""
        if self._rechecked or self.context.encode is not None or not counts_differ(window.pieces, window.sizes):
            return
        self._rechecked = True
        told = recheck(self.context, window.pieces, window.sizes, self._names)
        if told is not None:
            log.warning("%s", told)

    def _too_few(self, before: snapshot.Snapshot | None, window: Window, failure: str) -> BatchError:
        """A micro-batch of one sample that nothing could be joined with: the window is as though it had not been."""
        self._drop_gradients()
        if before is not None:
            before.restore()
        error = BatchError(
            f"A window of micro-batches {window.sizes} can't be trained ({failure}).",
            "Batch statistics need more than one value for each channel.",
            "Leave such a batch out (drop_last=True, or on_bad_batch='skip'), or use batchnorm='frozen'.",
        )
        return bad_batches.of_samples(error, window.samples, window.origin)

    def _warn_of_ignored(self, window: Window) -> None:
        """A Hugging Face model's own loss is a mean over labels that aren't ignored; samples don't tell of these."""
        context = self.context  # the first window asks the model what its loss averages over
        unknown = context.loss is default_loss and context.count is None and context.asked_for_denominator
        if self._ignored_told or not unknown or len(window.pieces) < 2:
            return
        labels = [piece.get("labels") for piece in window.pieces if isinstance(piece, Mapping)]
        if any(isinstance(label, torch.Tensor) and bool((label == IGNORED).any()) for label in labels):
            self._ignored_told = True
            log.warning(
                "Some labels are ignored (-100), and the model's own .loss is no mean over the others that autoaccum "
                "knows. Micro-batches are weighted by their samples, so the gradient may not be the whole batch's. "
                "Give loss= as (sum, count), or count= with what the model averages over."
            )

    @contextlib.contextmanager
    def _within_window(self) -> Iterator[None]:
        self._in_window = True
        try:
            yield
        finally:
            self._in_window = False

    def _in_phase(self, name: str) -> AbstractContextManager[Any]:
        self._phase = name
        self._begun += name in (FIRST, LATER)
        return contextlib.nullcontext()

    def _drop_gradients(self) -> None:
        self.context.model.zero_grad(set_to_none=True)
        self.context.optimizer.zero_grad(set_to_none=True)

    def _start_over(self, before: snapshot.Snapshot | None, window: Window, failure: str) -> Window:
        """Drops the half-added gradients, puts back random states and buffers, lowers the micro-batch, cuts again."""
        where = PHASE_TITLES.get(self._phase, "pass that counts")
        self._refuse_to_repeat(where, failure)
        self._drop_gradients()
        self.context.copies.let_go()
        if before is not None:
            before.restore()
        oom.collect()
        process_memory.trim()
        workspaces.give_back(self.context.device)
        failed = window.sizes[self._begun - 1] if self._max_tokens is not None and self._begun else max(window.sizes)
        if failed <= self._least:
            raise OutOfMemory(
                f"Out of memory with a micro-batch of {failed} in the {where} ({failure}).",
                f"The plan reckoned with {show_bytes(self.plan.predicted_peak_bytes)} for a micro-batch of "
                f"{self.plan.micro_batch}; there is less now, or this batch needs more.",
                "Free memory, or plan again: autoaccum plan --target-batch " + str(self.plan.target_batch),
            )
        lowered = max(self._least, min(failed - 1, int(SHRINK * failed)))
        if self._max_tokens is not None and failed < self.micro_batch:  # few samples, but long ones
            self._max_tokens = max(1, int(SHRINK * self._max_tokens))
            smaller = cut_one(window, self._begun - 1, split_within(failed, lowered, self._least), self._names)
        elif self._more_rows is not None and self._begun and failed > self.micro_batch:  # many samples, but short ones
            self._more_rows = lowered
            smaller = cut_one(window, self._begun - 1, split_within(failed, lowered, self._least), self._names)
        else:
            self.micro_batch, self._more_rows = min(self.micro_batch, lowered), None
            smaller = self._recut(window)
        if smaller.sizes == window.sizes:
            raise OutOfMemory(
                f"Out of memory in the {where} with a micro-batch of {failed}, which can't be cut ({failure}).",
                "Its collate function packed it, or batch statistics need two samples, so this window can't be "
                "repeated in smaller pieces; nothing was trained by it. "
                f"The next windows are loaded in micro-batches of at most {self.micro_batch}.",
                "Plan again with less memory (--memory), and go on from the last checkpoint.",
            )
        log.warning(
            "Out of memory in the %s of a window with micro-batches of %d (%s). The window starts over with at most "
            "%d, and so do the next ones; its gradient is still that of all %d samples.",
            where, failed, failure, lowered, sum(window.sizes),
        )  # fmt: skip
        return smaller

    def _refuse_to_repeat(self, where: str, failure: str) -> None:
        """Raises where parameters may be updated in part."""
        if compatibility.steps_in_backward(self.context.model):
            raise OutOfMemory(
                f"Out of memory in the {where}, and a hook steps the optimizer in backward ({failure}).",
                "Some parameters may be updated already, so the window can't be repeated.",
                "Load the last checkpoint and plan again with less memory (--memory).",
            )
        if self._phase == OPTIMIZER:
            raise OutOfMemory(
                f"The optimizer step ran out of memory ({failure}).",
                "Parameters may be updated in part, so the window can't be repeated; its size doesn't matter here.",
                "Plan again with less memory (--memory), or load the last checkpoint and use a leaner optimizer.",
            )

    def _recut(self, window: Window) -> Window:
        return recut(window, self._split, self.micro_batch, self._names, joins=self._least > 1)

    def state_dict(self) -> dict[str, Any]:
        """All that training changes, between windows: for a checkpoint.

        Raises:
            UsageError: It is called in the middle of a window, by its loss or a hook: it doesn't hold gradients.
        """
        if self._in_window:
            raise UsageError(
                "A checkpoint in the middle of a window would lose the gradients that have added up.",
                "Only whole windows can be gone on from.",
                "Take it between windows: in the loop over Runner.epoch(), or in between=.",
            )
        context = self.context
        return {
            "model": context.model.state_dict(),
            "optimizer": context.optimizer.state_dict(),
            "scheduler": context.scheduler.state_dict() if context.scheduler is not None else None,
            "scaler": context.scaler.state_dict() if context.scaler is not None else None,
            "number": self.number,
            "micro_batch": self.micro_batch,
            "limits": {"max_tokens": self._max_tokens, "more_rows": self._more_rows},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            UsageError: It belongs to another workload.
        """
        context = self.context
        for part in ("scheduler", "scaler"):
            if (state[part] is None) != (getattr(context, part) is None):
                has, lacks = ("workload", "checkpoint") if state[part] is None else ("checkpoint", "workload")
                raise UsageError(
                    f"The {has} has a {part}, and the {lacks} has none.",
                    "Training would go on in another way than it was begun.",
                    f"Resume with the workload that wrote the checkpoint, or give this one {part}= as that had it.",
                )
        context.model.load_state_dict(state["model"])
        context.optimizer.load_state_dict(state["optimizer"])
        for part in ("scheduler", "scaler"):
            if state[part] is not None:
                getattr(context, part).load_state_dict(state[part])
        self.context.steps_taken = state["number"]
        # A new plan may be for less memory than what an out-of-memory left of the old one's limits.
        self.micro_batch = min(state["micro_batch"], self.plan.micro_batch)
        limits = state.get("limits")  # older checkpoints have none
        if limits is not None:
            self._max_tokens = _smaller(self._max_tokens, limits["max_tokens"])
            kept = limits["more_rows"]
            self._more_rows = None if kept is None else _smaller(self._more_rows, kept)


def _smaller(planned: int | None, kept: int | None) -> int | None:
    """The smaller of two limits; the planned one where none was kept."""
    return planned if planned is None or kept is None else min(planned, kept)
