"""Store trials in an optuna study, and hold the timing lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files.private import lock_file, runtime_folder
from .result import FAILED, PRUNED, SECONDS, Trial

if TYPE_CHECKING:
    import optuna

STUDY_NAME = "autoaccum"
IN_TURN = "timed in turn"  # user attribute: by trial number, the seconds of its turns, or why it failed
IDENTITY = "made for"  # user attribute: the workload, device and choices that the trials belong to


def store_trial(study: optuna.Study, trial: optuna.Trial, result: Trial, ranking: str) -> None:
    """Write a trial's result into the study: pruned, failed, or its objectives."""
    from optuna.trial import TrialState

    trial.set_user_attr("result", asdict(result))
    if result.state == PRUNED:
        trial.set_user_attr("pruned because", result.why)
        study.tell(trial, state=TrialState.PRUNED)
    elif result.state == FAILED:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, list(_objectives(result, ranking)[: len(study.directions)]))


def _objectives(result: Trial, ranking: str) -> tuple[float, float]:
    """Return what optuna minimizes: seconds or steps; then bytes."""
    assert result.accumulation_steps is not None and result.peak_bytes is not None
    peak = float(result.peak_bytes)
    if ranking == SECONDS:
        return result.step_seconds or 0.0, peak
    return result.accumulation_steps + peak / 2**60, peak  # no peak outweighs a step


def read_trials(study: optuna.Study, *, timed_alone: bool = False) -> list[Trial]:
    """Return the study's finished trials in order.

    Args:
        study: The study.
        timed_alone: Whether to return each trial's time from its own run, where it was timed in turn too.
    """
    turns = {} if timed_alone else stored_turns(study)
    found = (trial.user_attrs.get("result") for trial in study.get_trials(deepcopy=False))
    return [_with_turns(Trial(**result), turns.get(str(result["number"]))) for result in found if result is not None]


def _with_turns(trial: Trial, turns: dict[str, Any] | None) -> Trial:
    """Replace a trial's time by that of its turns."""
    if turns is None:
        return trial
    if turns["why"]:
        return replace(trial, state=FAILED, why=f"in turn with others: {turns['why']}")
    return replace(trial, step_seconds=statistics.median(turns["seconds"]), turns=len(turns["seconds"]))


def stored_turns(study: optuna.Study) -> dict[str, Any]:
    """Return what `store_turns` wrote, by trial number."""
    stored: dict[str, Any] = study.user_attrs.get(IN_TURN, {})
    return stored


def store_turns(study: optuna.Study, seconds: Mapping[int, list[float]], failed: Mapping[int, str]) -> None:
    """Write the contenders' seconds by turn, replacing earlier turns."""
    stored = {str(number): {"seconds": each, "why": ""} for number, each in seconds.items()}
    stored |= {str(number): {"seconds": [], "why": why} for number, why in failed.items()}
    study.set_user_attr(IN_TURN, stored)


def open_study(file: str | None, identity: dict[str, Any], sampler: str, pareto: bool, seed: int) -> optuna.Study:
    """Create a study, or continue the one in a file.

    Args:
        file: A SQLite file; None keeps the study in memory.
        identity: What the trials belong to, as JSON values.
        sampler: "random", or any other name for optuna's tree-structured Parzen estimator.
        pareto: Whether there are two objectives.
        seed: Seed of the sampler.

    Raises:
        UsageError: The file can't be used, or its study belongs to something else.
    """
    import optuna
    from optuna.samplers import RandomSampler, TPESampler

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage: Any = None
    directions: list[Any] = ["minimize"] * (1 + pareto)
    chosen = RandomSampler(seed) if sampler == "random" else TPESampler(seed=seed, constant_liar=True)
    try:
        if file is not None:
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{Path(file).resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
        study = optuna.create_study(
            storage=storage, study_name=STUDY_NAME, sampler=chosen, directions=directions, load_if_exists=True
        )
    except Exception as error:  # sqlalchemy and sqlite raise many types for a file of another kind
        first = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"The study {file!r} can't be used ({type(error).__name__}: {first}).",
            "It is not a SQLite file that optuna wrote, or it can't be written.",
            "Name another file: --study FILE.db",
        ) from None
    _check_identity(study, file, {**identity, "objectives": len(directions)})
    _fail_abandoned(study)
    return study


def _check_identity(study: optuna.Study, file: str | None, identity: dict[str, Any]) -> None:
    stored = study.user_attrs.get(IDENTITY)
    if stored is None:
        study.set_user_attr(IDENTITY, identity)
        return
    wanted = json.loads(json.dumps(identity))
    differing = [name for name in wanted if stored.get(name) != wanted[name]]
    if len(study.directions) != wanted["objectives"]:
        differing.append("objectives")
    if differing:
        parts = (f"{name}: {stored.get(name)} there, {wanted[name]} here" for name in dict.fromkeys(differing))
        raise UsageError(
            f"The study {file!r} was made for something else ({'; '.join(parts)}).",
            "Its trials do not apply here.",
            "Name another --study, or repeat the options that it was made with.",
        )


def _fail_abandoned(study: optuna.Study) -> None:
    """Fail running trials of killed processes, to try them again."""
    import optuna

    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        host, _, process = trial.user_attrs.get("process", ":").partition(":")
        if host == socket.gethostname() and not (process.isdecimal() and Path(f"/proc/{process}").exists()):
            with contextlib.suppress(Exception):  # another process may do the same to the same study
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


@contextlib.contextmanager
def timing_lock(study_file: str | None, on_wait: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Keep other tunings on this machine from timing anything until it exits.

    Tunings with the same study file exclude each other; so do all of this user's without a file.

    Args:
        study_file: The study's file; None for one in memory.
        on_wait: Called with a message if another tuning holds the lock.
    """
    path = Path(f"{study_file}.lock") if study_file else runtime_folder() / "autoaccum.lock"
    with lock_file(path, 0o666 if study_file else 0o600) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait(f"waiting for another tuning, which holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
