"""Run lanes: one thread for each micro-batch, strictly one at a time.

A lane runs until it asks for a meeting or ends; then the next one runs. Where all have asked, the caller of `run`
settles the meeting, and they go on with its answers. Threads, so that what torch keeps per thread (autocast, gradient
mode, hooks of saved tensors, function modes) is each lane's own; and one at a time, so that what a lane does needs no
locks and comes in the same order every time.

No lane is ever left waiting: one that raises, ends before the others or meets elsewhere ends all of them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError

Work = Callable[[], Any]
Turn = Callable[[int], AbstractContextManager[None]]

_here = threading.local()


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


class Lane:
    """Run one micro-batch at a time in a thread, stretch by stretch.

    Args:
        index: Its number in the window.

    Attributes:
        request: What it waits for; None while it runs, and after it ended.
        result: What its work returned.
        error: What its work raised.
        meetings: What belongs to the window that it works for.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.request: Request | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.meetings: Any = None
        self._answer: Any = None
        self._ends = self._runs = False
        self._work: Work | None = None
        self._go, self._stopped = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._stopped.acquire()
        threading.Thread(target=self._serve, name=f"autoaccum lane {index}", daemon=True).start()

    # The driver's side

    def begin(self, work: Work) -> None:
        """Run new work up to its first meeting or its end."""
        self.result = self.error = self.request = None
        self._ends, self._work = False, work
        self._run()

    def answer(self, answer: Any) -> None:
        """Go on with a meeting's answer, up to the next meeting."""
        self._answer, self.request = answer, None
        del answer
        self._run()

    def end(self) -> None:
        """Unwind work that waits, until none does."""
        self._ends = True
        while self.request is not None:
            self.answer(None)
        self.result = self._work = None

    def close(self) -> None:
        """End the thread, which waits for work."""
        self._work = None
        self._go.release()

    def _run(self) -> None:
        self._runs = True
        self._go.release()
        interrupted: BaseException | None = None
        while self._runs:  # a lane that runs can't be broken off: it is waited for, and the interrupt follows
            try:
                self._stopped.acquire()
            except BaseException as error:
                interrupted = error
        self._stopped.acquire(blocking=False)  # an interrupt may have come before the lock was taken, or after
        if interrupted is not None:
            raise interrupted

    # The lane's own side

    def _serve(self) -> None:
        while True:
            self._go.acquire()
            work, self._work = self._work, None
            if work is None:
                return
            _here.lane = self
            try:
                self.result = work()
            except LanesEnded:
                pass
            except BaseException as error:
                self.error = error
            finally:
                _here.lane = None
            del work
            self._stop()

    def ask(self, request: Request) -> Any:
        """Wait for a meeting, and return its answer."""
        if self._ends:
            raise LanesEnded
        self.request = request
        del request
        self._stop()
        self._go.acquire()
        answer, self._answer = self._answer, None
        if self._ends:
            raise LanesEnded
        return answer

    def _stop(self) -> None:
        self._runs = False
        self._stopped.release()


class Lanes:
    """The threads of a training context's lanes, kept between windows.

    Libraries keep handles, plans and pools for each thread (cuDNN's execution plans, OpenMP's threads), so the same
    ones run every window. A forked process has none of its parent's threads, and starts its own.
    """

    def __init__(self) -> None:
        self._lanes: list[Lane] = []
        self._process = os.getpid()
        weakref.finalize(self, _close, self._lanes, self._process)

    def run(self, works: Sequence[Work], meetings: Any, turn: Turn) -> list[Any]:
        """Run each work in its own lane, and return their results.

        Args:
            works: What each lane runs.
            meetings: What belongs to the window, for the lanes' own use.
            turn: Entered with a lane's index around each stretch of it.

        Raises:
            UsageError: The lanes don't meet in the same order.
        """
        if os.getpid() != self._process:
            self._process = os.getpid()
            self._lanes = []
            weakref.finalize(self, _close, self._lanes, self._process)
        while len(self._lanes) < len(works):
            self._lanes.append(Lane(len(self._lanes)))
        lanes = self._lanes[: len(works)]
        try:
            for lane in lanes:
                lane.meetings = meetings
            return _drive(lanes, list(works), turn)
        finally:
            for lane in lanes:
                lane.end()
                lane.error = lane.meetings = lane.result = None


def current_lane() -> Lane | None:
    """Return the lane that this thread runs, or None."""
    lane: Lane | None = getattr(_here, "lane", None)
    return lane


def _drive(lanes: list[Lane], works: list[Work], turn: Turn) -> list[Any]:
    for lane in lanes:
        with turn(lane.index):
            lane.begin(works.pop(0))
        _raise_error(lane)
    while any(lane.request is not None for lane in lanes):
        answers = _settled(lanes)
        for lane in lanes:
            answer, answers[lane.index] = answers[lane.index], None  # its tensors are the lane's alone
            with turn(lane.index):
                lane.answer(answer)
            del answer
            _raise_error(lane)
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


def _raise_error(lane: Lane) -> None:
    error, lane.error = lane.error, None
    if error is not None:
        try:
            raise error
        finally:
            del error


def _close(lanes: list[Lane], process: int) -> None:
    if os.getpid() == process:
        for lane in lanes:
            lane.close()
