"""Plan a sharded model on all of its ranks.

Every forward and backward of such a model is a collective, so all ranks run the same windows in the same order, while
what comes next is decided by what one rank has measured: the first, whose shards are the largest. The others run the
windows that it runs, until it has a plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import AutoaccumError
from ..phases import OnPhase
from ..plan import Plan
from ..ranks.words import Control, Kind
from ..simulation.solver import Split
from .target import RecordingTarget

WINDOW, TRAIN, START_OVER, DONE, FAILED = "window", "train", "start over", "done", "failed"

StartOver = Callable[[], None]


class Procession:
    """The ranks that plan one sharded model together.

    Args:
        control: The words.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self.leads = control.rank == 0

    def say(self, what: str, how: Any = None) -> None:
        """Say on the first rank what all ranks do now."""
        self._control.from_first((what, how), Kind.PLAN)

    def target(self, target: RecordingTarget) -> RecordingTarget:
        """Return a target whose windows run on all ranks."""
        if not self.leads:
            return target
        values = {each.name: getattr(target, each.name) for each in fields(target)}
        return LeadingTarget(**values, procession=self)

    def starting_over(self, start_over: StartOver) -> StartOver:
        """Return a function that starts over on all ranks."""
        if not self.leads:
            return start_over

        def all_start_over() -> None:
            self.say(START_OVER)
            start_over()

        return all_start_over

    def follow(self, target: RecordingTarget, start_over: StartOver) -> Plan:
        """Run what the first rank runs, until it has a plan.

        Raises:
            AutoaccumError: It failed; the same error as there.
        """
        while True:
            what, how = self._control.from_first(None, Kind.PLAN)
            if what == WINDOW:
                target.window(*how)(lambda name: contextlib.nullcontext())
                target.remove_appended()
            elif what == TRAIN:
                target.train(how)
            elif what == START_OVER:
                start_over()
            elif what == FAILED:
                raise how
            else:
                return Plan.from_json(how)

    @contextlib.contextmanager
    def telling_the_end(self) -> Any:
        """Tell the others of an error of the first rank."""
        try:
            yield
        except AutoaccumError as error:
            if self.leads:
                self.say(FAILED, type(error)(error.what, error.why, error.hint))
            raise


@dataclass(frozen=True)
class LeadingTarget(RecordingTarget):
    """A target whose windows run on all ranks."""

    procession: Procession | None = field(default=None, kw_only=True)

    def window(self, n: int, steps: int = 2) -> Callable[[OnPhase], None]:
        """Return a function that trains one uncompiled window on all ranks."""
        run = super().window(n, steps)

        def train(on_phase: OnPhase) -> None:
            self._say(WINDOW, (n, steps))
            run(on_phase)

        return train

    def train(self, sizes: Split, on_phase: OnPhase | None = None) -> None:
        """Train one window of these micro-batches on all ranks."""
        self._say(TRAIN, sizes)
        super().train(sizes, on_phase)

    def _say(self, what: str, how: Any) -> None:
        assert self.procession is not None
        self.procession.say(what, how)
