"""Start a loop's window over in smaller micro-batches after an out-of-memory.

As `runner/oom_recovery.py`, without what only a Runner knows: the loop's own variables stay as they are, and those that
hold a failed micro-batch's output hold its memory until they are assigned again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from torch import nn

from .. import process_memory
from ..data.resplit import refuse_changed, versions
from ..data.window import Window
from ..devices import oom
from ..devices.registry import get_device
from ..errors import OutOfMemory, UsageError
from ..runner.sizing import Sizing, failed_samples
from ..state import snapshot
from .gradients import LoopGradients

log = logging.getLogger("autoaccum")


class LoopRecovery:
    """Notes an out-of-memory within a window, and undoes what was computed.

    Args:
        model: The model; None where it isn't known, and nothing can be put back.
        sizing: The sizes of micro-batches.
        gradients: The gradients that add up.

    Attributes:
        failure: The out-of-memory that wasn't dealt with yet; empty for none.
        retries: How often the window started over.
    """

    def __init__(self, model: nn.Module | None, sizing: Sizing, gradients: LoopGradients) -> None:
        self._model, self._sizing, self._gradients = model, sizing, gradients
        self._before: snapshot.Snapshot | None = None
        self._versions: list[int] = []
        self.failure, self.retries = "", 0

    @contextlib.contextmanager
    def entered(self, window: Window, begun: int, ranks: int) -> Iterator[None]:
        """Suppress an out-of-memory, and note it.

        Raises:
            UsageError: The model isn't known, there are several ranks, or earlier micro-batches went without.
        """
        if self._model is None or ranks > 1:
            raise UsageError(
                "window.recovering() needs the model." if ranks == 1 else f"window.recovering() on {ranks} ranks.",
                "Random states, buffers and gradients are put back before the window starts over, on one rank.",
                "Give it: autoaccum.windows(loader, plan, model=model).",
            )
        if self._before is None:
            if begun != 1:
                raise UsageError(
                    f"window.recovering() was first entered in micro-batch {begun}.",
                    "What the earlier ones changed could not be put back.",
                    "Enter it in each micro-batch: with window.recovering(): ...",
                )
            self._before = snapshot.take(model=self._model, storages=False)
            self._versions = versions(window)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not oom.is_out_of_memory(error):
                raise
            self.failure = oom.drop_frames(error)

    def start_over(self, window: Window, begun: int) -> Window:
        """Return the window in smaller micro-batches, with all else put back.

        Raises:
            OutOfMemory: It can't be cut smaller, or the loop changed its batch in place.
        """
        assert self._model is not None and self._before is not None
        failure, self.failure = self.failure, ""
        refuse_changed(window, self._versions, failure)
        self._gradients.drop()
        self._model.zero_grad(set_to_none=True)
        self._before.restore()
        oom.collect()
        process_memory.trim()
        get_device(next(self._model.parameters()).device).release_cache()
        failed = failed_samples(window, begun, self._sizing.limits)
        smaller, lowered = (window, failed) if failed <= self._sizing.least else self._sizing.shrink(window, begun)
        if smaller.sizes == window.sizes:
            raise OutOfMemory(
                f"Out of memory with a micro-batch of {failed}, which can't be cut smaller ({failure}).",
                "Less memory is free than was planned, or this batch needs more.",
                "Plan again with less memory (budget=), and go on from the last checkpoint.",
            )
        self.retries += 1
        self._versions = versions(smaller)
        log.warning(
            "Out of memory with a micro-batch of %d (%s). The window starts over with at most %d, and so do the next "
            "ones; its gradient is still that of all %d samples.", failed, failure, lowered, sum(window.sizes),
        )  # fmt: skip
        return smaller
