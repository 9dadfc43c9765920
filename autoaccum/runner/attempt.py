"""Train a window once, and undo it when it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ..data import bad_batches
from ..data.resplit import refuse_changed, versions
from ..data.window import Window
from ..errors import BatchError
from ..phases import FIRST, LATER
from ..state import snapshot
from ..window import step
from ..window.context import TrainingContext
from .backward_updates import BackwardUpdates
from .state_changes import UncopiedParameters

TrainWindow = Callable[..., step.WindowResult]  # called as `step.train_window` is
NEEDS_TWO_VALUES = "Expected more than 1 value per channel"  # torch.nn.functional._verify_batch_size


class Attempt:
    """One pass over a window's micro-batches, up to its optimizer step.

    Args:
        context: What is trained.
        window: The window.
        updates: Refuses hooks that update parameters in backward.
        uncopied: Parameters that can't be put back.
        failure: The out-of-memory of the attempt before; empty in the first.
        train: Trains the window's micro-batches; another trainer's own loop steps the optimizer itself.

    Attributes:
        phase: The phase that began last; empty before the first micro-batch.
        micro_batches_begun: Micro-batches begun so far.
        before: Random states, scaler, buffers and attributes before the window; None where even these didn't fit.
    """

    def __init__(
        self,
        context: TrainingContext,
        window: Window,
        updates: BackwardUpdates,
        uncopied: UncopiedParameters,
        failure: str = "",
        train: TrainWindow = step.train_window,
    ) -> None:
        self.context, self.window = context, window
        self.phase, self.micro_batches_begun = "", 0
        self.before: snapshot.Snapshot | None = None
        self._updates, self._uncopied, self._failure = updates, uncopied, failure
        self._train = train
        self._batch_versions, self._parameter_versions = versions(window), uncopied.versions()

    def run(self) -> step.WindowResult:
        """Train the window.

        Raises:
            BatchError: Batch statistics need more samples than a micro-batch has; all is put back.
            UsageError: A hook updates parameters in the backward of one of several micro-batches.
        """
        context, window = self.context, self.window
        try:
            self.before = snapshot.take(model=context.model, scaler=context.scaler, held=context.held, storages=False)
            return self._train(context, window.pieces, window.sizes, on_phase=self._in_phase)
        except ValueError as error:
            if NEEDS_TWO_VALUES not in str(error):
                raise
            self.put_back()
            raise self._too_few_samples(str(error)) from None

    def put_back(self) -> None:
        """Drop the gradients, and put back random states, scaler, buffers and attributes."""
        drop_gradients(self.context)
        self.context.copies.release()
        if self.before is not None:
            self.before.restore()

    def refuse_moved(self, failure: str) -> None:
        """Refuse to repeat a window that changed its batch, or parameters.

        Nothing puts these back.

        Raises:
            OutOfMemory: Names what changed.
        """
        refuse_changed(self.window, self._batch_versions, failure)
        self._uncopied.refuse_moved(self._parameter_versions, self.before, failure)

    def _in_phase(self, name: str) -> AbstractContextManager[Any]:
        self.phase = name
        if name not in (FIRST, LATER):
            return contextlib.nullcontext()
        self.micro_batches_begun += 1
        return self._updates.refused(len(self.window.pieces), self._failure)

    def _too_few_samples(self, failure: str) -> BatchError:
        error = BatchError(
            f"A window of micro-batches {self.window.sizes} can't be trained ({failure}).",
            "Batch statistics need more than one value for each channel.",
            "Leave such a batch out (drop_last=True, or on_bad_batch='skip'), or use batchnorm='frozen'.",
        )
        return bad_batches.of_samples(error, self.window.samples, self.window.origin)


def drop_gradients(context: TrainingContext) -> None:
    """Set the gradients of the model and the optimizer to None."""
    context.model.zero_grad(set_to_none=True)
    context.optimizer.zero_grad(set_to_none=True)
