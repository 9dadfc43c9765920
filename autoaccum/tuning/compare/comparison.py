"""Plans, then trains every candidate in a process of its own, one after the other. No torch in this process."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...errors import AutoaccumError, UsageError
from ...plan import Plan
from ...planning.environment import versions
from ...processes.child import Say, call
from .candidates import TUNED, Candidate, Comparison, Trained, candidates_for

TUNE_TRIALS = 12


def compare(
    workload: str,
    *,
    target_batch: int,
    device: str = "cpu",
    memory: str | None = None,
    headroom: str | None = None,
    malloc: str = "fixed",
    windows: int = 5,
    tuned: Plan | None = None,
    tune_trials: int = TUNE_TRIALS,
    say: Say = lambda message: None,
) -> Comparison:
    """Compares autoaccum's plan with what people do without one, on their own workload.

    Args:
        workload: A built-in's name, or FILE.py:FUNCTION.
        target_batch: Samples in an optimizer step.
        device: "cpu" or "cuda".
        memory: What each process may use.
        headroom: How much of it to keep free.
        malloc: autoaccum's setting of malloc; the others leave it alone, as a plain script does.
        windows: Windows to time of each; fewer where they take long.
        tuned: A plan that `autoaccum tune` made; left out, tuning is called if it is installed.
        tune_trials: Configurations that it may try; 0 for no tuning.
        say: Called with what is being done.

    Raises:
        UsageError: An argument that can't be used.
        DoesNotFit: Not even the smallest micro-batch fits.
    """
    asked = {"workload": workload, "memory": memory, "headroom": headroom, "device": device, "malloc": malloc}
    _say(say, "planning")
    plan = Plan.from_json(
        call(
            "planning.tasks:plan",
            asked | {"target_batch": target_batch, "max_micro_batch": None, "verify": True, "timing_seconds": 0},
            on_message=say,
        )["plan"]
    )
    left_out: list[str] = []
    if tuned is None:
        tuned, why = _tuned(asked, target_batch, tune_trials, say)
        left_out += [f"{TUNED}: {why}"] if why else []
    else:
        _check_tuned(tuned, plan)
    rows = tuple(_train(each, plan, asked, windows, say) for each in candidates_for(plan, tuned))
    environment = {**plan.fingerprint, **versions(), **plan.environment}
    return Comparison(workload, target_batch, plan, rows, tuple(left_out), windows, environment)


def _say(say: Say, text: str) -> None:
    say({"say": text})


def _tuned(asked: dict[str, Any], target_batch: int, trials: int, say: Say) -> tuple[Plan | None, str]:
    """The tuned plan, or why there is none."""
    if trials == 0:
        return None, "not asked for (--tune-trials 0)"
    if importlib.util.find_spec("autoaccum.tuning") is None:
        return None, "this autoaccum has no tuning; give --tuned plan.json"
    tune: Callable[..., Any] = importlib.import_module("autoaccum.tuning").tune
    _say(say, "tuning")
    started = time.perf_counter()
    try:
        found: Plan = tune(target_batch=target_batch, trials=trials, progress=say, **asked).plan
    except AutoaccumError as error:
        return None, f"tuning failed: {error.what}"
    return replace(found, seconds=time.perf_counter() - started), ""  # all of tuning, not its last step alone


def _check_tuned(tuned: Plan, plan: Plan) -> None:
    if tuned.target_batch != plan.target_batch or tuned.on_cuda != plan.on_cuda:
        raise UsageError(
            f"The tuned plan is for {tuned.target_batch} samples on {tuned.device}; asked for are {plan.target_batch} "
            f"on {plan.device}.",
            "Candidates are compared at one target on one device.",
            f"autoaccum tune --target-batch {plan.target_batch} -o tuned.json",
        )


def _train(candidate: Candidate, plan: Plan, asked: dict[str, Any], windows: int, say: Say) -> Trained:
    """One candidate in a process of its own. That it dies of a lack of memory is an answer too."""
    _say(say, f"training {candidate.name}")
    own = candidate.plan
    known: dict[str, Any] = {"malloc": _malloc(own), "changes_numerics": _changes(own)}
    arguments = {
        "workload": asked["workload"], "limit_bytes": plan.budget.bytes, "windows": windows, "device": asked["device"],
        "target_batch": plan.target_batch, "micro_batch": candidate.micro_batch, "steps": candidate.steps,
        "halves": candidate.halves, "plan": None if own is None else own.to_json(),
    }  # fmt: skip
    try:
        told = call("tuning.compare.trial:run", arguments, on_message=say)
    except AutoaccumError as error:
        ooms = int(type(error).__name__ == "OutOfMemory")
        return Trained(candidate.name, candidate.micro_batch, candidate.steps, 0, ooms=ooms, why=error.what, **known)
    found = Trained(candidate.name, **(told | known | {"window_seconds": tuple(told.get("window_seconds", ()))}))
    return replace(found, search_seconds=own.seconds) if own is not None else found


def _malloc(plan: Plan | None) -> str:
    if plan is None:
        return "default"
    return "" if plan.on_cuda else "default" if plan.mmap_threshold_bytes is None else "fixed"


def _changes(plan: Plan | None) -> str:
    configuration = getattr(plan, "configuration", None) or {}
    return ", ".join(f"{name} {value}" for name, value in configuration.items())
