"""Time the leading trials and the plain one again, in turn.

A shared machine varies by a third for seconds at a time, so a trial timed alone may lead by luck. Contenders that take
turns share that variance, and differences of one or two percent become measurable. Each runs in a copy of this process
that waits between its turns, so memory needs room for all of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ..configuration import Configuration, sentence
from ..processes.fork import ForkFailed, wait_for_word
from .result import MEASURED, Trial
from .search import Search
from .study import read_trials, store_turns, stored_turns

MAX_LEADERS = 4
LEADER_TIME_RATIO = 1.5  # of the best time; on a shared machine two runs can differ by as much
FINALS_TIME_FRACTION, MIN_FINALS_SECONDS = 0.5, 15.0  # of the trials' total time
MIN_ROUNDS, MAX_ROUNDS = 4, 30
TURN_SECONDS = 0.2  # a turn has as many windows as this takes: the first one after a switch finds cold caches
WARM_UP_WINDOWS = 2  # untimed: the first one creates the optimizer's state and triggers lazy loading

Key = TypeVar("Key", bound=Hashable)
Windows = Iterator[float]  # seconds of window after window


def contenders(trials: Sequence[Trial], plain: int | None, room_bytes: int, seconds: float) -> list[Trial]:
    """Return the trials that may be fastest, and the plain one.

    Args:
        trials: All trials, with the times of their own runs.
        plain: Number of the plain configuration's trial.
        room_bytes: Memory for all of them together; those that exceed it are left out.
        seconds: Time for the fewest rounds.
    """
    timed = sorted((t for t in trials if t.state == MEASURED), key=lambda t: t.step_seconds or 0.0)
    near = [t for t in timed if (t.step_seconds or 0.0) <= LEADER_TIME_RATIO * (timed[0].step_seconds or 0.0)]
    near = near[:MAX_LEADERS]
    wanted = [*near[:1], *(t for t in timed if t.number == plain), *near[1:]]
    found: list[Trial] = []
    for trial in wanted:
        more = [*found, trial]
        peak_bytes, round_seconds = sum(t.peak_bytes or 0 for t in more), sum(t.step_seconds or 0.0 for t in more)
        rounds = WARM_UP_WINDOWS + 1 + MIN_ROUNDS  # each contender's first turn is not counted
        if trial not in found and peak_bytes <= room_bytes and rounds * round_seconds <= seconds:
            found.append(trial)
    return found if len(found) > 1 else []


def time_in_turn(search: Search, trials_seconds: float, room_bytes: int) -> None:
    """Time the contenders in turn, unless the study has it.

    Args:
        search: A search that has run.
        trials_seconds: How long it ran.
        room_bytes: Memory for all contenders together.
    """
    if search.turn_timer is None:
        return
    trials = read_trials(search.study, timed_alone=True)
    seconds = max(MIN_FINALS_SECONDS, FINALS_TIME_FRACTION * trials_seconds)
    if search.until is not None:
        seconds = min(seconds, search.until - time.monotonic())
    found = contenders(trials, search.plain_number(trials), room_bytes, seconds)
    if {str(trial.number) for trial in found} <= stored_turns(search.study).keys():
        return
    chosen = {}
    for trial in found:
        configuration = Configuration.from_values(trial.configuration)
        chosen[trial.number] = configuration, search.fit_checker.answer(configuration, search.samples)
    try:
        with search.lock():
            turns, failed = search.turn_timer(chosen, seconds)
    except OSError as error:  # the system refused another process
        search.report(f"the leading trials were not timed in turn: {error}")
        return
    store_turns(search.study, turns, failed)
    for trial in read_trials(search.study):
        if trial.number in chosen:
            time_now = f"{trial.step_seconds:.4g} s, the median of {trial.turns}"
            split = f"{trial.micro_batch} x {trial.accumulation_steps}"
            outcome = time_now if trial.counts else f"failed: {trial.why}"
            search.report(f"trial {trial.number} in turn: {split}, {sentence(trial.configuration)}: {outcome}")


def in_turn(
    works: Mapping[Key, Callable[[], Windows]], max_seconds: float, progress: Callable[[str], None] = lambda text: None
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Return each contender's seconds per window, turn by turn.

    Args:
        works: By name, what a copy of this process runs: it prepares, then yields the seconds of its windows.
        max_seconds: No further round starts after this, once the fewest rounds are done.
        progress: Called with what is running.

    Returns:
        The seconds per window of each contender's turns; and for each that failed, why.
    """
    context = multiprocessing.get_context("fork")
    failed: dict[Key, str] = {}
    with contextlib.ExitStack() as stack:
        take_turn = {key: stack.enter_context(_contender(context, work)) for key, work in works.items()}
        turns: dict[Key, list[float]] = {key: [] for key in take_turn}

        def play(key: Key) -> float | None:
            try:
                return take_turn[key]()
            except ForkFailed as error:
                failed[key] = str(error)
                del turns[key]
                return None

        for key in take_turn:
            progress(f"preparing {len(turns)} contenders")
            play(key)  # includes the preparation, so it is not counted
        started = time.monotonic()
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.monotonic() - started > max_seconds:
                break
            progress(f"round {number + 1} of {len(turns)} contenders")
            order = list(turns)
            for key in order[number % len(order) :] + order[: number % len(order)] if order else ():
                seconds = play(key)
                if seconds is not None:
                    turns[key].append(seconds)
    return turns, failed


@contextlib.contextmanager
def _contender(context: Any, work: Callable[[], Windows]) -> Iterator[Callable[[], float]]:
    """Start a copy of this process; yield its turn function."""
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, here, there))  # not a daemon: those can't start loader workers
    process.start()
    there.close()

    def turn() -> float:
        try:
            here.send(TURN_SECONDS)
            wait_for_word(process.pid, here.fileno())
            reply = here.recv()
        except (EOFError, OSError):
            raise ForkFailed("it died without a word") from None
        if isinstance(reply, str):
            raise ForkFailed(reply)
        return float(reply)

    try:
        yield turn
    finally:
        process.kill()
        process.join()
        here.close()


def _serve(work: Callable[[], Windows], other_end: Connection, pipe: Connection) -> None:
    """Run a turn in the copy at each request."""
    other_end.close()
    windows: Windows | None = None
    while True:
        turn_seconds = pipe.recv()
        try:
            windows = windows or work()
            pipe.send(_turn(windows, turn_seconds))
        except BaseException as error:
            first = (str(error).strip().splitlines() or [""])[0]
            pipe.send(f"{type(error).__name__}: {first}")
            return


def _turn(windows: Windows, turn_seconds: float) -> float:
    """Return the seconds per window of one turn."""
    seconds = [next(windows)]
    while sum(seconds) < turn_seconds:
        seconds.append(next(windows))
    return sum(seconds) / len(seconds)
