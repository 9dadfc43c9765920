"""What windows leave changed: said once, where it is more than a flag that flips the first time."""

from __future__ import annotations

from ..state import snapshot
from ..window.context import TrainingContext
from .compatibility import told_of_changes
from .own_counts import own_counts

_WINDOWS = 2  # what both change, each will: a lazy initialization or a cached size changes in the first only


class Changes:
    """Looks at the first two windows of several micro-batches.

    Args:
        context: What is trained.
    """

    def __init__(self, context: TrainingContext) -> None:
        self.context = context
        self.looked = 0
        self.changed: list[str] = []

    def look(self, before: snapshot.Snapshot, steps: int) -> str:
        """What to warn of after a window; empty where there is nothing, or it was said.

        Args:
            before: What was taken before the window.
            steps: Its micro-batches.
        """
        if self.looked == _WINDOWS or steps < 2:
            return ""
        now = before.differences()
        self.changed = [name for name in now if not self.looked or name in self.changed]
        self.looked += 1
        if self.looked < _WINDOWS:
            return ""
        said = own_counts(self.context.model, self.context.held.modules)  # when the Runner was made
        return told_of_changes(self.changed, self.context, steps, said)
