"""Compare state before and after a window.

`UncopiedParameters` is about windows that ran out of memory: a window keeps no copy of parameters, so one that changed
some can't be repeated. `ForwardChanges` is about windows that went well: a module that counts its own forwards counts
micro-batches, and runs ahead of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..errors import OutOfMemory
from ..state.snapshot import Snapshot
from ..torch_compat import accumulation_hooks, write_count
from ..window.context import TrainingContext
from .backward_updates import BackwardUpdates, Named

Versions = list[tuple[str, nn.Parameter, int]]

_SHOWN = 3  # names in a message
_COMPARED_WINDOWS = 2  # what both change, each will: a lazy initialization or a flag changes in the first only
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_POWER_ITERATIONS = ("_u", "_v")  # vectors of a spectral normalization


class UncopiedParameters:
    """Parameters that must not change until the optimizer step.

    No window keeps a copy of them.

    These are the ones that aren't trained (a momentum encoder that the loss moves, a discriminator that it steps), and
    those with hooks that may step an optimizer in backward.

    Args:
        context: What is trained.
        updates: Knows which parameters have hooks.
    """

    def __init__(self, context: TrainingContext, updates: BackwardUpdates) -> None:
        self._untrained, self._updates = list(_untrained(context)), updates

    def versions(self) -> Versions:
        """Return how often each parameter was written to in place.

        Autograd counts it.
        """
        return [(name, p, write_count(p)) for name, p in (*self._untrained, *self._updates.hooked())]

    def refuse_moved(self, before: Versions, snapshot: Snapshot | None, failure: str) -> None:
        """Refuse to repeat a window that changed what nothing puts back.

        Args:
            before: What `versions` gave before the window.
            snapshot: That of the window.
            failure: The out-of-memory.

        Raises:
            OutOfMemory: Names what was changed.
        """
        changed = [(name, parameter) for name, parameter, version in before if write_count(parameter) != version]
        updated = [name for name, parameter in changed if accumulation_hooks(parameter)]
        if updated:
            raise OutOfMemory(
                f"Out of memory in a window in whose backward a hook updates {_shown(updated)} ({failure}).",
                "Some parameters are updated already, so the window can't be repeated.",
                "Load the last checkpoint and plan again with less memory (budget=).",
            )
        moved = [name for name, _ in changed] + (snapshot.unkept() if snapshot is not None else [])
        if moved:
            raise OutOfMemory(
                f"Out of memory in a window whose forward moves {_shown(moved)} ({failure}).",
                "Repeated, it would move them twice, and a copy of them would cost every window its time.",
                "Move them once per optimizer step, in between_steps=; or load the last checkpoint and plan with less "
                "memory (budget=).",
            )


def _untrained(context: TrainingContext) -> Iterator[Named]:
    trained = {id(p) for group in context.optimizer.param_groups for p in group["params"]}
    yield from ((name, p) for name, p in context.model.named_parameters() if not p.requires_grad)
    yield from ((name, p) for name, p in context.held.parameters.items() if id(p) not in trained)


class ForwardChanges:
    """Compares state around the first two windows of several micro-batches.

    Args:
        context: What is trained.
    """

    def __init__(self, context: TrainingContext) -> None:
        self.context = context
        self._windows = 0
        self._changed: list[str] = []

    def after_window(self, before: Snapshot, steps: int) -> str:
        """Return what to warn of after a window; empty for nothing.

        Args:
            before: Taken before the window.
            steps: Its micro-batches.
        """
        if self._windows == _COMPARED_WINDOWS or steps < 2:
            return ""
        now = before.differences()
        self._changed = [name for name in now if not self._windows or name in self._changed]
        self._windows += 1
        counting = _unknown(self._changed, self.context) if self._windows == _COMPARED_WINDOWS else []
        if not counting:
            return ""
        return (
            f"The forward changes {_shown(counting)}: {steps} times a window, not once. A module that counts its own "
            "steps (a warm-up, a moving average, an annealed temperature) then runs ahead of the optimizer. "
            "Let it count optimizer steps: in between_steps=, or by the number in Runner's results."
        )


def _unknown(changed: Sequence[str], context: TrainingContext) -> list[str]:
    """Leave out what is known to change in forwards.

    That is batch statistics, power iterations, random states, gradients and lists.
    """
    prefixes = [f"{name}." if name else "" for name in (*context.norms.batch, *context.norms.instance)]
    known = {prefix + statistic for prefix in prefixes for statistic in _STATISTICS}
    # What a loss appends to its own lists is a record of micro-batches, and counts nothing.
    records = tuple(f"{name}[" for name, thing in context.held.things if not isinstance(thing, nn.Module))
    return [
        name
        for name in (each.removeprefix("module attribute ").removeprefix("model.") for each in changed)
        if not name.endswith("RNG") and not name.startswith("scaler ") and "RNG of" not in name and name not in known
        and not name.startswith("gradient of") and not name.startswith(records)
        and not (context.norms.spectral and name.endswith(_POWER_ITERATIONS))
    ]  # fmt: skip


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
