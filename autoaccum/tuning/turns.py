"""Times several contenders in turn: each in a copy of this process that lives on and waits for its next turn.

A machine that others share is faster or slower by a third for seconds at a time. Whoever is timed by itself meets one
of its moods; those that take turns meet all of them alike, so that they can be told apart to a percent or two.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ..processes.fork import ForkFailed, wait_for_word

Key = TypeVar("Key", bound=Hashable)
Windows = Iterator[float]  # seconds of one window after the other

TURN_SECONDS = 0.2  # a turn is as many windows as take so long: after another's, the first finds cold caches
FEWEST, MOST = 4, 30  # rounds
WARM_UP = 2  # windows that `works` don't yield: the first makes the optimizer's state and loads what loads lazily


def in_turn(
    works: Mapping[Key, Callable[[], Windows]], most_seconds: float, say: Callable[[str], None] = lambda text: None
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Seconds per window of each contender, turn by turn, whoever begins changing.

    Args:
        works: By name, what a copy of this process does: makes all that is needed, and then yields windows' seconds.
        most_seconds: When to begin no further round, once there were the fewest.
        say: Told what is under way.

    Returns:
        The seconds per window of each one's turns; and of those that failed, why.
    """
    context = multiprocessing.get_context("fork")
    failed: dict[Key, str] = {}
    with contextlib.ExitStack() as stack:
        players = {key: stack.enter_context(_player(context, work)) for key, work in works.items()}
        turns: dict[Key, list[float]] = {key: [] for key in players}

        def play(key: Key) -> float | None:
            try:
                return players[key]()
            except ForkFailed as error:
                failed[key] = str(error)
                del turns[key]
                return None

        for key in players:
            say(f"making ready {len(turns)} contenders")
            play(key)  # makes what it needs; the first turn isn't counted
        started = time.monotonic()
        for number in range(MOST):
            if number >= FEWEST and time.monotonic() - started > most_seconds:
                break
            say(f"round {number + 1} of {len(turns)} contenders")
            order = list(turns)
            for key in order[number % len(order) :] + order[: number % len(order)] if order else ():
                taken = play(key)
                if taken is not None:
                    turns[key].append(taken)
    return turns, failed


@contextlib.contextmanager
def _player(context: Any, work: Callable[[], Windows]) -> Iterator[Callable[[], float]]:
    """A copy of this process, given as what has it take a turn and returns its seconds per window."""
    here, there = context.Pipe()
    process = context.Process(target=_play, args=(work, here, there))  # no daemon: those can have no loader workers
    process.start()
    there.close()

    def turn() -> float:
        try:
            here.send(TURN_SECONDS)
            wait_for_word(process.pid, here.fileno())
            taken = here.recv()
        except (EOFError, OSError):
            raise ForkFailed("it died without a word") from None
        if isinstance(taken, str):
            raise ForkFailed(taken)
        return float(taken)

    try:
        yield turn
    finally:
        process.kill()
        process.join()
        here.close()


def _play(work: Callable[[], Windows], other_end: Connection, pipe: Connection) -> None:
    """The copy's side: a turn whenever it is asked for one."""
    other_end.close()
    windows: Windows | None = None
    while True:
        long_enough = pipe.recv()
        try:
            windows = windows or work()
            pipe.send(_turn(windows, long_enough))
        except BaseException as error:
            first = (str(error).strip().splitlines() or [""])[0]
            pipe.send(f"{type(error).__name__}: {first}")
            return


def _turn(windows: Windows, long_enough: float) -> float:
    """Seconds per window of as many as take so long."""
    seconds = [next(windows)]
    while sum(seconds) < long_enough:
        seconds.append(next(windows))
    return sum(seconds) / len(seconds)
