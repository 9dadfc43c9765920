"""Check that windows have the gradient of one batch; warn once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch

from ..data.window import Window
from ..exactness.recheck import counts_differ, recheck
from ..torch_compat import local_bytes
from ..units import show_bytes
from ..window.context import TrainingContext
from ..window.loss_form import LossKind
from ..workload import IGNORED
from .oom_recovery import TrainedWindow
from .state_changes import ForwardChanges

log = logging.getLogger("autoaccum")

_SHOWN = 3  # names in a warning


class WindowChecks:
    """Checks around each window, until they are settled.

    Args:
        context: What is trained.
        batch_keys: `shared` and `per_sample`, as `data.split` takes them.

    Attributes:
        rechecked: Whether a window's gradient was compared with that of one batch.
        warned_of_ignored: Whether ignored labels in a loss of unknown form were warned of.
    """

    def __init__(self, context: TrainingContext, batch_keys: Mapping[str, Collection[str]]) -> None:
        self.context = context
        self.rechecked = self.warned_of_ignored = False
        self._batch_keys = dict(batch_keys)
        self._changes = ForwardChanges(context)
        self._trained = self._trained_now()

    def before_window(self, window: Window) -> None:
        """Compare gradients where micro-batches count differently.

        The plan's sample may not have shown it. Look for parameters that weren't trained when it was made, too.
        """
        self._warn(self._more_trained())
        if self.rechecked or self.context.encode is not None or not counts_differ(window.pieces, window.sizes):
            return
        self.rechecked = True
        self._warn(recheck(self.context, window.pieces, window.sizes, self._batch_keys))

    def after_window(self, trained: TrainedWindow) -> None:
        """Look for ignored labels, and for modules that count forwards."""
        self._warn(self._ignored_warning(trained.window))
        self._warn(self._changes.after_window(trained.before, len(trained.window.pieces)))

    def _trained_now(self) -> frozenset[tuple[int, bool]]:
        """Return which parameters get a gradient, and whether the optimizer has them."""
        theirs = {id(p) for group in self.context.optimizer.param_groups for p in group["params"]}
        return frozenset((id(p), id(p) in theirs) for p in self.context.model.parameters() if p.requires_grad)

    def _more_trained(self) -> str:
        now = self._trained_now()
        more, self._trained = now - self._trained, now
        if not more:
            return ""
        new = {id_ for id_, _ in more}
        named = [(name, p) for name, p in self.context.model.named_parameters() if id(p) in new]
        shown = ", ".join(name for name, _ in named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "")
        return (
            f"{len(named)} of the model's tensors ({shown}) weren't trained when the Runner was made. Their gradients "
            f"({show_bytes(sum(local_bytes(p) for _, p in named))}) and the optimizer's state for them are not in the "
            "plan's memory; the gradient is the whole batch's still. Plan again, and make a new Runner."
        )

    def _ignored_warning(self, window: Window) -> str:
        form = self.context.loss_form
        if self.warned_of_ignored or form is None or form.kind is not LossKind.UNKNOWN or len(window.pieces) < 2:
            return ""
        labels = [piece.get("labels") for piece in window.pieces if isinstance(piece, Mapping)]
        if not any(isinstance(label, torch.Tensor) and bool((label == IGNORED).any()) for label in labels):
            return ""
        self.warned_of_ignored = True
        return (
            "Some labels are ignored (-100), and the model's own .loss is no mean over the others that autoaccum "
            "knows. Micro-batches are weighted by their samples, so the gradient may not be the whole batch's. "
            "Give loss= as (sum, count), or count= with what the model averages over."
        )

    def _warn(self, text: str | None) -> None:
        if text:
            log.warning("%s", text)
