"""Search configurations at a fixed effective batch.

request.py     what a tuning is asked for            space.py          the choices, narrowed to a workload
apply.py       configure a workload                  checkpointing.py  checkpoint repeated blocks
fit_check.py   whether a configuration fits          timing.py         seconds per optimizer step
search.py      which configuration to try next       study.py          trials, stored by optuna
finals.py      the leaders timed in turn             session.py        the whole run, in a child process
tasks.py       recordings and plans, in processes    result.py         the plan, the trials, the table
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..configuration import Configuration
from ..devices.cpu import page_cache
from ..errors import UsageError
from .request import TuningRequest
from .result import Trial, TuningResult
from .space import SearchSpace

if TYPE_CHECKING:
    from ..workload import Workload

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
    malloc: str = "cached",
    study: str | os.PathLike[str] | None = None,
    sampler: str = "tpe",
    pareto: bool = False,
    seed: int = 0,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> TuningResult:
    """Find the configuration with the fastest optimizer step at a batch.

    Everything runs in child processes. Configurations that cannot fit are pruned from recordings, without running.

    Args:
        workload: A built-in's name, FILE.py:FUNCTION, or a function without arguments that returns a Workload.
        target_batch: Samples in an optimizer step.
        space: The choices to search; None for `SearchSpace()`.
        trials: The most configurations to try; None for 40, or all of them with sampler="grid".
        timeout: Seconds after which no further trial starts.
        device: "cpu" or "cuda"; None for "cuda" with `gpu`, else "cpu".
        gpu: Name of a GPU to rank for by memory, on a virtual GPU, which computes nothing and has no times.
        memory: Memory limit of the process, such as "2GiB"; None for what the machine has free.
        headroom: How much of the memory to keep free.
        malloc: As for `fit_plan`.
        study: A SQLite file that stores the trials, so that an interrupted tuning continues.
        sampler: "tpe", "random" or "grid" (see `request.TuningRequest`).
        pareto: Search for the Pareto front of time and peak memory, and mark it.
        seed: Seed of the sampler.
        progress: Called with {"say": text} for each step, and {"trial": text} for each finished trial.

    Returns:
        The winner's plan, including its configuration, and all trials.

    Raises:
        UsageError: An argument is invalid, or the study was created for something else.
        DoesNotFit: No configuration fits.
    """
    device = device or ("cpu" if gpu is None else "cuda")
    file = None if study is None else os.fspath(study)
    source, function = _source_and_function(workload)
    request = TuningRequest(
        target_batch, space or SearchSpace(), trials, timeout, device, gpu, memory, headroom, malloc, file, sampler,
        pareto, seed,
    )  # fmt: skip
    arguments, env = {"workload": source, "request": request.to_values()}, page_cache.environment_on(device, malloc)
    from ..processes.child import call  # imports torch, which takes seconds: not before the arguments are read
    from .session import read_tuning_result

    return read_tuning_result(
        call("tuning.session:tune", arguments, on_message=progress, env=env, functions=function)["tuned"]
    )


def _source_and_function(workload: str | Callable[[], Workload]) -> tuple[str | None, bytes]:
    """Return the workload's source, or None and the pickled function."""
    from ..processes.function_pipe import pickled
    from ..processes.workload_source import check_source

    source = workload if isinstance(workload, str) else _source_of(workload)
    if source is not None:
        check_source(source)
        return source, b""
    assert callable(workload)
    return None, pickled(workload)


def _source_of(function: Any) -> str | None:
    """Return FILE.py:FUNCTION for the running script's function; else None."""
    if not callable(function):
        raise UsageError(
            f"tune was given {type(function).__name__}, neither FILE.py:FUNCTION nor a function that makes a workload.",
            "Trials run in other processes, and each of them makes the workload anew.",
            "Call tune(make_workload, target_batch=512), where make_workload() returns the Workload.",
        )
    name, file = getattr(function, "__qualname__", ""), getattr(sys.modules["__main__"], "__file__", None)
    if getattr(function, "__module__", None) != "__main__":
        return None
    if file is None or not name.isidentifier():
        raise UsageError(
            f"Another process cannot find the workload's function {name or function!r}.",
            "Trials call it in other processes, so that this process stays unchanged.",
            "Put it into a file: tune('mine.py:workload', target_batch=512).",
        )
    return f"{file}:{name}"
