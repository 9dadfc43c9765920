"""Choose which configuration to try next, and try it.

    next        the plain one, then the best one's neighbours, then the sampler's suggestion
    fits?       from a recording; a configuration that can't fit is pruned without running       fit_check.py
    known?      "largest" and 32 may be the same configuration: answered from the study
    time it     in a copy of this process, alone on the machine                                 timing.py

Runs in a child process that loads torch and computes nothing, so that its copies start as clean as new processes. The
grid and the neighbours are a few lines here: optuna's GridSampler stops a study from inside `optimize` only, and a pass
over the best trial's neighbours shows how each choice compares with the plain configuration.
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..configuration import Configuration, sentence
from ..errors import AutoaccumError, DoesNotFit
from ..processes import interrupts
from ..units import show_bytes
from .fit_check import FitAnswer, FitChecker
from .result import FAILED, MEASURED, MEMORY, PRUNED, RANKED, SAME, SECONDS, Trial
from .space import Choices, Values, combinations, neighbours, size_of
from .study import read_trials, store_trial

if TYPE_CHECKING:
    import optuna

MAX_REPEATED_SUGGESTIONS = 12  # known configurations suggested in a row before an unknown one is drawn

Timer = Callable[[Configuration, FitAnswer, float | None], list[float]]
Contenders = dict[int, tuple[Configuration, FitAnswer]]  # by trial number
TurnTimer = Callable[[Contenders, float], tuple[dict[int, list[float]], dict[int, str]]]


@dataclass
class Search:
    """Run the trials of a study.

    Attributes:
        study: Stores the trials.
        choices: The choices by name.
        plain: The plain configuration, as far as the choices contain it.
        base: Values that are not searched.
        samples: Samples in a window.
        fit_checker: Answers whether a configuration fits.
        timer: Returns a configuration's seconds by window; None to rank by memory alone.
        sampler: "tpe", "random" or "grid".
        trials: The most trials, answers from the study not counted.
        until: `time.monotonic` value after which no trial starts; None for no limit.
        seed: Seed for draws.
        report: Called with a line for each trial.
        turn_timer: Times several configurations in turn, for about that many seconds; None to leave that out.
        lock: Held while a trial is timed.
    """

    study: optuna.Study
    choices: Choices
    plain: Values
    base: dict[str, Any]
    samples: int
    fit_checker: FitChecker
    timer: Timer | None
    sampler: str
    trials: int
    until: float | None
    seed: int
    report: Callable[[str], None]
    turn_timer: TurnTimer | None = None
    lock: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def ranking(self) -> str:
        """How trials are ranked: by seconds, or by memory."""
        return MEMORY if self.timer is None else SECONDS

    def plain_number(self, trials: Iterable[Trial]) -> int | None:
        """Return the number of the plain configuration's ranked trial."""
        plain = {**self.base, **self.plain}
        return next((trial.number for trial in trials if trial.counts and dict(trial.configuration) == plain), None)

    def run(self) -> None:
        """Try configurations until the limit, the time, or the space is exhausted."""
        with _noticing_interrupts() as raise_if_interrupted:
            while (trial := self._next_trial()) is not None:
                self._run_trial(trial)
                raise_if_interrupted()

    def _next_trial(self) -> optuna.Trial | None:
        """Return the next trial; None at the end."""
        known = read_trials(self.study)
        if sum(trial.state != SAME and not _was_interrupted(trial) for trial in known) >= self.trials:
            return None
        if self.until is not None and time.monotonic() >= self.until:
            return None
        tried = {_params(trial.configuration, self.choices) for trial in known if not _was_interrupted(trial)}
        if len(tried) >= size_of(self.choices):
            return None
        chosen = self._choose(known, tried)
        if chosen is not None:
            self.study.enqueue_trial(chosen)
        trial = self.study.ask()
        trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")
        return trial

    def _choose(self, known: list[Trial], tried: set[str]) -> Values | None:
        """Return the values to try; None leaves it to optuna."""
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
        last = known[-MAX_REPEATED_SUGGESTIONS:]
        if len(last) == MAX_REPEATED_SUGGESTIONS and all(trial.state == SAME for trial in last):
            left = [each for each in combinations(self.choices) if _params(each, self.choices) not in tried]
            return random.Random(f"{self.seed} {len(known)}").choice(left)
        return None

    def _run_trial(self, trial: optuna.Trial) -> None:
        values = self._values(trial)
        try:
            self._finish(trial, self._result(trial.number, values))
        except BaseException as error:
            self._finish(trial, Trial(trial.number, FAILED, values, why=f"interrupted ({type(error).__name__})"))
            raise

    def _values(self, trial: optuna.Trial) -> Values:
        chosen = {name: trial.suggest_categorical(name, options) for name, options in self.choices.items()}
        return {**self.base, **chosen}

    def _result(self, number: int, values: Values) -> Trial:
        """Return a trial's result, running nothing that is known or can't fit."""
        configuration = Configuration.from_values(values)
        try:
            answer = self.fit_checker.answer(configuration, self.samples)
        except AutoaccumError as error:  # the recording's process died
            return Trial(number, FAILED, values, why=error.what)
        common: dict[str, Any] = {
            "number": number,
            "configuration": values,
            "micro_batch": answer.split[0] if answer.split else None,
            "accumulation_steps": len(answer.split) or None,
            "peak_bytes": answer.peak_bytes or None,
            "numerics": configuration.numerics(Configuration.from_values({**self.base, **self.plain})),
        }
        if not answer.fits:
            return Trial(**common, state=PRUNED, why=answer.why)
        same = self._same_trial(values, common["micro_batch"])
        if same is not None:
            common |= {"step_seconds": same.step_seconds, "windows": same.windows}
            return Trial(**common, state=SAME, why=f"the same as trial {same.number}")
        if self.timer is None:
            return Trial(**common, state=RANKED)
        best = min((t.step_seconds for t in read_trials(self.study) if t.counts and t.step_seconds), default=None)
        try:
            with self.lock():
                seconds = self.timer(configuration, answer, best)
        except (AutoaccumError, MemoryError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Trial(**common, state=FAILED, why=first)
        return Trial(**common, state=MEASURED, step_seconds=statistics.median(seconds), windows=len(seconds))

    def _same_trial(self, values: Values, micro_batch: int | None) -> Trial | None:
        """Return an earlier trial of the same configuration, sizes resolved."""
        key = _resolved(values, micro_batch)
        found = (trial for trial in read_trials(self.study) if trial.counts)
        return next((trial for trial in found if _resolved(trial.configuration, trial.micro_batch) == key), None)

    def _finish(self, trial: optuna.Trial, result: Trial) -> None:
        store_trial(self.study, trial, result, self.ranking)
        self.report(self._line(result))

    def _line(self, result: Trial) -> str:
        known = read_trials(self.study)
        done = sum(trial.state != SAME for trial in known)
        best = min((trial for trial in known if trial.counts), key=lambda t: t.order(self.ranking), default=None)
        outcome = {
            MEASURED: f"{result.step_seconds or 0:.4g} s per optimizer step",
            RANKED: f"{show_bytes(result.peak_bytes or 0)}",
            SAME: result.why,
        }.get(result.state, f"{result.state}: {result.why}")
        split = f"{result.micro_batch} x {result.accumulation_steps}, " if result.micro_batch else ""
        so_far = f"; the best so far is trial {best.number}" if best is not None else ""
        chosen = f"{split}{sentence(result.configuration)}"
        return f"trial {result.number} ({done} of {self.trials}): {chosen}: {outcome}{so_far}"


@contextlib.contextmanager
def _noticing_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a function that raises a KeyboardInterrupt which Python dropped.

    Python prints and drops an interrupt raised in a weak reference's callback, and sqlalchemy has thousands of those.
    """
    if interrupts.is_watched():
        yield interrupts.raise_if_received
        return
    is_main = threading.current_thread() is threading.main_thread()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not is_main:
        yield lambda: None  # another handler is installed, or interrupts are ignored: a job in the background
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


def _was_interrupted(trial: Trial) -> bool:
    return trial.state == FAILED and trial.why.startswith("interrupted")


def _is_seen(values: Values, known: list[Trial], choices: Choices) -> bool:
    """Return whether each option was in a trial before.

    Each option is tried once before any is repeated beside others: where choices are independent, one pass over all
    options finds the best.
    """
    seen = {_params(trial.configuration, [name]) for trial in known for name in choices}
    return all(_params(values, [name]) in seen for name in choices)


def _params(values: Mapping[str, Any], choices: Iterable[str]) -> str:
    return json.dumps([values[name] for name in choices])


def _resolved(values: Mapping[str, Any], micro_batch: int | None) -> str:
    return json.dumps({**values, "micro_batch": micro_batch}, sort_keys=True)


def pareto_numbers(trials: list[Trial], ranking: str) -> set[int]:
    """Return the numbers of trials on the Pareto front."""
    points = {trial.number: (trial.order(ranking)[0], trial.peak_bytes or 0) for trial in trials if trial.counts}
    return {
        number
        for number, (one, two) in points.items()
        if not any(a <= one and b <= two and (a, b) != (one, two) for a, b in points.values())
    }


def no_winner_error(trials: list[Trial], missing_bytes: int) -> AutoaccumError:
    """Return the error for a search without a ranked trial."""
    pruned = [trial for trial in trials if trial.state == PRUNED]
    if pruned and len(pruned) == len([trial for trial in trials if trial.state != SAME]):
        return DoesNotFit(
            f"None of {len(pruned)} configurations fits. The last one: {pruned[-1].why}",
            "Configurations that can't fit are pruned from recordings, without running.",
            "Give more memory (--memory), more --trials, or a wider space (--vary checkpointing=1).",
            missing_bytes=missing_bytes,
        )
    failed = next((trial for trial in reversed(trials) if trial.state == FAILED), None)
    return AutoaccumError(
        f"None of {len(trials)} trials could be measured" + (f": {failed.why}." if failed is not None else "."),
        "A trial fails if the model doesn't run in its configuration, or the time was up before the first.",
        "Give more time (--timeout), or narrow the space: --vary precision=fp32",
    )
