"""Those that lead are timed again, in turn, before one of them is called the best.

A shared machine can be slower by a third for a minute. Whoever was timed in that minute falls behind, and whoever leads
was lucky as well as fast. So leaders get further timings, each in a process of its own, one round after the other, and
count by their median: one that falls back makes room for the next, which then is timed again too. So does the plain
configuration, or what is gained would be told from one lucky or unlucky minute.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..errors import AutoaccumError
from .configuration import Configuration
from .kept import keep_timing, read_trials
from .result import MEASURED, Trial, sentence
from .study import Search

TIMINGS = 3  # of each leader, its trial's included
LEADERS, NEAR = 4, 1.15  # how many at most, and within what of the best time
SHARE, LEAST_SECONDS = 0.5, 30.0  # how long it may take: of what the trials took, and at least


def leaders(trials: Sequence[Trial]) -> list[Trial]:
    """Those that may be the fastest, the fastest first."""
    timed = sorted((t for t in trials if t.state == MEASURED), key=lambda t: t.step_seconds or 0.0)[:LEADERS]
    return [t for t in timed if (t.step_seconds or 0.0) <= NEAR * (timed[0].step_seconds or 0.0)]


def due(trials: Sequence[Trial], plain: int | None) -> list[Trial]:
    """Of the leaders and the plain one, which the winner is told to beat by so much, those that had fewest timings.

    Args:
        trials: All trials.
        plain: Number of the plain one's.

    Returns:
        None where each had all its timings, or where there is one only.
    """
    found = leaders(trials)
    found += [trial for trial in trials if trial.number == plain and trial.state == MEASURED and trial not in found]
    fewest = min((trial.timings for trial in found), default=TIMINGS)
    if len(found) < 2 or fewest >= TIMINGS:
        return []
    return [trial for trial in found if trial.timings == fewest]


def time_again(search: Search, trials_seconds: float) -> None:
    """Times the leaders again, until each has had enough timings or time is up.

    Args:
        search: A search that has run.
        trials_seconds: What it took.
    """
    if search.timer is None:
        return
    ends = time.monotonic() + max(LEAST_SECONDS, SHARE * trials_seconds)
    ends = ends if search.until is None else min(ends, search.until)
    backwards = False
    while round_of := due(known := read_trials(search.study), search.plain_number(known)):
        for trial in reversed(round_of) if backwards else round_of:
            if time.monotonic() >= ends:
                return
            _once(search, trial)
        backwards = not backwards


def _once(search: Search, trial: Trial) -> None:
    assert search.timer is not None
    configuration = Configuration.from_values(trial.configuration)
    answer = search.memory.answer(configuration, search.samples)
    try:
        with search.lock():
            seconds, why = search.timer(configuration, answer, None), ""
    except (AutoaccumError, MemoryError, RuntimeError) as error:
        seconds, why = [], (str(error).strip().splitlines() or [type(error).__name__])[0]
    keep_timing(search.study, trial.number, seconds, why)
    now = next(each for each in read_trials(search.study) if each.number == trial.number)
    told = f"{now.state}: {now.why}" if why else f"{now.step_seconds:.4g} s, the median of {now.timings} timings"
    search.say(f"trial {trial.number} again: {trial.micro_batch} x {trial.accumulation_steps}, "
               f"{sentence(trial.configuration)}: {told}")  # fmt: skip
