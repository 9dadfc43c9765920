"""`autoaccum tune`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import UsageError
from ..files.escape import one_line
from ..files.whole import check_output
from ..processes.examples import BUILT_IN, DEFAULT
from .terminal import keep_plan

if TYPE_CHECKING:
    from ..processes.child import Say
    from ..tuning import TuningResult


def tune(
    target_batch: int = typer.Option(None, help="Samples in an optimizer step."),
    workload: str = typer.Option(DEFAULT, help=f"FILE.py:FUNCTION, or one of: {', '.join(BUILT_IN)}."),
    trials: int = typer.Option(None, help="Configurations to try at most. Left out: 40, or all with --sampler grid."),
    timeout: float = typer.Option(None, help="Seconds after which no further trial begins."),
    vary: list[str] = typer.Option([], help="NAME=A,B: the choices for one part, like precision=fp32,bf16."),
    device: str = typer.Option(None, help="cpu, or cuda for this machine's GPU. Left out: cpu, or cuda with --gpu."),
    gpu: str = typer.Option(None, help="Rank by memory for a GPU that isn't here (doctor --gpus lists them)."),
    memory: str = typer.Option(None, help="What the whole process may use, like 2GiB. Left out: what is free."),
    headroom: str = typer.Option(None, help="How much of that to keep free, like 500MiB or 5%."),
    malloc: str = typer.Option("fixed", help="fixed: predictable memory; default: faster, with a quarter kept free."),
    sampler: str = typer.Option("tpe", help="tpe, random, or grid: all configurations, in order."),
    pareto: bool = typer.Option(False, "--pareto", help="Search for the best in both, time and peak memory."),
    study: Path = typer.Option(None, help="Keep the trials in this SQLite file, and go on with those that are there."),
    workers: int = typer.Option(1, help="Trials at a time, where memory alone is ranked (--gpu)."),
    seed: int = typer.Option(0, help="For what is drawn."),
    output: Path = typer.Option(None, "--output", "-o", help="Write the winner's plan to this file, as JSON."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file."),
    json: bool = typer.Option(False, "--json", help="Print trials and plan as JSON alone."),
) -> None:
    """Find the precision, checkpointing, layout, optimizer and micro-batch that take the least time at that batch."""
    if target_batch is None:
        raise UsageError("There is no target to tune for.", hint="Give --target-batch 512, say.")
    if output is not None:
        check_output(output, force=force)
    from ..tuning import tune
    from ..tuning.space import read_space

    asked: dict[str, Any] = {
        "space": read_space(vary), "trials": trials, "timeout": timeout, "device": device, "gpu": gpu,
        "memory": memory, "headroom": headroom, "malloc": malloc, "study": study, "sampler": sampler,
        "pareto": pareto, "workers": workers, "seed": seed,
    }  # fmt: skip
    try:
        with _progress() as say:
            found = tune(workload, target_batch=target_batch, progress=say, **asked)
    except KeyboardInterrupt:
        if study is not None:
            print(f"the trials so far are kept in {study}: the same command goes on with them", file=sys.stderr)
        raise
    if output is not None:
        keep_plan(found.plan, output)
    if json:
        print(found.to_json(), end="")
        return
    _tell(found, output)


@contextmanager
def _progress() -> Iterator[Say]:
    """A line on stderr for each trial; on a terminal, what is being done below them."""
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


def _tell(found: TuningResult, output: Path | None) -> None:
    from ..reporting.explain import summary
    from ..tuning.result import summary as of_trials

    print(found.table())
    print()
    print(of_trials(found))
    print(summary(found.plan))
    told = output or "plan.json"
    keep = "" if output is not None else " (keep the plan: -o plan.json)"
    print(f"next        autoaccum run {told}, autoaccum explain {told}{keep}")
