"""Search configurations at a fixed effective batch.

    configuration.py  what is chosen beside the split          space.py    what is chosen from
    apply.py          a workload as a configuration says       blocks.py   checkpointing of repeated blocks
    memory.py         what fits, told from recordings          measure.py  seconds per optimizer step
    study.py          what to try next                         kept.py     the study, kept by optuna
    finals.py         those that lead, timed in turn           turns.py    taking turns
    timers.py         what is timed, and how                   session.py  all of it, in a child process
    result.py         the plan, the trials, the table

Nothing here is loaded before it is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bounds import MOST_SEED, check_count, check_samples, check_seconds
from ..configuration import Configuration
from ..errors import UsageError
from ..units import check_memory
from .result import Trial, TuningResult
from .space import SearchSpace

if TYPE_CHECKING:
    from ..workload import Workload

_SQLITE = b"SQLite format 3\0"  # how each begins (sqlite.org/fileformat.html)
_OTHER_STUDY = "Name another file: --study FILE.db"

__all__ = ["Configuration", "SearchSpace", "Trial", "TuningResult", "tune"]


def tune(
    workload: str | Callable[[], Workload],
    *,
    target_batch: int,
    space: SearchSpace | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    device: str | None = None,
    gpu: str | None = None,
    memory: str | int | None = None,
    headroom: str | int | None = None,
    malloc: str = "fixed",
    study: str | os.PathLike[str] | None = None,
    sampler: str = "tpe",
    pareto: bool = False,
    workers: int = 1,
    seed: int = 0,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> TuningResult:
    """Searches for the configuration whose optimizer step takes the least time at a fixed effective batch.

    Everything runs in child processes: nothing of the caller's is changed. What can't fit is told from recordings
    and not run. On a CPU those that lead and the plain one are timed once more, in turn, where memory and time allow
    it, and the winner is one of these. On a virtual GPU nothing is computed, so configurations are ranked by memory:
    the fewest steps, then the lowest peak.

    Args:
        workload: A built-in's name, FILE.py:FUNCTION, or a function without arguments that returns a Workload.
        target_batch: Samples in an optimizer step.
        space: What is searched; left out: `SearchSpace()`.
        trials: How many configurations are tried at most; those answered from the study don't count. Left out: 40, or
            all with sampler="grid".
        timeout: Seconds after which no further trial begins.
        device: "cpu" or "cuda"; left out: the CPU, or CUDA with `gpu`.
        gpu: The name of a GPU that a virtual one stands in for.
        memory: What the whole process may use. Left out: what the machine has free.
        headroom: How much of that to keep free.
        malloc: As for `fit_plan`.
        study: A SQLite file that keeps the trials: an interrupted tuning goes on where it was. Left out: none.
        sampler: "tpe": the plain configuration, then what differs from the best so far in one choice, then optuna's
            tree-structured Parzen estimator; "random"; or "grid", all of them in order.
        pareto: Search for all that no other beats in both, time and peak memory, and mark them.
        workers: Trials at a time, where memory alone is ranked.
        seed: For what is drawn.
        progress: Called with what is being done: {"say": text}, and {"trial": text} for each trial.

    Returns:
        The winner's plan, with its configuration in it, and all trials.

    Raises:
        UsageError: An argument that can't be used, or a study that was made for something else.
        DoesNotFit: No configuration fits.
    """
    from ..processes.child import call
    from ..processes.function_pipe import Functions, pickled
    from ..processes.workload_source import check_source
    from .session import read_tuning_result

    space = space or SearchSpace()
    source = workload if isinstance(workload, str) else _source_of(workload)
    _check(target_batch, trials, timeout, device, gpu, malloc, study, sampler, workers, seed, memory, headroom)
    if source is not None:
        check_source(source)
    function = workload if source is None and callable(workload) else None
    functions = pickled(Functions(function, {name: pair[1] for name, pair in space.extra.items()}))
    asked = {
        "workload": source,
        "target_batch": target_batch,
        "space": space.to_values(),
        "extra_choices": {name: list(pair[0]) for name, pair in space.extra.items()},
        "trials": trials,
        "timeout": timeout,
        "device": "cuda" if gpu is not None else device or "cpu",
        "gpu": gpu,
        "memory": memory,
        "headroom": headroom,
        "malloc": malloc,
        "study": None if study is None else os.fspath(study),
        "sampler": sampler,
        "pareto": pareto,
        "workers": workers,
        "seed": seed,
    }
    return read_tuning_result(call("tuning.session:tune", asked, on_message=progress, functions=functions)["tuned"])


def _source_of(function: Any) -> str | None:
    """FILE.py:FUNCTION where it is of the script that runs; None where the function itself is handed over."""
    if not callable(function):
        raise UsageError(
            f"tune was given {type(function).__name__}, neither FILE.py:FUNCTION nor a function that makes a workload.",
            "Trials run in other processes, and each makes the workload anew.",
            "tune(make_workload, target_batch=512), where make_workload() returns the Workload.",
        )
    name, file = getattr(function, "__qualname__", ""), getattr(sys.modules["__main__"], "__file__", None)
    if getattr(function, "__module__", None) != "__main__":
        return None
    if file is None or not name.isidentifier():
        raise UsageError(
            f"The workload's function {name or function!r} can't be found by another process.",
            "It is called there, so that nothing of yours is changed here.",
            "Write it to a file: tune('mine.py:workload', target_batch=512).",
        )
    return f"{file}:{name}"


def _check(
    target_batch: Any,
    trials: Any,
    timeout: Any,
    device: str | None,
    gpu: str | None,
    malloc: str,
    study: Any,
    sampler: str,
    workers: Any,
    seed: Any,
    memory: str | int | None,
    headroom: str | int | None,
) -> None:
    """Refuses what can be seen to be wrong before a process is started."""
    from .study import SAMPLERS

    if target_batch is None:
        raise UsageError("There is no target to tune for.", hint="Give target_batch=512, say.")
    check_samples("target_batch", target_batch)
    check_count("trials", trials, example=20)
    check_count("workers", workers)
    check_count("seed", seed, least=0, most=MOST_SEED)
    check_seconds("timeout", timeout, zero=False)
    check_memory(memory, headroom)
    if device not in (None, "cpu", "cuda") or (gpu is not None and device == "cpu"):
        raise UsageError(f"device {device!r} can't be.", hint="Use 'cpu', 'cuda', or gpu=NAME alone.")
    if malloc not in ("fixed", "default"):
        raise UsageError(f"malloc {malloc!r} is not known.", hint="Use 'fixed' or 'default'.")
    if sampler not in SAMPLERS:
        raise UsageError(f"The sampler {sampler!r} is not known.", hint=f"Use one of: {', '.join(SAMPLERS)}.")
    if workers > 1 and gpu is None:
        raise UsageError(
            f"{workers} trials at a time would be timed while they disturb each other.",
            "Only where memory alone is ranked, on a virtual GPU (--gpu), can there be several.",
            "Leave --workers out.",
        )
    if study is not None:
        _check_study(Path(study))


def _check_study(file: Path) -> None:
    """Refuses what can be no study's file; an empty one, or none, can become it."""
    if not file.resolve().parent.is_dir():
        raise UsageError(f"There is no folder {file.parent}.", hint="Make it first, or name another file.")
    try:
        if file.is_dir():
            raise UsageError(f"The study {str(file)!r} is a folder.", "A study is one SQLite file.", _OTHER_STUDY)
        if not file.exists():
            return
        with file.open("r+b") as opened:
            start = opened.read(len(_SQLITE)) if file.is_file() else b"?"
    except OSError as error:
        why = f"The system says: {error.strerror}."
        raise UsageError(f"The study {str(file)!r} can't be written.", why, _OTHER_STUDY) from None
    if start not in (b"", _SQLITE):
        raise UsageError(f"The study {str(file)!r} can't be used.", "It is no SQLite file.", _OTHER_STUDY)
