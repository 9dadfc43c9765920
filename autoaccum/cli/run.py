"""`autoaccum run`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..child import Say
from ..errors import UsageError
from ..units import show_bytes

if TYPE_CHECKING:
    from ..plan import Plan


def run(
    plan: Path = typer.Argument(help="A plan file."),
    epochs: int = typer.Option(1, help="Passes over the workload's data."),
    steps: int = typer.Option(None, help="Optimizer steps at most, those before a resume included."),
    checkpoint: Path = typer.Option(None, help="Resume from this file where it exists, and write it."),
    checkpoint_seconds: float = typer.Option(30.0, help="How often to write it."),
    json: bool = typer.Option(False, "--json", help="Print the result's JSON alone."),
) -> None:
    """Train a plan's workload, under the plan's own limit."""
    from ..child import call
    from ..plan import Plan
    from ..source import check_source

    read = Plan.load(plan)
    if read.workload is None:
        raise UsageError(
            f"{plan} was made in Python, so it names no workload to run.",
            hint="Train it there: Runner(workload, plan).epoch(loader); or plan with --workload FILE.py:FUNCTION.",
        )
    check_source(read.workload)
    if checkpoint is not None and not checkpoint.parent.is_dir():
        raise UsageError(f"There is no folder {checkpoint.parent}.", hint="Make it first, or name another file.")
    arguments = {
        "plan": read.to_json(),
        "epochs": epochs,
        "steps": steps,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "checkpoint_seconds": checkpoint_seconds,
    }
    with _bar(read) as say:
        result = call("run", arguments, on_message=say)
    _tell(result, json=json)
    if result["interrupted"]:
        raise typer.Exit(130)


@contextmanager
def _bar(plan: Plan) -> Iterator[Say]:
    """A progress bar on a terminal's stderr: loss, samples/s, memory against the plan."""
    if not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[told]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=None, epoch=1, told="loading torch and the workload")
        started: list[float] = []

        def say(message: dict[str, Any]) -> None:
            if "step" not in message:
                return
            step = message["step"]
            started.append(bar.get_time())
            speed = step["samples"] * (len(started) - 1) / max(started[-1] - started[0], 1e-9)
            told = (
                f"loss {step['loss']:.4f}  {speed:.0f} samples/s  {show_bytes(step['committed_bytes'])} held, "
                f"peak planned {show_bytes(plan.predicted_peak_bytes)}"
            )
            bar.update(task, total=step["windows"], completed=step["window"], epoch=step["epoch"] + 1, told=told)

        yield say


def _tell(result: dict[str, Any], *, json: bool) -> None:
    if json:
        import json as encoder

        print(encoder.dumps(result))
        return
    ended = "interrupted at a window's end" if result["interrupted"] else "done"
    if result["loss"] is None:
        print(f"{ended}: nothing was left to train after {result['steps']} optimizer steps")
        return
    print(
        f"{ended}: {result['steps']} optimizer steps, {result['samples']} samples, last loss {result['loss']:.4f}, "
        f"{result['accumulation_steps']} micro-batches of at most {result['micro_batch']} in the last window"
    )
