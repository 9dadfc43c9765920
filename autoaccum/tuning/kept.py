"""A study as optuna keeps it: made or gone on with, its trials written and read, and who may time anything now."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files.private import lock_file, runtime_folder
from .memory import Memory
from .result import FAILED, PRUNED, SECONDS, Trial

if TYPE_CHECKING:
    import optuna

NAME = "autoaccum"
IN_TURN = "timed in turn"  # by a trial's number: its turns' seconds, or why it failed


def tell(study: optuna.Study, trial: optuna.Trial, result: Trial, ranking: str, memory: Memory | None = None) -> None:
    """Writes a trial's result into the study: pruned, failed, or its value."""
    from dataclasses import asdict

    from optuna.trial import TrialState

    trial.set_user_attr("result", asdict(result))
    if result.state == PRUNED:
        trial.set_user_attr("pruned because", result.why)
        study.tell(trial, state=TrialState.PRUNED)
    elif result.state == FAILED:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, list(objectives(result, ranking)[: len(study.directions)]))


def objectives(result: Trial, ranking: str) -> tuple[float, float]:
    """What optuna minimizes: seconds, or steps and within them bytes; and bytes."""
    assert result.accumulation_steps is not None and result.peak_bytes is not None
    peak = float(result.peak_bytes)
    if ranking == SECONDS:
        return result.step_seconds or 0.0, peak
    return result.accumulation_steps + peak / 2**60, peak  # no peak is worth a step


def read_trials(study: optuna.Study, *, by_itself: bool = False) -> list[Trial]:
    """The study's trials, in order, as far as they are done; their times in turn, or as each was timed by itself."""
    turns = {} if by_itself else turns_kept(study)
    found = (trial.user_attrs.get("result") for trial in study.get_trials(deepcopy=False))
    return [_with_turns(Trial(**result), turns.get(str(result["number"]))) for result in found if result is not None]


def _with_turns(trial: Trial, turns: dict[str, Any] | None) -> Trial:
    """A trial with its time in turn, in place of that by itself."""
    if turns is None:
        return trial
    if turns["why"]:
        return replace(trial, state=FAILED, why=f"in turn with others: {turns['why']}")
    return replace(trial, step_seconds=statistics.median(turns["seconds"]), turns=len(turns["seconds"]))


def turns_kept(study: optuna.Study) -> dict[str, Any]:
    """What `keep_turns` kept, by trials' numbers."""
    kept: dict[str, Any] = study.user_attrs.get(IN_TURN, {})
    return kept


def keep_turns(study: optuna.Study, seconds: Mapping[int, list[float]], failed: Mapping[int, str]) -> None:
    """Keeps what contenders took in turn, and why any failed; earlier turns, of others' company, are forgotten."""
    kept = {str(number): {"seconds": each, "why": ""} for number, each in seconds.items()}
    kept |= {str(number): {"seconds": [], "why": why} for number, why in failed.items()}
    study.set_user_attr(IN_TURN, kept)


def open_study(file: str | None, identity: dict[str, Any], sampler: str, pareto: bool, seed: int) -> optuna.Study:
    """Makes a study, or goes on with the one in a file.

    Raises:
        UsageError: The file can't be used, or its study is of something else.
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
            storage=storage, study_name=NAME, sampler=chosen, directions=directions, load_if_exists=True
        )
    except Exception as error:  # whatever sqlalchemy and sqlite say of a file that is something else
        first = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"The study {file!r} can't be used ({type(error).__name__}: {first}).",
            "It is no SQLite file of optuna's, or can't be written.",
            "Name another file: --study FILE.db",
        ) from None
    _check_identity(study, file, {**identity, "objectives": len(directions)})
    _drop_dead(study)
    return study


def _check_identity(study: optuna.Study, file: str | None, identity: dict[str, Any]) -> None:
    there = study.user_attrs.get("made for")
    if there is None:
        study.set_user_attr("made for", identity)
        return
    here = json.loads(json.dumps(identity))
    differing = [name for name in here if there.get(name) != here[name]]
    if len(study.directions) != here["objectives"]:
        differing.append("objectives")
    if differing:
        told = "; ".join(f"{name}: {there.get(name)} there, {here[name]} here" for name in dict.fromkeys(differing))
        raise UsageError(
            f"The study {file!r} was made for something else ({told}).",
            "Its trials say nothing about this.",
            "Name another --study, or ask for what it was made for.",
        )


def _drop_dead(study: optuna.Study) -> None:
    """Trials whose process was killed are told as interrupted, so that they are tried again."""
    import optuna

    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        host, _, process = trial.user_attrs.get("process", ":").partition(":")
        if host == socket.gethostname() and not (process.isdecimal() and Path(f"/proc/{process}").exists()):
            with contextlib.suppress(Exception):  # another worker may be doing the same
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


@contextlib.contextmanager
def alone(study_file: str | None, waiting: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """While it is entered, no other study on this machine that has the same file times anything.

    A study in memory takes a lock that all such studies of this user share.

    Args:
        study_file: The study's file; None for one in memory.
        waiting: Told where another one holds it.
    """
    path = Path(f"{study_file}.lock") if study_file else runtime_folder() / "autoaccum.lock"
    with lock_file(path, 0o666 if study_file else 0o600) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting(f"waiting for another tuning, which holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
