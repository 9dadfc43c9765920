"""The Runner: trains with a plan, exactly, and survives running out of memory in the middle of a window."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from . import batchnorm, drift, oom, process_memory, refuse, restore, step, tree
from . import split as cutting
from .errors import BatchError, OutOfMemory, UsageError
from .identity import check_fingerprint, check_signature, fingerprint
from .plan import Plan
from .recording import OPTIMIZER, PHASE_TITLES
from .rng import put_rng
from .solve import share_of, split_within
from .units import show_bytes
from .windows import Window, windows
from .workload import IGNORED, Batch, Workload, default_loss

log = logging.getLogger("autoaccum")

SHRINK = 0.9  # after an out-of-memory, the largest micro-batch becomes at most this part of what it was


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        number: Optimizer steps of this Runner so far, this one included.
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
        parts: The model, the optimizer and the scheduler at work.
    """

    def __init__(self, workload: Workload, plan: Plan, *, rank: int = 0) -> None:
        self.workload, self.plan = workload, plan
        self.parts = step.open_parts(workload)
        check_fingerprint(fingerprint(self.parts), plan.fingerprint)
        if plan.mmap_threshold_bytes is not None:
            process_memory.fix_mmap_threshold(plan.mmap_threshold_bytes)
        self.samples = share_of(plan.target_batch, plan.world_size, rank)
        self.micro_batch = plan.micro_batch
        self.number = 0
        self._names = {"shared": workload.shared, "per_sample": workload.per_sample}
        self._phase = ""
        self._ignored_told = self._changes_looked_at = False
        self._drift = drift.Watch(self.parts.device, plan)
        self._least = max(plan.smallest_micro_batch, batchnorm.least_micro_batch(self.parts.norms, workload.batchnorm))
        if not self.parts.model.training:
            self.parts.model.train()
        self._refuse_and_warn()

    def _refuse_and_warn(self) -> None:
        """What goes wrong, or otherwise than one may think, in windows of several micro-batches."""
        steps = self.plan.accumulation_steps
        refuse.refuse(self.parts, steps)
        warned = refuse.warnings(self.parts, steps)
        if steps > 1:
            warned.append(batchnorm.told(self.parts.norms, self.parts.batchnorm))
        for text in filter(None, warned):
            log.warning("%s", text)

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
        return self._train(Window(tuple(cutting.split(batch, sizes, **self._names)), sizes))

    def epoch(
        self, loader: Iterable[Batch], *, skip: int = 0, rng: dict[str, Any] | None = None
    ) -> Iterator[StepResult]:
        """Trains once over a loader, yielding a result per optimizer step.

        A map-style DataLoader is read at the level of its indices: same sampler, same collate function, same workers,
        but one collate per micro-batch, so that each is padded to its own longest only. Other loaders are cut within
        their batches. No sample is lost; the last window has its real size.

        Args:
            loader: A DataLoader, or any iterable of batches; its own batch size doesn't matter.
            skip: Windows to pass over without training: those before a checkpoint.
            rng: Random states (of `rng.take_rng`) to go on with after them.
        """
        found = windows(loader, self.samples, self._split, **self._names)
        for _ in range(skip):
            next(found, None)
        if rng is not None:
            put_rng(rng)
        for window in found:
            result = self._train(window)
            del window  # or its samples would still be held while the next window's are loaded
            step.run_between(self.parts)
            yield result

    def _split(self, samples: int) -> tuple[int, ...]:
        if self.micro_batch == self.plan.micro_batch and samples == sum(self.plan.split):
            return self.plan.split  # which was verified; another of the same largest micro-batch may not fit
        return split_within(samples, self.micro_batch, self._least)

    def _train(self, window: Window) -> StepResult:
        for piece in window.pieces:
            check_signature(piece, self.plan.signature)
        window = self._counted(window)
        if max(window.sizes) > self.micro_batch:  # loaded before an out-of-memory lowered it
            window = self._recut(window)
        self._drop_gradients()  # somebody's own backward, or a window that an error broke off
        retries = 0
        self._drift.begin()
        while True:
            self._phase, before = "", None
            versions, failure = _versions(window), ""
            try:
                before = restore.take(model=self.parts.model, scaler=self.parts.scaler, storages=False)
                result = step.train_window(self.parts, window.pieces, window.sizes, on_phase=self._in_phase)
                break
            except (RuntimeError, MemoryError) as error:
                if not oom.is_out_of_memory(error):
                    raise
                failure = oom.drop_frames(error)
            # Out of the handler only: inside it the error still holds the activations of the failed micro-batch.
            retries += 1
            _refuse_changed(window, versions, failure)
            window = self._start_over(before, window, failure)
        self.number += 1
        self._drift.end()
        self._warn_of_ignored(window)
        self._look_at_changes(before, window)
        return StepResult(
            self.number, result.loss, result.samples, window.sizes, result.grad_norm, result.stepped, retries
        )

    def _counted(self, window: Window) -> Window:
        """The window with the samples that are really there: a collate function may have left some out, or all."""
        counted = [(piece, self._rows(piece, size)) for piece, size in zip(window.pieces, window.sizes, strict=True)]
        there = [(piece, size) for piece, size in counted if size]
        if not there:
            raise BatchError(
                f"A window of {sum(window.sizes)} samples has no sample left after its collate function.",
                hint="Leave out samples in the sampler or in the dataset, where the window is filled up by others.",
            )
        return Window(tuple(piece for piece, _ in there), tuple(size for _, size in there))

    def _rows(self, piece: Batch, planned: int) -> int:
        try:
            return cutting.batch_size(piece, **self._names)
        except BatchError:
            tensors = [leaf for _, leaf in tree.leaves(piece) if isinstance(leaf, torch.Tensor) and leaf.dim()]
            if tensors and not any(map(len, tensors)):
                return 0  # emptied: as a mean it would be 0 / 0
            return planned  # packed by its collate function: it can be trained, only not counted or cut

    def _warn_of_ignored(self, window: Window) -> None:
        """A Hugging Face model's own loss is a mean over labels that aren't ignored; samples don't tell of these."""
        parts = self.parts  # the first window asks the model what its loss averages over
        unknown = parts.loss is default_loss and parts.count is None and parts.asked_for_denominator
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

    def _in_phase(self, name: str) -> AbstractContextManager[Any]:
        self._phase = name
        return contextlib.nullcontext()

    def _drop_gradients(self) -> None:
        self.parts.model.zero_grad(set_to_none=True)
        self.parts.optimizer.zero_grad(set_to_none=True)

    def _look_at_changes(self, before: restore.Snapshot, window: Window) -> None:
        """Says once what the first window of several micro-batches left changed in modules that keep count."""
        if self._changes_looked_at or len(window.pieces) < 2:
            return
        self._changes_looked_at = True
        told = refuse.told_of_changes(before.differences(), self.parts, len(window.pieces))
        if told:
            log.warning("%s", told)

    def _start_over(self, before: restore.Snapshot | None, window: Window, failure: str) -> Window:
        """Drops the half-added gradients, puts back random states and buffers, lowers the micro-batch, cuts again."""
        largest, least = max(window.sizes), self._least
        where = PHASE_TITLES.get(self._phase, "pass that counts")
        if self._phase == OPTIMIZER:
            raise OutOfMemory(
                f"The optimizer step ran out of memory ({failure}).",
                "Parameters may be updated in part, so the window can't be repeated; its size doesn't matter here.",
                "Plan again with less memory (--memory), or load the last checkpoint and use a leaner optimizer.",
            )
        self._drop_gradients()
        if before is not None:
            before.restore()
        oom.collect()
        process_memory.trim()
        if largest <= least:
            raise OutOfMemory(
                f"Out of memory with a micro-batch of {largest} in the {where} ({failure}).",
                f"The plan reckoned with {show_bytes(self.plan.predicted_peak_bytes)} for a micro-batch of "
                f"{self.plan.micro_batch}; there is less now, or this batch needs more.",
                "Free memory, or plan again: autoaccum plan --target-batch " + str(self.plan.target_batch),
            )
        lowered = max(least, min(largest - 1, int(SHRINK * largest)))
        self.micro_batch = min(self.micro_batch, lowered)
        smaller = self._recut(window)
        if max(smaller.sizes) == largest:
            raise OutOfMemory(
                f"Out of memory in the {where} with a micro-batch of {largest}, which can't be cut ({failure}).",
                "Its collate function packed it, or batch statistics need two samples, so this window can't be "
                "repeated in smaller pieces; nothing was trained by it. "
                f"The next windows are loaded in micro-batches of at most {self.micro_batch}.",
                "Plan again with less memory (--memory), and go on from the last checkpoint.",
            )
        log.warning(
            "Out of memory in the %s of a window with micro-batches of %d (%s). The window starts over with at most "
            "%d, and so do the next ones; its gradient is still that of all %d samples.",
            where, largest, failure, lowered, sum(window.sizes),
        )  # fmt: skip
        return smaller

    def _recut(self, window: Window) -> Window:
        """The same samples in smaller pieces: the pieces are all that is left of the batch, so they are cut again.

        A packed piece can't be, and stays. Where batch statistics keep one of three samples from being cut, the pieces
        are joined first, at the price of a copy of the window.
        """
        pieces: list[Batch] = []
        sizes: list[int] = []
        for piece, size in zip(window.pieces, window.sizes, strict=True):
            smaller = self._split(size)
            try:
                pieces += cutting.split(piece, smaller, **self._names)
                sizes += smaller
            except BatchError:
                pieces.append(piece)
                sizes.append(size)
        if max(sizes) > self.micro_batch and self._least > 1:
            return self._recut_joined(window) or Window(tuple(pieces), tuple(sizes))
        return Window(tuple(pieces), tuple(sizes))

    def _recut_joined(self, window: Window) -> Window | None:
        try:
            joined = cutting.join(window.pieces, **self._names)
            sizes = self._split(sum(window.sizes))
            return None if joined is None else Window(tuple(cutting.split(joined, sizes, **self._names)), sizes)
        except BatchError:
            return None

    def state_dict(self) -> dict[str, Any]:
        """All that training changes, between windows: for a checkpoint."""
        parts = self.parts
        return {
            "model": parts.model.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": parts.scheduler.state_dict() if parts.scheduler is not None else None,
            "scaler": parts.scaler.state_dict() if parts.scaler is not None else None,
            "number": self.number,
            "micro_batch": self.micro_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            UsageError: It belongs to another workload.
        """
        parts = self.parts
        for part in ("scheduler", "scaler"):
            if (state[part] is None) != (getattr(parts, part) is None):
                raise UsageError(f"The checkpoint and the workload don't agree on having a {part}.")
        parts.model.load_state_dict(state["model"])
        parts.optimizer.load_state_dict(state["optimizer"])
        for part in ("scheduler", "scaler"):
            if state[part] is not None:
                getattr(parts, part).load_state_dict(state[part])
        self.number = state["number"]
        self.micro_batch = min(state["micro_batch"], self.plan.micro_batch)  # a new plan may be for less memory


def _versions(window: Window) -> list[int]:
    """How often each tensor of the window was written to in place, as autograd counts it."""
    return [
        leaf._version
        for piece in window.pieces
        for _, leaf in tree.leaves(piece)
        if isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    ]


def _refuse_changed(window: Window, versions: list[int], failure: str) -> None:
    """A loss that writes into its batch has spoilt what a repetition needs."""
    if _versions(window) != versions:
        raise OutOfMemory(
            f"Out of memory in a window whose loss changes its batch in place ({failure}).",
            "The samples aren't what they were, so the window can't be repeated; nothing was trained by it.",
            "Let the loss work on copies: batch = batch.clone()",
        )
