"""Run lanes: a greenlet for each micro-batch, one at a time.

All are in the caller's thread. A lane runs until it asks for a meeting or ends; then the next one runs. Where all have
asked, the caller of `run_lanes` settles the meeting, and they go on with its answers. Greenlets and no threads: a
switch takes a microsecond and stays on one core, libraries keep one set of handles, plans and pools (cuDNN, OpenMP),
and autograd numbers the nodes of all lanes in the order in which they were made, so that the backward goes lane by lane
between meetings as well. What torch keeps for each thread is each lane's own: it is exchanged at every switch
(thread_state.py).

No lane is ever left waiting: one that raises, ends before the others or meets elsewhere ends all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet

from ...errors import UsageError
from .thread_state import Kept, ThreadState

Work = Callable[[], Any]
Turn = Callable[[int], AbstractContextManager[None]]


class LanesEnded(BaseException):
    """Unwind a lane whose window was broken off.

    Not an `Exception`, so that models don't catch it.
    """


@dataclass(frozen=True, eq=False)
class Request:
    """What a lane asks for where it meets the others.

    Attributes:
        place: Equal in all lanes that are at the same meeting.
        title: Its name in messages, found where it is needed.
        value: What the lane brings.
        settle: From what all lanes bring, in their order, to what each gets.
    """

    place: tuple[Any, ...]
    title: Callable[[], str]
    value: Any
    settle: Callable[[list[Any]], list[Any]]


class Lane(greenlet):  # type: ignore[misc]  # greenlet has no types
    """Run one micro-batch, stretch by stretch.

    Args:
        index: Its number in the window.
        work: What it runs, in a copy of the caller's context variables.
        meetings: What belongs to the window.
        state: What torch keeps for the thread.

    Attributes:
        request: What it waits for; None while it runs, and after it ended.
        result: What its work returned.
    """

    def __init__(self, index: int, work: Work, meetings: Any, state: ThreadState) -> None:
        super().__init__()
        self.gr_context = copy_context()
        self.index, self.meetings = index, meetings
        self.request: Request | None = None
        self.result: Any = None
        self._work: Work | None = work
        self._answer: Any = None
        self._ends = False
        self._state = state
        self._kept: Kept | int | None = None

    def run(self) -> None:
        """Run the work: greenlet calls this with the first switch."""
        work, self._work = self._work, None
        assert work is not None
        with contextlib.suppress(LanesEnded):
            self.result = work()

    def ask(self, request: Request) -> Any:
        """Wait for a meeting, and return its answer."""
        if self._ends:
            raise LanesEnded
        self.request = request
        del request
        assert self.parent is not None
        self.parent.switch()
        answer, self._answer = self._answer, None
        if self._ends:
            raise LanesEnded
        return answer

    # The driver's side

    def go_on(self, answer: Any = None) -> None:
        """Run up to the next meeting, or the end."""
        self._answer, self.request = answer, None
        del answer
        self._state.enter(self._kept)
        self._kept = None
        try:
            self.switch()
        finally:
            self._kept = self._state.leave()

    def end(self) -> None:
        """Unwind work that waits, until none does."""
        self._ends = True
        while self:  # it has begun, and waits
            with contextlib.suppress(Exception):  # what it raises while it unwinds follows from what broke it off
                self.go_on()
        self.request = self.result = self.meetings = self._work = None


def run_lanes(works: Sequence[Work], meetings: Any, turn: Turn, state: ThreadState) -> list[Any]:
    """Run each work in its own lane, and return their results.

    Args:
        works: What each lane runs.
        meetings: What belongs to the window, for the lanes' own use.
        turn: Entered with a lane's index around each stretch of it.
        state: What torch keeps for this thread.

    Raises:
        UsageError: The lanes don't meet in the same order.
    """
    with contextlib.ExitStack() as ending:
        lanes = [Lane(index, work, meetings, state) for index, work in enumerate(works)]
        del works
        for lane in reversed(lanes):
            ending.callback(lane.end)
        return _drive(lanes, turn)


def current_lane() -> Lane | None:
    """Return the lane that runs, or None."""
    found = getcurrent()
    return found if isinstance(found, Lane) else None


def _drive(lanes: list[Lane], turn: Turn) -> list[Any]:
    for lane in lanes:
        with turn(lane.index):
            lane.go_on()
    while any(lane.request is not None for lane in lanes):
        answers = _settled(lanes)
        for lane in lanes:
            answer, answers[lane.index] = answers[lane.index], None  # its tensors are the lane's alone
            with turn(lane.index):
                lane.go_on(answer)
            del answer
    return [lane.result for lane in lanes]


def _settled(lanes: list[Lane]) -> list[Any]:
    """Settle a meeting of all lanes."""
    requests = [lane.request for lane in lanes]
    first = requests[0]
    for index, request in enumerate(requests):
        if first is None or request is None or request.place != first.place:
            raise _apart(requests, index)
    found = [request for request in requests if request is not None]
    assert first is not None
    return first.settle([request.value for request in found])


def _apart(requests: Sequence[Request | None], index: int) -> UsageError:
    places = [("at its end" if each is None else f"at {each.title()}") for each in (requests[0], requests[index])]
    return UsageError(
        f"The micro-batches of a window don't meet in the same order: the first is {places[0]}, "
        f"number {index + 1} is {places[1]}.",
        "Statistics of a whole window need every micro-batch at the same layer, and here the path through the model "
        "depends on the samples (a branch, a loop of varying length, a layer that is skipped at random).",
        "Let the path depend on nothing in the batch, or use batchnorm='frozen', 'merged' or 'per_micro_batch'.",
    )
