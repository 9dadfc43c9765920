"""Those that lead, and the plain configuration, are timed once more, in turn, before one of them is called the best.

Each trial was timed by itself. On a shared machine who leads was lucky as well as fast, and what is gained over the
plain one would be told from two different minutes. Turns (turns.py) do away with that, where memory has room for all of
them at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..configuration import Configuration, sentence
from .kept import keep_turns, read_trials, turns_kept
from .result import MEASURED, Trial
from .study import Search
from .turns import FEWEST, WARM_UP

LEADERS, NEAR = 4, 1.5  # how many at most, and within what of the best time: moods can be as large
SHARE, LEAST_SECONDS = 0.5, 15.0  # how long it may take: of what the trials took, and at least


def contenders(trials: Sequence[Trial], plain: int | None, room_bytes: int, seconds: float) -> list[Trial]:
    """Those that may be the fastest, the fastest first, and the plain one; none where there is one only.

    Args:
        trials: All trials, as each was timed by itself.
        plain: Number of the plain one's.
        room_bytes: What they may take in memory together; who comes last is left out.
        seconds: What the fewest rounds may take.
    """
    timed = sorted((t for t in trials if t.state == MEASURED), key=lambda t: t.step_seconds or 0.0)
    near = [t for t in timed if (t.step_seconds or 0.0) <= NEAR * (timed[0].step_seconds or 0.0)][:LEADERS]
    wanted = [*near[:1], *(t for t in timed if t.number == plain), *near[1:]]
    found: list[Trial] = []
    for trial in wanted:
        more = [*found, trial]
        peak_bytes, round_seconds = sum(t.peak_bytes or 0 for t in more), sum(t.step_seconds or 0.0 for t in more)
        rounds = WARM_UP + 1 + FEWEST  # the first turn of each isn't counted
        if trial not in found and peak_bytes <= room_bytes and rounds * round_seconds <= seconds:
            found.append(trial)
    return found if len(found) > 1 else []


def time_in_turn(search: Search, trials_seconds: float, room_bytes: int) -> None:
    """Times the contenders in turn, where that wasn't done already; the study keeps it.

    Args:
        search: A search that has run.
        trials_seconds: What it took.
        room_bytes: What all contenders may take together.
    """
    if search.turns is None:
        return
    trials = read_trials(search.study, by_itself=True)
    seconds = max(LEAST_SECONDS, SHARE * trials_seconds)
    if search.until is not None:
        seconds = min(seconds, search.until - time.monotonic())
    found = contenders(trials, search.plain_number(trials), room_bytes, seconds)
    if {str(trial.number) for trial in found} <= turns_kept(search.study).keys():
        return
    asked = {}
    for trial in found:
        configuration = Configuration.from_values(trial.configuration)
        asked[trial.number] = configuration, search.memory.answer(configuration, search.samples)
    try:
        with search.lock():
            turns, failed = search.turns(asked, seconds)
    except OSError as error:  # no room for another process
        search.say(f"those that led were not timed in turn: {error}")
        return
    keep_turns(search.study, turns, failed)
    for trial in read_trials(search.study):
        if trial.number in asked:
            now = f"{trial.step_seconds:.4g} s, the median of {trial.turns}" if trial.counts else f"failed: {trial.why}"
            search.say(f"trial {trial.number} in turn: {trial.micro_batch} x {trial.accumulation_steps}, "
                       f"{sentence(trial.configuration)}: {now}")  # fmt: skip
