"""Plan, then train every candidate in a new process."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from ...devices.cpu import page_cache
from ...errors import AutoaccumError, UsageError
from ...plan import Plan
from ...planning.environment import versions
from ...planning.request import PlanRequest
from ...processes.child import Say, call
from .. import tune
from ..request import refuse_groups
from .candidates import TUNED, Candidate, Comparison, Trained, candidates_for

DEFAULT_TUNE_TRIALS = 12


def compare(
    workload: str,
    *,
    target_batch: int,
    device: str = "cpu",
    memory: str | None = None,
    headroom: str | None = None,
    malloc: str = "cached",
    windows: int = 5,
    tuned: Plan | None = None,
    tune_trials: int = DEFAULT_TUNE_TRIALS,
    say: Say = lambda message: None,
) -> Comparison:
    """Compare autoaccum's plan with common alternatives on a user's workload.

    Args:
        workload: A built-in's name, or FILE.py:FUNCTION.
        target_batch: Samples in an optimizer step.
        device: "cpu" or "cuda".
        memory: Memory limit of each process, such as "2GiB".
        headroom: How much of it to keep free.
        malloc: The plan's malloc setting; the other candidates leave malloc alone, as a plain script does.
        windows: The most windows to time of each candidate.
        tuned: A plan from `autoaccum tune`; None to tune now.
        tune_trials: The most configurations to tune with; 0 leaves the tuned plan out.
        say: Called with progress.

    Raises:
        UsageError: An argument is invalid.
        DoesNotFit: Not even the smallest micro-batch fits.
    """
    asked = {"workload": workload, "memory": memory, "headroom": headroom, "device": device, "malloc": malloc}
    request = PlanRequest(
        target_batch=target_batch, budget=memory, headroom=headroom, malloc=malloc, timing_seconds=0.0,
        train_in_new_process=True,
    )  # fmt: skip
    _say(say, "planning")
    plan = Plan.from_json(
        call(
            "planning.tasks:plan",
            {"workload": workload, "request": asdict(request), "device": device},
            on_message=say,
            env=page_cache.environment_on(device, malloc),
        )["plan"]
    )
    refuse_groups(plan.request.samples_per_group, "bench")
    left_out: list[str] = []
    if tuned is None:
        tuned, why = _tuned(asked, target_batch, tune_trials, say)
        left_out += [f"{TUNED}: {why}"] if why else []
    else:
        _check_tuned(tuned, plan)
    rows = tuple(_train(each, plan, asked, windows, say) for each in candidates_for(plan, tuned))
    environment = {**plan.provenance.fingerprint, **versions(), **plan.provenance.environment}
    return Comparison(workload, target_batch, plan, rows, tuple(left_out), windows, environment)


def _say(say: Say, text: str) -> None:
    say({"say": text})


def _tuned(asked: dict[str, Any], target_batch: int, trials: int, say: Say) -> tuple[Plan | None, str]:
    """Return the tuned plan, or why there is none."""
    if trials == 0:
        return None, "not requested (--tune-trials 0)"
    _say(say, "tuning")
    started = time.perf_counter()
    try:
        found = tune(target_batch=target_batch, trials=trials, progress=say, **asked).plan
    except AutoaccumError as error:
        return None, f"tuning failed: {error.what}"
    seconds = time.perf_counter() - started  # of the whole tuning, not of the last plan alone
    return replace(found, provenance=replace(found.provenance, planning_seconds=seconds)), ""


def _check_tuned(tuned: Plan, plan: Plan) -> None:
    if tuned.target_batch != plan.target_batch or tuned.on_cuda != plan.on_cuda:
        raise UsageError(
            f"The tuned plan is for {tuned.target_batch} samples on {tuned.device.name}, not for {plan.target_batch} "
            f"on {plan.device.name}.",
            "Candidates are compared at one target on one device.",
            f"autoaccum tune --target-batch {plan.target_batch} -o tuned.json",
        )


def _train(candidate: Candidate, plan: Plan, asked: dict[str, Any], windows: int, say: Say) -> Trained:
    """Train a candidate in a new process; OOM is a result."""
    _say(say, f"training {candidate.name}")
    own = candidate.plan
    known: dict[str, Any] = {"malloc": _malloc(own), "changes_numerics": _changes(own)}
    arguments = {
        "workload": asked["workload"], "limit_bytes": plan.budget_bytes, "windows": windows, "device": asked["device"],
        "target_batch": plan.target_batch, "micro_batch": candidate.micro_batch, "steps": candidate.steps,
        "halves": candidate.halves, "plan": None if own is None else own.to_json(),
    }  # fmt: skip
    try:
        env = page_cache.environment(own.device.malloc) if own is not None else None
        values = call("tuning.compare.trial:train_candidate", arguments, on_message=say, env=env)
    except AutoaccumError as error:
        ooms = int(type(error).__name__ == "OutOfMemory")
        return Trained(candidate.name, candidate.micro_batch, candidate.steps, 0, ooms=ooms, why=error.what, **known)
    found = Trained(candidate.name, **(values | known | {"window_seconds": tuple(values.get("window_seconds", ()))}))
    return replace(found, search_seconds=own.provenance.planning_seconds) if own is not None else found


def _malloc(plan: Plan | None) -> str:
    if plan is None:
        return page_cache.DEFAULT
    return plan.device.malloc


def _changes(plan: Plan | None) -> str:
    configuration = plan.schedule.configuration if plan is not None else {}
    return ", ".join(f"{name} {value}" for name, value in configuration.items())
