"""One tuning from beginning to end, in a child process: facts, choices, the search, the winner's plan."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

from ..configuration import Configuration, allocator_settings
from ..devices.cpu.budget import read_cpu_budget
from ..devices.virtual import planning_environment
from ..errors import NotConfirmed
from ..plan import Plan
from ..processes.child import Say, call
from ..processes.function_pipe import to_hand_on
from .finals import time_in_turn
from .kept import alone, open_study, read_trials
from .memory import Memory, Recorded
from .result import MEMORY, SECONDS, Trial, TuningResult, ranked, with_configuration
from .space import SearchSpace, choices_for, plain_values, size_of
from .study import Search, nothing_fits, pareto_numbers
from .timers import Training, timer, turns

TRIALS = 40  # at most, where no number was given
CONTENDERS = 3  # winners whose plan is tried, where the first one's isn't confirmed


def tune(
    *,
    say: Say,
    workload: str | None,
    space: dict[str, Any],
    extra_choices: dict[str, list[Any]],
    trials: int | None,
    timeout: float | None,
    study: str | None,
    sampler: str,
    pareto: bool,
    workers: int,
    seed: int,
    **asked: Any,
) -> dict[str, Any]:
    """Tunes; the arguments are those of `tuning.tune`, as JSON.

    Returns:
        `TuningResult` as JSON.
    """
    say({"say": "loading torch and the workload"})
    import torch  # noqa: F401  copies of this process then have it

    started = time.monotonic()
    wanted = SearchSpace(
        **cast(Any, {name: None if choices is None else tuple(choices) for name, choices in space.items()}),
        extra={name: (tuple(choices), _unused) for name, choices in extra_choices.items()},
    )
    on_cuda, virtual = asked["device"] == "cuda", asked["gpu"] is not None
    ranking = MEMORY if virtual else SECONDS
    lock = functools.partial(alone, study, lambda text: say({"say": text})) if ranking == SECONDS else nullcontext
    sizes = _sizes(wanted, asked["target_batch"])
    told = functools.partial(_record, say, workload, sizes, asked, lock)

    as_it_is = told(None)
    facts = as_it_is["facts"]
    choices, left_out = choices_for(wanted, facts, asked["target_batch"], on_cuda=on_cuda, virtual=virtual)
    say({"say": f"{size_of(choices)} configurations to choose from"})
    found = open_study(study, _identity(workload, asked, facts, ranking, choices), sampler, pareto, seed)
    memory = Memory(told, _kept(found), _keep(found))
    memory.add(Configuration.from_values(facts["plain"]), as_it_is)
    base = {name: value for name, value in facts["plain"].items() if name in ("precision", "optimizer", "compile")}
    from_loader = len(choices.get("loader_workers", ())) > 1
    training = Training(workload, asked["device"], asked["malloc"], from_loader)
    search = Search(
        study=found,
        choices=choices,
        plain=plain_values(choices, facts["plain"]),
        base=base,
        samples=asked["target_batch"],
        memory=memory,
        timer=timer(training) if ranking == SECONDS else None,
        sampler=sampler,
        trials=size_of(choices) if trials is None and sampler == "grid" else trials or TRIALS,
        until=None if timeout is None else started + timeout,
        workers=workers,
        seed=seed,
        say=lambda text: say({"trial": text}),
        turns=turns(training, lambda text: say({"say": text})) if ranking == SECONDS and not on_cuda else None,
        lock=lock,
    )
    began = time.monotonic()
    search.run()
    if search.turns is not None:
        time_in_turn(search, time.monotonic() - began, read_cpu_budget().bytes)
    return {"tuned": _finished(search, say, workload, asked, left_out, started).to_json()}


def _identity(
    workload: str | None, asked: dict[str, Any], facts: dict[str, Any], ranking: str, choices: dict[str, Any]
) -> dict[str, Any]:
    """What a study is of: one of something else has no trials for this."""
    return {
        "workload": "a function" if workload is None else workload,
        **{name: asked[name] for name in ("target_batch", "memory", "headroom", "malloc", "device", "gpu")},
        **facts["fingerprint"],
        "ranking": ranking,
        "choices": {name: list(options) for name, options in choices.items()},
    }


def _unused(workload: Any, choice: Any) -> Any:
    return workload


def _sizes(space: SearchSpace, target_batch: int) -> list[int]:
    """Micro-batches that recordings have to tell of: those of every balanced split that may be asked for."""
    from .space import micro_batches

    sizes = [size for size in space.micro_batch or micro_batches(target_batch, 1) if isinstance(size, int)]
    split = [-(-target_batch // -(-target_batch // min(size, target_batch))) for size in sizes]
    return sorted({*split, *(size - 1 for size in split if size > 1)})


def _record(
    say: Say,
    workload: str | None,
    sizes: list[int],
    asked: dict[str, Any],
    lock: Callable[[], Any],
    configuration: Configuration | None,
) -> Recorded:
    """Records in a process of its own, with the allocator's settings in its environment."""
    values = None if configuration is None else configuration.values()
    arguments = {"workload": workload, "values": values, "sizes": sizes, **asked}
    env = environment(configuration, asked["gpu"])
    with lock():
        said = _said(say, "recording")
        return call("tuning.tasks:record", arguments, on_message=said, env=env, functions=to_hand_on())


def environment(configuration: Configuration | None, gpu: str | None) -> dict[str, str] | None:
    """What the configuration needs to be set before torch is loaded; None for nothing."""
    base = None
    if configuration is not None and configuration.expandable_segments:
        base = {**os.environ, **allocator_settings(os.environ)}
    return planning_environment(gpu, base)


def _said(say: Say, what: str) -> Say:
    return lambda message: say({"say": f"{what}: {message['say']}"}) if "say" in message else None


def _key(key: str) -> str:
    return "recording " + hashlib.sha256(key.encode()).hexdigest()[:16]


def _kept(study: Any) -> Callable[[str], Recorded | None]:
    return lambda key: study.user_attrs.get(_key(key))


def _keep(study: Any) -> Callable[[str, Recorded], None]:
    return lambda key, recorded: study.set_user_attr(_key(key), recorded)


def _finished(
    search: Search,
    say: Say,
    workload: str | None,
    asked: dict[str, Any],
    left_out: list[str],
    started: float,
) -> TuningResult:
    from dataclasses import replace

    trials = read_trials(search.study)
    on_front = pareto_numbers(trials, search.ranking)
    trials = [replace(trial, pareto=trial.number in on_front) for trial in trials]
    if not ranked(trials, search.ranking):
        raise nothing_fits(trials, search.memory.missing_bytes)
    plan, winner, refused = _confirmed(search.ranking, trials, say, workload, asked)
    trials = [
        replace(t, state="failed", why=refused[t.number], pareto=False) if t.number in refused else t for t in trials
    ]
    if asked["gpu"] is not None and winner.configuration["checkpointing"]:
        left_out = [*left_out, "the test that checkpointing leaves the gradient as it is: nothing is computed here"]
    windows = "timed" if search.ranking == SECONDS else "ranked by memory: nothing is computed on a virtual GPU"
    plan = with_configuration(plan, winner, search.ranking, tuple(trials), windows)
    return TuningResult(
        plan=plan,
        trials=tuple(trials),
        ranking=search.ranking,
        space=size_of(search.choices),
        notes=tuple(f"left out: {text}" for text in left_out),
        plain=search.plain_number(trials),
        seconds=time.monotonic() - started,
    )


def _confirmed(
    ranking: str, trials: list[Trial], say: Say, workload: str | None, asked: dict[str, Any]
) -> tuple[Plan, Trial, dict[int, str]]:
    """The best trial whose plan is confirmed by a real window; and what spoke against those before it."""
    refused: dict[int, str] = {}
    while len(refused) < CONTENDERS and (left := ranked((t for t in trials if t.number not in refused), ranking)):
        trial = left[0]  # who is the best of those timed in turn isn't the second of all
        configuration = Configuration.from_values(trial.configuration)
        arguments = {
            "workload": workload, "values": configuration.values(),
            "max_micro_batch": trial.micro_batch, **asked,
        }  # fmt: skip
        env, said = environment(configuration, asked["gpu"]), _said(say, "planning the winner")
        try:
            found = call("tuning.tasks:plan", arguments, on_message=said, env=env, functions=to_hand_on())
        except NotConfirmed as error:
            refused[trial.number] = error.what
        else:
            return Plan.from_json(found["plan"]), trial, refused
    raise NotConfirmed(
        f"The plans of the best {len(refused)} configurations could not be confirmed.",
        next(iter(refused.values())),
        "Tune with more headroom: --headroom 20%.",
    )


def read_tuning_result(text: str) -> TuningResult:
    """What a session's JSON says."""
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
