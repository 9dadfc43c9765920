"""Implement `autoaccum run`."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import AutoaccumError, UsageError
from ..files.json_text import to_json
from ..files.whole import check_output
from ..processes.child import Say
from ..processes.interrupts import exit_code
from ..processes.launch import launched_rank
from ..units import check_count, check_seconds, show_bytes

if TYPE_CHECKING:
    from ..plan import Plan

LINE_INTERVAL_SECONDS = 30.0  # without a terminal: the longest interval between lines within an epoch


def run(
    plan: Path = typer.Argument(help="A plan file."),
    epochs: int = typer.Option(1, help="Passes over the workload's data."),
    steps: int = typer.Option(None, help="Optimizer steps at most, those before a resume included."),
    checkpoint: Path = typer.Option(None, help="Resume from this file if it exists, and write it."),
    checkpoint_seconds: float = typer.Option(30.0, help="Seconds between writes of it."),
    json: bool = typer.Option(False, "--json", help="Print the result's JSON alone."),
) -> None:
    """Train a plan's workload under the plan's memory limit."""
    from ..plan import Plan
    from ..processes.child import call
    from ..processes.workload_source import check_source

    check_count("--epochs", epochs)
    check_count("--steps", steps, example=100)
    check_seconds("--checkpoint-seconds", checkpoint_seconds)
    read = Plan.load(plan)
    if read.request.workload is None:
        raise UsageError(
            f"{plan} was made in Python, so it names no workload to run.",
            hint="Train it there: Runner(workload, plan).epoch(loader); or plan with --workload FILE.py:FUNCTION.",
        )
    check_source(read.request.workload)
    if checkpoint is not None and launched_rank() == 0:
        check_output(checkpoint, force=True)
    arguments = {
        "plan": read.to_json(),
        "epochs": epochs,
        "steps": steps,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "checkpoint_seconds": checkpoint_seconds,
    }
    with _shown(read, json=json) as say:
        result = call("cli.tasks:run", arguments, on_message=say, env=_environment(read))
    if launched_rank() == 0:
        _print_result(result, json=json)
    if result["interrupted"]:
        raise typer.Exit(exit_code(result["signal"]))
    if result["nonfinite_windows"] and not math.isfinite(result["loss"]):
        raise AutoaccumError(
            f"The last loss is {result['loss']}: {_nonfinite_text(result)}.",
            "Such a loss leaves parameters that aren't finite either, unless its step was skipped.",
            "Lower the learning rate, set clip_grad_norm=, or stop there: Workload(..., on_nonfinite='raise').",
        )


def _environment(plan: Plan) -> dict[str, str] | None:
    """Return the environment that a plan needs; None for nothing.

    It must be set before torch is loaded.
    """
    if not plan.on_cuda:
        from ..devices.cpu import page_cache

        return page_cache.environment(plan.device.malloc)
    if not plan.schedule.configuration.get("expandable_segments"):
        return None
    from ..configuration import allocator_settings

    return {**os.environ, **allocator_settings(os.environ)}


@contextmanager
def _shown(plan: Plan, *, json: bool) -> Iterator[Say]:
    """Show progress: a bar on a terminal, otherwise lines on stdout."""
    if launched_rank() > 0:  # the first one shows what all do
        yield lambda message: None
    elif sys.stderr.isatty():
        with _bar(plan) as say:
            yield say
    else:
        lines = _Lines(silent=json)
        yield lines.say


@contextmanager
def _bar(plan: Plan) -> Iterator[Say]:
    """Show loss, samples per second and memory in a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(10), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=None, epoch=1, text="loading torch and the workload")
        speed = Speed()

        def say(message: dict[str, Any]) -> None:
            if "warning" in message:
                bar.console.print(f"warning: {message['warning']}", markup=False, highlight=False)
            if "step" not in message:
                return
            step = message["step"]
            speed.add(step["samples"])
            text = (
                f"loss {step['loss']:.4f}  {speed.text}  {show_bytes(step['held_bytes'])} held, "
                f"{show_bytes(plan.predicted_peak_bytes)} planned"
            )
            bar.update(task, total=step["windows"], completed=step["window"], epoch=step["epoch"] + 1, text=text)

        yield say


class Speed:
    """Measure samples per second since the first window ended.

    Lazy loading and the first window's samples don't count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started: float | None = None
        self._samples = 0
        self._seconds = 0.0

    def add(self, samples: int) -> None:
        """Count the samples of a window that ended."""
        now = self._clock()
        if self._started is None:
            self._started = now
            return
        self._samples += samples
        self._seconds = now - self._started

    @property
    def text(self) -> str:
        """Return the speed as text; a dash after the first window."""
        return f"{self._samples / self._seconds:.0f} samples/s" if self._seconds > 0 else "- samples/s"


class _Lines:
    """Print a line per epoch, and more within a long one.

    If silent, only warnings are printed.
    """

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._speed = Speed()
        self._printed_at = time.monotonic()

    def say(self, message: dict[str, Any]) -> None:
        """Print a window's figures if a line is due."""
        if "warning" in message:
            print(f"warning: {message['warning']}", file=sys.stderr, flush=True)
        if "step" not in message or self._silent:
            return
        step = message["step"]
        self._speed.add(step["samples"])
        if step["window"] != step["windows"] and time.monotonic() - self._printed_at < LINE_INTERVAL_SECONDS:
            return
        self._printed_at = time.monotonic()
        of = f" of {step['windows']}" if step["windows"] is not None else ""
        print(
            f"epoch {step['epoch'] + 1}, window {step['window']}{of}: loss {step['loss']:.4f}, {self._speed.text}, "
            f"{show_bytes(step['held_bytes'])} held",
            flush=True,
        )


def _print_result(result: dict[str, Any], *, json: bool) -> None:
    if json:
        print(to_json(result))
        return
    ended = "interrupted at a window's end" if result["interrupted"] else "done"
    if result["loss"] is None:
        print(f"{ended}: nothing was left to train after {result['steps']} optimizer steps")
        return
    nonfinite = f", {_nonfinite_text(result)}" if result["nonfinite_windows"] else ""
    pieces = f"{result['accumulation_steps']} micro-batch{'es' * (result['accumulation_steps'] > 1)}"
    print(
        f"{ended}: {result['steps']} optimizer steps, {result['samples']} samples, "
        f"last loss {result['loss']:.4f}{nonfinite}, {pieces} of at most {result['micro_batch']} in the last window"
    )
    print(
        f"checkpoint: {result['checkpoint']}"
        if result["checkpoint"] is not None
        else "no checkpoint was written, so the trained parameters are lost; keep them with --checkpoint FILE"
    )


def _nonfinite_text(result: dict[str, Any]) -> str:
    many, first = result["nonfinite_windows"], result["first_nonfinite"]
    return f"not finite in {many} window{'s' * (many > 1)}, first in epoch {first['epoch']}, window {first['window']}"
