"""Recover from running out of memory in the middle of a window.

A window that runs out of memory starts over from its first micro-batch, in smaller ones, and its gradient is still that
of all its samples:

    kept      the samples and their order; parameters and optimizer state, which only the optimizer step changes
    dropped   the gradients added up so far, and every tensor of the failed micro-batch
    restored  random states, the scaler, buffers and plain attributes of modules (`Attempt.put_back`)
    lowered   the limit that the failed micro-batch was at (`Sizing.shrink`), for later windows as well; in lanes that
              keep on the device what they could move to the host, all moves first
    refused   where parameters or the batch itself have changed, where a micro-batch can't be smaller, or can't be cut

Recovery runs outside the `except` block: within it the error still holds the activations of the failed micro-batch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .. import process_memory
from ..data.window import Window
from ..devices import oom
from ..devices.registry import get_device
from ..errors import OutOfMemory
from ..phases import OPTIMIZER, PHASE_TITLES
from ..plan import Plan
from ..ranks.exchange import StartOver
from ..state import snapshot
from ..units import show_bytes
from ..window.context import TrainingContext
from ..window.step import WindowResult, train_window
from .attempt import Attempt, TrainWindow
from .backward_updates import BackwardUpdates
from .sizing import Sizing, failed_samples
from .state_changes import UncopiedParameters

log = logging.getLogger("autoaccum")


@dataclass(frozen=True)
class TrainedWindow:
    """A window that was trained.

    Attributes:
        result: What it did.
        window: Its micro-batches, as trained.
        before: What was there before it.
        retries: How often it ran out of memory and started over.
    """

    result: WindowResult
    window: Window
    before: snapshot.Snapshot
    retries: int


class OomRecovery:
    """Trains windows, and starts those over that run out of memory.

    Args:
        context: What is trained.
        plan: The plan, for its numbers in messages.
        sizing: The sizes of micro-batches; its limits are lowered by each out-of-memory.
        train: Trains a window's micro-batches, as `step.train_window` does.

    Attributes:
        attempt: The one that is running; None between windows.
    """

    def __init__(self, context: TrainingContext, plan: Plan, sizing: Sizing, train: TrainWindow = train_window) -> None:
        self.context, self.plan, self.sizing, self._train = context, plan, sizing, train
        self.attempt: Attempt | None = None
        self._repeated = False
        self._updates = BackwardUpdates(context)
        self._uncopied = UncopiedParameters(context, self._updates)

    def train(self, window: Window) -> TrainedWindow:
        """Train a window, in as many attempts as it takes.

        Raises:
            OutOfMemory: It can't be repeated, or not in smaller micro-batches.
        """
        retries, failure, self._repeated = 0, "", False
        while True:
            attempt = Attempt(self.context, window, self._updates, self._uncopied, failure, self._train)
            self.attempt = attempt
            try:
                result = attempt.run()
                assert attempt.before is not None
                return TrainedWindow(result, window, attempt.before, retries)
            except (RuntimeError, MemoryError) as error:
                if not oom.is_out_of_memory(error):
                    raise
                failure = oom.drop_frames(error)
            except StartOver:  # another rank ran out of memory; this one repeats the window as it is
                attempt.refuse_moved("on another rank")
                attempt.put_back()
                continue
            finally:
                self.attempt = None
            retries += 1
            window = self._start_over(attempt, failure)

    def _start_over(self, attempt: Attempt, failure: str) -> Window:
        """Return the window to repeat, with all else put back."""
        _refuse_in_step(attempt, failure)
        attempt.refuse_moved(failure)
        _refuse_optimizer_step(attempt, failure)
        attempt.put_back()
        self._free_memory()
        where = PHASE_TITLES.get(attempt.phase, "pass that counts")
        if attempt.phase == OPTIMIZER:  # still private to this rank
            where = "preparation of the reduction over ranks"
        same = self._repeats(where, failure)
        window = attempt.window if same or self._moves_more(where, failure) else self._smaller(attempt, where, failure)
        if self.context.exchange is not None:
            self.context.exchange.retries += 1
            self.context.exchange.ask_to_start_over()
        return window

    def _smaller(self, attempt: Attempt, where: str, failure: str) -> Window:
        """Return the window in smaller micro-batches.

        Raises:
            OutOfMemory: They can't be smaller.
        """
        window = attempt.window
        failed = failed_samples(window, attempt.micro_batches_begun, self.sizing.limits)
        if failed <= self.sizing.least:
            raise self._smallest_fails(failed, where, failure)
        smaller, lowered = self.sizing.shrink(window, attempt.micro_batches_begun)
        if smaller.sizes == window.sizes:
            raise self._cannot_be_cut(failed, where, failure)
        log.warning(
            "Out of memory in the %s of a window with micro-batches of %d (%s). The window starts over with at most "
            "%d, and so do the next ones; its gradient is still that of all %d samples.",
            where, failed, failure, lowered, sum(window.sizes),
        )  # fmt: skip
        return smaller

    def _repeats(self, where: str, failure: str) -> bool:
        """Return whether the window starts over as it is.

        It does once, where micro-batches vary in width. What narrower ones left in the allocator's cache may have been
        in its way. The cache was given back, and in an empty one the planned window fits.
        """
        widths = self.context.widths
        if self._repeated or widths is None or not widths.vary:
            return False
        self._repeated = True
        log.warning(
            "Out of memory in the %s of a window whose micro-batches vary in width (%s). The allocator's cache was "
            "given back, and the window starts over as it is.",
            where, failure,
        )  # fmt: skip
        return True

    def _moves_more(self, where: str, failure: str) -> bool:
        """Let lanes move all to the host, if they don't.

        What stays doesn't shrink with the lanes.
        """
        if self.context.moved_parts is None:
            return False
        self.context.moved_parts = None
        log.warning(
            "Out of memory in the %s of a window in lanes (%s). The window starts over, and from now on all that lanes "
            "save for the backward moves to the host.",
            where, failure,
        )  # fmt: skip
        return True

    def _free_memory(self) -> None:
        oom.collect()
        process_memory.trim()
        get_device(self.context.device).release_cache()

    def _smallest_fails(self, failed: int, where: str, failure: str) -> OutOfMemory:
        return OutOfMemory(
            f"Out of memory with a micro-batch of {failed} in the {where} ({failure}).",
            f"The plan predicts {show_bytes(self.plan.predicted_peak_bytes)} for a micro-batch of "
            f"{self.plan.micro_batch}; less is free now, or this batch needs more.",
            "Free memory, or plan again: autoaccum plan --target-batch " + str(self.plan.target_batch),
        )

    def _cannot_be_cut(self, failed: int, where: str, failure: str) -> OutOfMemory:
        return OutOfMemory(
            f"Out of memory in the {where} with a micro-batch of {failed}, which can't be cut ({failure}).",
            "Its collate function packed it, or batch statistics need two samples, so this window can't be "
            "repeated in smaller pieces; nothing was trained by it. "
            f"The next windows are loaded in micro-batches of at most {self.sizing.limits.micro_batch}.",
            "Plan again with less memory (budget=), and go on from the last checkpoint.",
        )


def _refuse_in_step(attempt: Attempt, failure: str) -> None:
    """Raise where other ranks wait in this window's collectives."""
    exchange = attempt.context.exchange
    if exchange is not None and exchange.in_step:
        raise OutOfMemory(
            f"A window of a sharded model ran out of memory ({failure}).",
            "Other ranks are in its collectives, so that no rank can start it over.",
            "Start all ranks again (torchrun --max-restarts), with a plan for less memory: budget= or "
            f"max_micro_batch={max(1, max(attempt.window.sizes) - 1)}.",
        )


def _refuse_optimizer_step(attempt: Attempt, failure: str) -> None:
    """Raise where the optimizer may have updated some of its parameters."""
    exchange = attempt.context.exchange
    if exchange is not None and exchange.is_private:
        return  # it was about to say that its gradient is there: no rank has stepped
    if attempt.phase == OPTIMIZER:
        raise optimizer_step_failed(failure)


def optimizer_step_failed(failure: str) -> OutOfMemory:
    """Return the error for an optimizer that ran out of memory."""
    return OutOfMemory(
        f"The optimizer step ran out of memory ({failure}).",
        "Parameters may be updated in part, so the window can't be repeated; its size doesn't matter here.",
        "Plan again with less memory (budget=), or load the last checkpoint and use a leaner optimizer.",
    )
