"""What a window must leave still until its optimizer step: parameters that aren't trained.

A momentum encoder that the loss moves, a discriminator that it steps: of these no window keeps a copy, as it would
cost more than the window. So a window that moved them can't be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..errors import OutOfMemory
from ..state.snapshot import Snapshot
from ..state.traversal import version_of
from ..window.context import TrainingContext

_SHOWN = 3  # names in a message


class Still:
    """Parameters that aren't trained, and how often each was written to in place.

    Args:
        context: What is trained.
    """

    def __init__(self, context: TrainingContext) -> None:
        self.parameters = list(_untrained(context))

    def versions(self) -> list[int]:
        """How often each was written to, as autograd counts it."""
        return [version_of(parameter) for _, parameter in self.parameters]

    def refuse_moved(self, before: list[int], snapshot: Snapshot | None, failure: str) -> None:
        """Refuses to repeat a window that moved what nothing puts back.

        Args:
            before: What `versions` gave before the window.
            snapshot: That of the window.
            failure: The out-of-memory.

        Raises:
            OutOfMemory: Names what was moved.
        """
        pairs = zip(self.parameters, before, self.versions(), strict=True)
        moved = [name for (name, _), then, now in pairs if then != now]
        moved += snapshot.unkept() if snapshot is not None else []
        if moved:
            shown = ", ".join(moved[:_SHOWN]) + (f" and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else "")
            raise OutOfMemory(
                f"Out of memory in a window whose forward moves {shown} ({failure}).",
                "Repeated, it would move them twice, and a copy of them would cost every window its time.",
                "Move them once per optimizer step, in between=; or load the last checkpoint and plan with less "
                "memory (--memory).",
            )


def _untrained(context: TrainingContext) -> Iterator[tuple[str, nn.Parameter]]:
    trained = {id(p) for group in context.optimizer.param_groups for p in group["params"]}
    yield from ((name, p) for name, p in context.model.named_parameters() if not p.requires_grad)
    yield from ((name, p) for name, p in context.held.parameters.items() if id(p) not in trained)
