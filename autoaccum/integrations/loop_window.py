"""Give a loop one window: micro-batches, their weights, the step.

A window knows which micro-batch the loop is at. Whatever would lose a sample or count one twice is an error: a
micro-batch without a backward or with two, a step too early or twice, a window that was left without a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.prefetch import Copies
from ..data.window import Window
from ..devices.registry import get_device
from ..errors import UsageError
from ..plan import Plan
from ..runner.runner import StepResult
from ..runner.sizing import Sizing
from ..window import loss_terms
from ..window.widths import Widths
from ..workload import Batch
from .counts import Counter
from .gradients import LoopGradients
from .loop_backend import LoopBackend, parameters_of
from .loop_recovery import LoopRecovery
from .ranks import Totals, add_up_gradients, sum_over_ranks


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of a window.

    Attributes:
        batch: Its samples, on the device.
        weight: Its part of what the window's loss averages over, all ranks included.
        samples: Number of its samples.
        index: Its place in the window, from 0.
    """

    batch: Batch
    weight: float
    samples: int
    index: int


@dataclass(eq=False)
class LoopState:
    """What the windows of a loop share.

    Attributes:
        plan: The plan.
        device: Where micro-batches are trained.
        backend: Runs backward, clips and steps.
        counter: Counts micro-batches in what the loss averages over.
        sizing: The sizes of micro-batches; its limits are lowered by an out-of-memory.
        gradients: The gradients that the windows add up.
        copies: Brings micro-batches to the device.
        widths: Notices micro-batches narrower than planned; None on a CPU.
        steps_taken: Optimizer steps so far.
    """

    plan: Plan
    device: torch.device
    backend: LoopBackend
    counter: Counter
    sizing: Sizing
    gradients: LoopGradients
    copies: Copies
    widths: Widths | None = None
    steps_taken: int = 0


class LoopWindow:
    """The micro-batches of one optimizer step.

    Iterate over it for the micro-batches, call `backward` for each, then `step`. It has as many micro-batches as `len`
    says.

    Attributes:
        samples: Samples in the window, on all ranks.
        split: Samples in each micro-batch of this rank.
    """

    def __init__(self, state: LoopState, window: Window, counts: Sequence[float], totals: Totals) -> None:
        self._state, self._totals = state, totals
        self._synchronizes = state.backend.synchronizes and totals.last_counts
        self._recovery = LoopRecovery(state.backend.model, state.sizing, state.gradients)
        self._set_window(window, counts)
        self._is_iterated = self._is_closed = False
        self.samples = totals.samples

    def _set_window(self, window: Window, counts: Sequence[float]) -> None:
        self._window, self._counts = window, tuple(counts)
        self._begun = self._backwards = 0
        self._loss: torch.Tensor | None = None

    @property
    def split(self) -> tuple[int, ...]:
        """Samples in each micro-batch of this rank."""
        return self._window.sizes

    @property
    def loss(self) -> torch.Tensor:
        """The loss of the micro-batches so far, weighted, a detached scalar."""
        return torch.zeros((), device=self._state.device) if self._loss is None else self._loss

    def __len__(self) -> int:
        return len(self._window.sizes)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield each micro-batch; the loop calls `backward` before the next.

        Raises:
            UsageError: A micro-batch was left without a backward, or the window is iterated a second time.
        """
        if self._is_iterated or self._is_closed:
            raise UsageError(
                "The window's micro-batches are iterated a second time.",
                "Each would be counted twice.",
                "Iterate once, and use micro.batch twice within the loop if you need it.",
            )
        self._is_iterated = True
        if self._state.widths is not None:
            self._state.widths.begin_window(self._window.pieces, self._window.sizes)
        with self._state.copies.window():
            while self._begun < len(self._window.pieces):
                with self._sync_at(self._begun):
                    yield self._micro_batch(self._begun)
                if not self._state.plan.device.keeps_workspaces:
                    get_device(self._state.device).release_workspaces()
                if self._recovery.failure:
                    smaller = self._recovery.start_over(self._window, self._begun)
                    self._state.copies.release()
                    self._set_window(smaller, self._state.counter.counts(smaller))
                else:
                    self._require_backward()
            self._state.copies.release_copied_ahead()

    def _sync_at(self, index: int) -> contextlib.AbstractContextManager[Any]:
        if self._synchronizes and index == len(self._window.pieces) - 1:
            return contextlib.nullcontext()
        return self._state.backend.without_sync()

    def _micro_batch(self, index: int) -> MicroBatch:
        self._begun += 1
        batch = self._state.copies.bring(self._window.pieces[index])
        count, total = self._counts[index], self._totals.count
        return MicroBatch(batch, count / total if total else 0.0, self._window.sizes[index], index)

    def backward(self, loss: Any, *, extra: torch.Tensor | None = None) -> torch.Tensor:
        """Backpropagate a micro-batch's loss with its weight.

        Args:
            loss: The micro-batch's mean, a scalar tensor; `(sum, count)` or `LossTerms` where the window counts.
            extra: What is added to the window's loss once: a penalty, an auxiliary loss. Weighted by samples.

        Returns:
            The micro-batch's share of the window's loss, detached.

        Raises:
            UsageError: It isn't the turn of a micro-batch, or the loss is no scalar tensor.
        """
        if self._backwards != self._begun - 1 or self._is_closed:
            raise self._out_of_turn()
        index, total = self._begun - 1, self._totals.count
        out = loss_terms.check(loss)
        self._check_count(out, index)
        share = self._window.sizes[index] / self._totals.samples
        part: torch.Tensor | None = None
        if self._counts[index] or loss_terms.count_of(out) is not None:
            part = loss_terms.part(out, share, self._counts[index], loss_terms.nonzero(total))
        if isinstance(extra, torch.Tensor):
            part = extra * share if part is None else part + extra * share
        if part is not None:
            self._backpropagate(part, is_last=index == len(self._window.pieces) - 1)
        self._backwards += 1
        detached = torch.zeros((), device=self._state.device) if part is None else part.detach()
        self._loss = detached.clone() if self._loss is None else self._loss.add_(detached)
        return detached

    def _backpropagate(self, part: torch.Tensor, *, is_last: bool) -> None:
        state = self._state
        state.gradients.begin_backward(part)
        if self._backwards == 0:
            state.gradients.refuse_old()
        else:
            state.gradients.refuse_changed()
        if self._synchronizes:
            if is_last:
                state.backend.check_sync()
            part = part * self._totals.ranks  # DistributedDataParallel takes the mean over ranks
        state.backend.backward(part)
        state.gradients.note()

    def recovering(self) -> contextlib.AbstractContextManager[None]:
        """Survive an out-of-memory of what is inside.

        Enter it around forward and backward of each micro-batch. After an out-of-memory the loop gets the window's
        micro-batches again, smaller ones, and the gradient is that of the whole window still.

        Raises:
            UsageError: `autoaccum.windows` was not given the model, or there are several ranks.
        """
        return self._recovery.entered(self._window, self._begun, self._totals.ranks)

    def step(self, optimizer: Any, *, scheduler: Any = None, max_grad_norm: float | None = None) -> StepResult:
        """Clip, step, clear the gradients and step the scheduler, once.

        Nothing is changed where nothing in the window counts.

        Args:
            optimizer: The optimizer, or several that share the loss.
            scheduler: A scheduler that is stepped once for each optimizer step, or several.
            max_grad_norm: The largest norm of the window's gradient; None for no clipping.

        Returns:
            What the step did.

        Raises:
            UsageError: Micro-batches are left, or the step was taken already.
        """
        self._require_complete()
        self._state.gradients.refuse_changed()
        self._is_closed = True
        state, optimizers, schedulers = self._state, _several(optimizer), _several(scheduler)
        parameters = parameters_of(optimizers)
        state.gradients.keep_only(parameters)
        loss, grad_norm, stepped = sum_over_ranks(self.loss), None, bool(self._totals.count)
        if stepped:
            if self._totals.ranks > 1 and not self._synchronizes:
                add_up_gradients(parameters)
            if max_grad_norm is not None:
                grad_norm = state.backend.clip(optimizers, max_grad_norm)
            stepped = state.backend.step(optimizers)
        state.steps_taken += stepped
        self._clear(optimizers)
        for each in schedulers if stepped else ():
            state.backend.schedule(each, loss)
        return StepResult(state.steps_taken, loss, self.samples, self.split, grad_norm, stepped, self._recovery.retries)

    def skip(self, optimizer: Any) -> None:
        """Give the window up: clear its gradients, and take no step."""
        self._is_closed = True
        self._clear(_several(optimizer))

    def _clear(self, optimizers: Sequence[Any]) -> None:
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        self._state.gradients.forget()
        self._state.copies.release()

    def require_closed(self) -> None:
        """Refuse to go on to the next window without this one's step.

        Raises:
            UsageError: It has none.
        """
        if not self._is_closed:
            raise UsageError(
                f"The window before had {self._backwards} of {len(self)} micro-batches' backward and no step.",
                "Its gradients would be added to the next window's, and its other samples would be lost.",
                "Call window.step(optimizer) after its loop, or window.skip(optimizer) to give it up.",
            )

    def _require_complete(self) -> None:
        if self._is_closed:
            raise UsageError(
                "The window's step was taken already, or it was skipped.",
                "A second step would have no gradient.",
                "Call window.step(optimizer) once; give it a list of optimizers where there are several.",
            )
        if self._backwards < len(self) or self._begun < len(self):
            done = sum(self.split[: self._backwards])
            raise UsageError(
                f"step() after {self._backwards} of {len(self)} micro-batches' backward.",
                f"The gradient would be of {done} samples of {sum(self.split)}, weighted as a part of them.",
                "Call step() after the loop over the window, or window.skip(optimizer) to give it up.",
            )

    def _require_backward(self) -> None:
        if self._backwards < self._begun:
            raise UsageError(
                f"Micro-batch {self._begun} of {len(self)} had no window.backward(loss).",
                f"Its {self.split[self._begun - 1]} samples would be missing from the gradient.",
                "Call window.backward(loss) for each micro-batch, in place of loss.backward().",
            )

    def _out_of_turn(self) -> UsageError:
        if self._begun == 0 or self._is_closed:
            return UsageError(
                "window.backward(loss) was called outside the loop over the window.",
                "It has no micro-batch to weigh the loss by.",
                "Call it inside: for micro in window: ...",
            )
        return UsageError(
            f"window.backward(loss) was called twice for micro-batch {self._begun} of {len(self)}.",
            "Each call adds a loss with the micro-batch's weight; the first may have freed the graph.",
            "Add the losses, and call it once: window.backward(loss_a + loss_b).",
        )

    def _check_count(self, out: Any, index: int) -> None:
        count = loss_terms.count_of(out)
        if count is None:
            return
        if self._state.counter.count is None or float(count) != self._counts[index]:
            raise UsageError(
                f"The loss came with a count of {float(count):g}, and the micro-batch counts {self._counts[index]:g}.",
                "A sum is divided by the count of the whole window, which is known before its first backward.",
                "Give the same count to both: autoaccum.windows(loader, plan, count=lambda batch: ...).",
            )


def _several(one: Any) -> tuple[Any, ...]:
    if one is None:
        return ()
    return tuple(one) if isinstance(one, (list, tuple)) else (one,)
