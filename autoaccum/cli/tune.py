"""Implement `autoaccum tune`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..devices.cpu import page_cache
from ..errors import UsageError
from ..files.escape import one_line
from ..files.whole import check_output
from ..processes.examples import BUILT_IN, DEFAULT
from .completion import gpus, workloads
from .flags import in_flags
from .terminal import keep_plan

if TYPE_CHECKING:
    from ..processes.child import Say
    from ..tuning import TuningResult


def tune(
    target_batch: int = typer.Option(None, help="Samples in an optimizer step."),
    workload: str = typer.Option(
        DEFAULT, help=f"FILE.py:FUNCTION, or one of: {', '.join(BUILT_IN)}.", autocompletion=workloads
    ),
    trials: int = typer.Option(None, help="Configurations to try at most. Left out: 40, or all with --sampler grid."),
    timeout: float = typer.Option(None, help="Seconds after which no further trial starts."),
    vary: list[str] = typer.Option([], help="NAME=A,B: the choices for one part, like precision=fp32,bf16."),
    device: str = typer.Option(None, help="cpu, or cuda for this machine's GPU. Left out: cpu, or cuda with --gpu."),
    gpu: str = typer.Option(
        None, help="Rank by memory for a GPU this machine lacks (doctor --gpus lists them).", autocompletion=gpus
    ),
    memory: str = typer.Option(None, help="Memory limit of the process, like 2GiB. Left out: all free memory."),
    headroom: str = typer.Option(None, help="Part of it to keep free, like 500MiB or 5%."),
    malloc: str = typer.Option(page_cache.CACHED, help=page_cache.HELP),
    sampler: str = typer.Option("tpe", help="tpe, random, or grid: all configurations, in order."),
    pareto: bool = typer.Option(False, "--pareto", help="Search for the Pareto front of time and peak memory."),
    study: Path = typer.Option(None, help="Store trials in this SQLite file, and continue those stored there."),
    seed: int = typer.Option(0, help="Seed of the sampler."),
    output: Path = typer.Option(None, "--output", "-o", help="Write the winner's plan to this file, as JSON."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file."),
    json: bool = typer.Option(False, "--json", help="Print trials and plan as JSON alone."),
) -> None:
    """Find the configuration that trains fastest at a fixed batch.

    It varies precision, checkpointing, layout, optimizer and micro-batch.
    """
    if target_batch is None:
        raise UsageError("--target-batch is missing.", hint="Give --target-batch 512, for example.")
    if output is not None:
        check_output(output, force=force)
    from ..tuning import tune
    from ..tuning.space import read_space

    options: dict[str, Any] = {
        "space": read_space(vary), "trials": trials, "timeout": timeout, "device": device, "gpu": gpu,
        "memory": memory, "headroom": headroom, "malloc": malloc, "study": study, "sampler": sampler,
        "pareto": pareto, "seed": seed,
    }  # fmt: skip
    try:
        with _progress() as say:
            found = tune(workload, target_batch=target_batch, progress=say, **options)
    except KeyboardInterrupt:
        if study is not None:
            print(f"the trials so far are stored in {study}: the same command continues with them", file=sys.stderr)
        raise
    if output is not None:
        keep_plan(found.plan, output)
    if json:
        print(found.to_json(), end="")
        return
    _print_result(found, output)


@contextmanager
def _progress() -> Iterator[Say]:
    """Show a line on stderr for each trial.

    A terminal also shows the current step.
    """
    if not sys.stderr.isatty():

        def say_trial(message: dict[str, Any]) -> None:
            if "trial" in message:
                print(one_line(message["trial"]), file=sys.stderr, flush=True)

        yield say_trial
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    with console.status("tuning") as status:

        def say(message: dict[str, Any]) -> None:
            if "trial" in message:
                console.print(one_line(message["trial"]), markup=False, highlight=False)
            elif "say" in message:
                status.update(escape(f"tuning: {one_line(message['say'])}"))

        yield say


def _print_result(found: TuningResult, output: Path | None) -> None:
    from ..reporting.explain import summary
    from ..tuning.result import summary as summary_of_trials

    print(found.table())
    print()
    print(summary_of_trials(found))
    print(in_flags(summary(found.plan)))
    file = shlex.quote(str(output or "plan.json"))
    save = "" if output is not None else " (save the plan: -o plan.json)"
    print(f"next        autoaccum run {file}, autoaccum explain {file}{save}")
