"""The search: which configuration to try next, whether it fits, how long it takes; kept by optuna (kept.py).

    guess       the plain one first, then the best one's neighbours, then the sampler's    _ask
    fits?       from a recording; what can't is pruned unrun                               memory.py
    same?       answered from the study                                                    _same
    time it     in a copy of this process, alone on the machine                            measure.py

Runs in a child process that loads torch and computes nothing itself, so that copies of it are as good as fresh ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..configuration import Configuration, sentence
from ..errors import AutoaccumError, DoesNotFit
from ..processes import interrupts
from ..units import show_bytes
from .kept import read_trials, tell
from .memory import Answer, Memory
from .result import FAILED, MEASURED, MEMORY, PRUNED, RANKED, SAME, SECONDS, Trial
from .space import Choices, Values, combinations, neighbours, size_of

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "random", "grid")
RESAMPLED = 12  # suggestions of known configurations in a row, before an unknown one is drawn

Timer = Callable[[Configuration, Answer, float | None], list[float]]
Turns = Callable[[dict[int, tuple[Configuration, Answer]], float], tuple[dict[int, list[float]], dict[int, str]]]


@dataclass
class Search:
    """A study at work.

    Attributes:
        choices: What is chosen from.
        plain: The plain configuration, in the choices' terms.
        base: Values that aren't chosen.
        samples: Samples in a window.
        memory: Answers whether a configuration fits.
        timer: Times a configuration; None where memory alone is ranked.
        turns: Times several in turn, for about so many seconds; None where that isn't done.
        sampler: "tpe", "random" or "grid".
        trials: Trials at most, those not counted that were answered from the study.
        until: When to begin no further one (`time.monotonic`).
        workers: Trials at a time.
        seed: For what is drawn.
        say: Called with a line for each trial.
        lock: Held while a trial is timed.
    """

    study: optuna.Study
    choices: Choices
    plain: Values
    base: dict[str, Any]
    samples: int
    memory: Memory
    timer: Timer | None
    sampler: str
    trials: int
    until: float | None
    workers: int
    seed: int
    say: Callable[[str], None]
    turns: Turns | None = None
    lock: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    _asking: threading.Lock = field(default_factory=threading.Lock)
    _queued: list[str] = field(default_factory=list)

    @property
    def ranking(self) -> str:
        """What trials are ranked by."""
        return MEMORY if self.timer is None else SECONDS

    def plain_number(self, trials: Iterable[Trial]) -> int | None:
        """Number of the plain configuration's trial, where it has a rank."""
        plain = {**self.base, **self.plain}
        return next((trial.number for trial in trials if trial.counts and dict(trial.configuration) == plain), None)

    def run(self) -> None:
        """Tries configurations until there were enough, or time is up, or all were tried."""
        if self.workers == 1:
            with _noticing_interrupts() as raise_if_interrupted:
                while self._one():
                    raise_if_interrupted()
            return
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for future in [pool.submit(self._until_done) for _ in range(self.workers)]:
                    future.result()
            except BaseException:
                self.until = 0.0  # or the others would go on until there were enough
                raise

    def _until_done(self) -> None:
        while self._one():
            pass

    def _one(self) -> bool:
        """One trial; False where none is left."""
        with self._asking:
            trial = self._ask()
        if trial is None:
            return False
        try:
            self._tell(trial, self._tried(trial))
        except BaseException as error:
            self._tell(
                trial, Trial(trial.number, FAILED, self._values(trial), why=f"interrupted ({type(error).__name__})")
            )
            raise
        return True

    def _ask(self) -> optuna.Trial | None:
        """The next trial; None where there were enough."""
        known = read_trials(self.study)
        running = len(self._queued)
        if sum(trial.state != SAME and not _interrupted(trial) for trial in known) + running >= self.trials:
            return None
        if self.until is not None and time.monotonic() >= self.until:
            return None
        tried = {_params(trial.configuration, self.choices) for trial in known if not _interrupted(trial)}
        tried |= set(self._queued)
        if len(tried) >= size_of(self.choices):
            return None
        guess = self._guess(known, tried)
        if guess is not None:
            self.study.enqueue_trial(guess)
        trial = self.study.ask()
        trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")
        self._queued.append(_params(self._values(trial), self.choices))
        return trial

    def _guess(self, known: list[Trial], tried: set[str]) -> Values | None:
        """What to try in place of the sampler's own suggestion."""
        if self.sampler == "grid":
            return next(each for each in combinations(self.choices) if _params(each, self.choices) not in tried)
        if self.sampler == "tpe":
            if _params(self.plain, self.choices) not in tried:
                return self.plain
            counted = [trial for trial in known if trial.counts]
            if counted:
                best = min(counted, key=lambda trial: trial.order(self.ranking))
                values = {name: best.configuration[name] for name in self.choices}
                near = [each for each in neighbours(values, self.choices) if _params(each, self.choices) not in tried]
                return min(near, key=lambda each: _is_seen(each, known, self.choices), default=None)
        last = known[-RESAMPLED:]
        if len(last) == RESAMPLED and all(trial.state == SAME for trial in last):
            left = [each for each in combinations(self.choices) if _params(each, self.choices) not in tried]
            return random.Random(f"{self.seed} {len(known)}").choice(left)
        return None

    def _values(self, trial: optuna.Trial) -> Values:
        chosen = {name: trial.suggest_categorical(name, options) for name, options in self.choices.items()}
        return {**self.base, **chosen}

    def _tried(self, trial: optuna.Trial) -> Trial:
        """What a trial comes to, without running what is known or can't fit."""
        values = self._values(trial)
        configuration = Configuration.from_values(values)
        try:
            answer = self.memory.answer(configuration, self.samples)
        except AutoaccumError as error:  # its process died
            return Trial(trial.number, FAILED, values, why=error.what)
        made: dict[str, Any] = {
            "number": trial.number,
            "configuration": values,
            "micro_batch": answer.split[0] if answer.split else None,
            "accumulation_steps": len(answer.split) or None,
            "peak_bytes": answer.peak_bytes or None,
            "numerics": configuration.numerics(Configuration.from_values({**self.base, **self.plain})),
        }
        if not answer.fits:
            return Trial(**made, state=PRUNED, why=answer.why)
        same = self._same(made)
        if same is not None:
            return Trial(**{**made, "step_seconds": same.step_seconds, "windows": same.windows}, state=SAME,
                         why=f"the same as trial {same.number}")  # fmt: skip
        if self.timer is None:
            return Trial(**made, state=RANKED)
        best = min((t.step_seconds for t in read_trials(self.study) if t.counts and t.step_seconds), default=None)
        try:
            with self.lock():
                seconds = self.timer(configuration, answer, best)
        except (AutoaccumError, MemoryError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Trial(**made, state=FAILED, why=first)
        return Trial(**made, state=MEASURED, step_seconds=statistics.median(seconds), windows=len(seconds))

    def _same(self, made: dict[str, Any]) -> Trial | None:
        """An earlier trial of the same configuration, "largest" having come to the same size."""
        key = _resolved(made["configuration"], made["micro_batch"])
        found = (trial for trial in read_trials(self.study) if trial.counts)
        return next((trial for trial in found if _resolved(trial.configuration, trial.micro_batch) == key), None)

    def _tell(self, trial: optuna.Trial, result: Trial) -> None:
        tell(self.study, trial, result, self.ranking, self.memory)
        with self._asking:
            self._queued.remove(_params(result.configuration, self.choices))
        self.say(self._line(result))

    def _line(self, result: Trial) -> str:
        known = read_trials(self.study)
        done = sum(trial.state != SAME for trial in known)
        best = min((trial for trial in known if trial.counts), key=lambda t: t.order(self.ranking), default=None)
        told = {
            MEASURED: f"{result.step_seconds or 0:.4g} s per optimizer step",
            RANKED: f"{show_bytes(result.peak_bytes or 0)}",
            SAME: result.why,
        }.get(result.state, f"{result.state}: {result.why}")
        split = f"{result.micro_batch} x {result.accumulation_steps}, " if result.micro_batch else ""
        so_far = f"; the best so far is trial {best.number}" if best is not None else ""
        return (
            f"trial {result.number} ({done} of {self.trials}): {split}{sentence(result.configuration)}: {told}{so_far}"
        )


@contextlib.contextmanager
def _noticing_interrupts() -> Iterator[Callable[[], None]]:
    """Gives what raises the KeyboardInterrupt that Python has dropped, where it has.

    One that is raised in a weak reference's callback is printed and forgotten, and sqlalchemy has thousands of those.
    """
    if interrupts.is_watched():
        yield interrupts.raise_if_received
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _is_main_thread():
        yield lambda: None  # somebody else handles interrupts, or they are ignored: a job in the background
        return
    seen = threading.Event()

    def interrupted(number: int, frame: Any) -> None:
        seen.set()
        raise KeyboardInterrupt

    def raise_if_interrupted() -> None:
        if seen.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _interrupted(trial: Trial) -> bool:
    return trial.state == FAILED and trial.why.startswith("interrupted")


def _is_seen(values: Values, known: list[Trial], choices: Choices) -> bool:
    """Whether each of its options was in a trial already.

    Each option is tried once before any is tried again beside others: where choices hardly depend on each other, one
    pass over them all finds the best.
    """
    seen = {_params(trial.configuration, [name]) for trial in known for name in choices}
    return all(_params(values, [name]) in seen for name in choices)


def _params(values: Mapping[str, Any], choices: Iterable[str]) -> str:
    return json.dumps([values[name] for name in choices])


def _resolved(values: Mapping[str, Any], micro_batch: int | None) -> str:
    return json.dumps({**values, "micro_batch": micro_batch}, sort_keys=True)


def pareto_numbers(trials: list[Trial], ranking: str) -> set[int]:
    """Trials that no other beats in both, seconds (or steps) and bytes."""
    points = {trial.number: (trial.order(ranking)[0], trial.peak_bytes or 0) for trial in trials if trial.counts}
    return {
        number
        for number, (one, two) in points.items()
        if not any(a <= one and b <= two and (a, b) != (one, two) for a, b in points.values())
    }


def nothing_fits(trials: list[Trial], missing_bytes: int) -> AutoaccumError:
    """Every configuration was pruned, or failed."""
    pruned = [trial for trial in trials if trial.state == PRUNED]
    if pruned and len(pruned) == len([trial for trial in trials if trial.state != SAME]):
        return DoesNotFit(
            f"None of {len(pruned)} configurations fits. The last one: {pruned[-1].why}",
            "What can't fit is told from recordings, and not run.",
            "What would help: more memory (--memory), more --trials, or a wider space (--vary checkpointing=1).",
            missing_bytes=missing_bytes,
        )
    failed = next((trial for trial in reversed(trials) if trial.state == FAILED), None)
    return AutoaccumError(
        f"None of {len(trials)} trials could be measured" + (f": {failed.why}." if failed is not None else "."),
        "Trials fail where the model doesn't run in that configuration, or time was up before the first.",
        "Give more time (--timeout), or narrow the space: --vary precision=fp32",
    )
