"""Run one tuning from beginning to end, in a child process."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ..configuration import Configuration, allocator_settings
from ..devices.cpu import page_cache
from ..devices.cpu.budget import read_cpu_budget
from ..devices.virtual import planning_environment
from ..errors import NotConfirmed
from ..plan import Plan
from ..processes.child import Say, call
from ..processes.function_pipe import to_hand_on
from .finals import time_in_turn
from .fit_check import FitChecker, Recorded
from .request import TuningRequest
from .result import FAILED, MEMORY, SECONDS, Trial, TuningResult, ranked, with_configuration
from .search import Search, no_winner_error, pareto_numbers
from .space import Choices, choices_for, micro_batches, plain_values, size_of
from .study import open_study, read_trials, timing_lock
from .timing import TrialTraining, make_timer, make_turn_timer

DEFAULT_TRIALS = 40
MAX_CONFIRMATIONS = 3  # winners whose plan is verified, if those before were not confirmed


def tune(*, say: Say, workload: str | None, request: dict[str, Any]) -> dict[str, Any]:
    """Tune, and return the `TuningResult` as JSON.

    Args:
        say: Called with progress.
        workload: The workload's source; None for the function that this process was given.
        request: From `TuningRequest.to_values`.
    """
    say({"say": "loading torch and the workload"})
    import torch  # noqa: F401  copies of this process then have it

    return {"tuned": _Session(say, workload, TuningRequest.from_values(request)).run().to_json()}


@dataclass
class _Session:
    """A tuning at work: what its steps share."""

    say: Say
    workload: str | None
    request: TuningRequest

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.ranking = MEMORY if self.request.virtual else SECONDS
        self.lock: Callable[[], Any] = nullcontext
        if self.ranking == SECONDS:
            self.lock = functools.partial(timing_lock, self.request.study, self.progress)

    def progress(self, text: str) -> None:
        self.say({"say": text})

    def run(self) -> TuningResult:
        unchanged = self.record(None)
        facts = unchanged["facts"]
        choices, left_out = choices_for(
            self.request.space, facts, self.request.target_batch,
            on_cuda=self.request.on_cuda, virtual=self.request.virtual,
        )  # fmt: skip
        self.progress(f"{size_of(choices)} configurations to choose from")
        search = self.search(choices, facts, unchanged)
        began = time.monotonic()
        search.run()
        time_in_turn(search, time.monotonic() - began, read_cpu_budget().bytes)
        return self.result(search, left_out)

    def search(self, choices: Choices, facts: dict[str, Any], unchanged: Recorded) -> Search:
        request = self.request
        identity = _identity(self.workload, request, facts, self.ranking, choices)
        study = open_study(request.study, identity, request.sampler, request.pareto, request.seed)
        checker = FitChecker(
            self.record,
            lambda key: study.user_attrs.get(_attribute(key)),
            lambda key, recorded: study.set_user_attr(_attribute(key), recorded),
        )
        checker.add(Configuration.from_values(facts["plain"]), unchanged)
        from_loader = len(choices.get("loader_workers", ())) > 1
        training = TrialTraining(self.workload, request.device, request.malloc, from_loader)
        timed = self.ranking == SECONDS
        return Search(
            study=study,
            choices=choices,
            plain=plain_values(choices, facts["plain"]),
            base={name: facts["plain"][name] for name in ("precision", "optimizer", "compile")},
            samples=request.target_batch,
            fit_checker=checker,
            timer=make_timer(training) if timed else None,
            sampler=request.sampler,
            trials=request.trials or (size_of(choices) if request.sampler == "grid" else DEFAULT_TRIALS),
            until=None if request.timeout is None else self.started + request.timeout,
            seed=request.seed,
            report=lambda text: self.say({"trial": text}),
            turn_timer=make_turn_timer(training, self.progress) if timed and not request.on_cuda else None,
            lock=self.lock,
        )

    def record(self, configuration: Configuration | None) -> Recorded:
        """Record a configuration, or the unchanged workload, in a new process."""
        arguments = {
            "workload": self.workload,
            "values": None if configuration is None else configuration.values(),
            "sizes": _sizes(self.request),
            **self.request.planning_values(),
        }
        with self.lock():
            return self.call("tuning.tasks:record", arguments, configuration, "recording")

    def call(
        self, task: str, arguments: dict[str, Any], configuration: Configuration | None, title: str
    ) -> dict[str, Any]:
        """Run a task in a process with the configuration's allocator settings."""

        def on_message(message: dict[str, Any]) -> None:
            if "say" in message:
                self.progress(f"{title}: {message['say']}")

        env = environment(configuration, self.request.gpu)
        if not self.request.on_cuda:
            env = page_cache.environment(self.request.malloc, env)
        return call(task, arguments, on_message=on_message, env=env, functions=to_hand_on())

    def result(self, search: Search, left_out: list[str]) -> TuningResult:
        trials = read_trials(search.study)
        on_front = pareto_numbers(trials, self.ranking)
        trials = [replace(trial, pareto=trial.number in on_front) for trial in trials]
        if not ranked(trials, self.ranking):
            raise no_winner_error(trials, search.fit_checker.missing_bytes)
        plan, winner, refused = self.confirmed(trials)
        trials = [
            replace(t, state=FAILED, why=refused[t.number], pareto=False) if t.number in refused else t for t in trials
        ]
        if self.request.virtual and winner.configuration["checkpointing"]:
            left_out = [*left_out, "the test that checkpointing keeps the gradient: a virtual GPU computes nothing"]
        how = "timed" if self.ranking == SECONDS else "ranked by memory: a virtual GPU computes nothing"
        return TuningResult(
            plan=with_configuration(plan, winner, self.ranking, tuple(trials), how),
            trials=tuple(trials),
            ranking=self.ranking,
            space=size_of(search.choices),
            notes=tuple(f"left out: {text}" for text in left_out),
            plain=search.plain_number(trials),
            seconds=time.monotonic() - self.started,
        )

    def confirmed(self, trials: list[Trial]) -> tuple[Plan, Trial, dict[int, str]]:
        """Return the best trial with a confirmed plan, and refused ones."""
        refused: dict[int, str] = {}
        while len(refused) < MAX_CONFIRMATIONS:
            left = ranked((trial for trial in trials if trial.number not in refused), self.ranking)
            if not left:
                break
            trial = left[0]  # recomputed: the best of those timed in turn isn't the second of all
            configuration = Configuration.from_values(trial.configuration)
            arguments = {
                "workload": self.workload,
                "values": configuration.values(),
                "max_micro_batch": trial.micro_batch,
                **self.request.planning_values(),
            }
            try:
                found = self.call("tuning.tasks:plan", arguments, configuration, "planning the winner")
            except NotConfirmed as error:
                refused[trial.number] = error.what
            else:
                return Plan.from_json(found["plan"]), trial, refused
        raise NotConfirmed(
            f"The plans of the best {len(refused)} configurations could not be confirmed.",
            next(iter(refused.values())),
            "Tune with more headroom: --headroom 20%.",
        )


def _identity(
    workload: str | None, request: TuningRequest, facts: dict[str, Any], ranking: str, choices: Choices
) -> dict[str, Any]:
    """Return what a study's trials belong to."""
    return {
        "workload": "a function" if workload is None else workload,
        **request.planning_values(),
        **facts["fingerprint"],
        "ranking": ranking,
        "choices": {name: list(options) for name, options in choices.items()},
    }


def _sizes(request: TuningRequest) -> list[int]:
    """Return the micro-batches that recordings must cover."""
    target = request.target_batch
    sizes = [size for size in request.space.micro_batch or micro_batches(target, 1) if isinstance(size, int)]
    split = [-(-target // -(-target // min(size, target))) for size in sizes]
    return sorted({*split, *(size - 1 for size in split if size > 1)})


def environment(configuration: Configuration | None, gpu: str | None) -> dict[str, str] | None:
    """Return the environment to set before loading torch; or None."""
    base = None
    if configuration is not None and configuration.expandable_segments:
        base = {**os.environ, **allocator_settings(os.environ)}
    return planning_environment(gpu, base)


def _attribute(key: str) -> str:
    """Return the study's attribute that holds a recording."""
    return "recording " + hashlib.sha256(key.encode()).hexdigest()[:16]


def read_tuning_result(text: str) -> TuningResult:
    """Read what `TuningResult.to_json` wrote."""
    data = json.loads(text)
    return TuningResult(
        plan=Plan.from_json(json.dumps(data["plan"])),
        trials=tuple(Trial(**trial) for trial in data["trials"]),
        ranking=data["ranking"],
        space=data["space"],
        notes=tuple(data["notes"]),
        plain=data["plain"],
        seconds=data["seconds"],
    )
