"""Implement `autoaccum bench`."""

from __future__ import annotations

from pathlib import Path

import typer

from ..devices.cpu import page_cache
from ..errors import UsageError
from ..processes.examples import BUILT_IN, DEFAULT
from ..units import check_count, check_memory, check_samples
from .completion import workloads


def bench(
    target_batch: int = typer.Option(512, help="Samples in an optimizer step."),
    workload: str = typer.Option(
        DEFAULT, help=f"FILE.py:FUNCTION, or one of: {', '.join(BUILT_IN)}.", autocompletion=workloads
    ),
    device: str = typer.Option("cpu", help="cpu, or cuda for this machine's GPU."),
    memory: str = typer.Option(None, help="Memory limit of each process, like 2GiB. Left out: all free memory."),
    headroom: str = typer.Option(None, help="Part of it to keep free, like 500MiB or 5%."),
    malloc: str = typer.Option(page_cache.CACHED, help=f"For the plan. {page_cache.HELP}"),
    windows: int = typer.Option(5, help="The most windows to time of each candidate."),
    tuned: Path = typer.Option(None, help="A plan from autoaccum tune. Left out: tune now."),
    tune_trials: int = typer.Option(12, help="The most configurations to tune with; 0 leaves the tuned plan out."),
    json: bool = typer.Option(False, "--json", help="Print the results' JSON alone."),
) -> None:
    """Compare hand-picked sizes, halving, the plan and the tuned plan.

    Each is trained for a few windows.
    """
    _check(target_batch, device, memory, headroom, malloc, windows, tune_trials)
    from ..plan import Plan
    from ..processes.workload_source import check_source
    from ..tuning.compare import results
    from ..tuning.compare.comparison import compare
    from .terminal import progress

    check_source(workload)
    read = Plan.load(tuned) if tuned is not None else None
    with progress("comparing") as say:
        found = compare(
            workload, target_batch=target_batch, device=device, memory=memory, headroom=headroom, malloc=malloc,
            windows=windows, tuned=read, tune_trials=tune_trials, say=say,
        )  # fmt: skip
    print(results.as_json(found) if json else results.as_text(found), end="" if json else "\n")


def _check(
    target_batch: int, device: str, memory: str | None, headroom: str | None, malloc: str, windows: int,
    tune_trials: int,
) -> None:  # fmt: skip
    """Refuse invalid options before anything runs."""
    check_samples("--target-batch", target_batch)
    check_count("--windows", windows, example=5)
    check_count("--tune-trials", tune_trials, least=0, example=12)
    if device not in ("cpu", "cuda") or malloc not in page_cache.MALLOCS:
        raise UsageError(
            f"--device {device} --malloc {malloc} is not supported.",
            hint=f"Use --device cpu or cuda, and --malloc {' or '.join(page_cache.MALLOCS)}.",
        )
    check_memory(memory, headroom)
