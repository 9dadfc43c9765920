"""`autoaccum bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from ..bounds import check_count, check_samples
from ..errors import UsageError
from ..processes.examples import BUILT_IN, DEFAULT
from ..units import check_memory


def bench(
    target_batch: int = typer.Option(512, help="Samples in an optimizer step."),
    workload: str = typer.Option(DEFAULT, help=f"FILE.py:FUNCTION, or one of: {', '.join(BUILT_IN)}."),
    device: str = typer.Option("cpu", help="cpu, or cuda for this machine's GPU."),
    memory: str = typer.Option(None, help="What each process may use, like 2GiB. Left out: what is free."),
    headroom: str = typer.Option(None, help="How much of that to keep free, like 500MiB or 5%."),
    malloc: str = typer.Option("fixed", help="Of the plan. fixed: predictable memory; default: faster."),
    windows: int = typer.Option(5, help="Windows to time of each; fewer where they take long."),
    tuned: Path = typer.Option(None, help="A plan that autoaccum tune made. Left out: tuning is run."),
    tune_trials: int = typer.Option(12, help="Configurations that tuning may try; 0 leaves the tuned plan out."),
    output: Path = typer.Option(None, "--output", "-o", help="Write a page: .html, .md, .csv or .json."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file."),
    json: bool = typer.Option(False, "--json", help="Print the results' JSON alone."),
) -> None:
    """Train hand-picked sizes, halving until it fits, the plan and the tuned plan for a few windows each."""
    _check(target_batch, device, memory, headroom, malloc, windows, tune_trials, output, force)
    from ..files.whole import write_whole
    from ..plan import Plan
    from ..processes.workload_source import check_source
    from ..reporting import table_page
    from ..tuning.compare import page
    from ..tuning.compare.comparison import compare
    from .terminal import progress

    check_source(workload)
    read = Plan.load(tuned) if tuned is not None else None
    with progress("comparing") as say:
        found = compare(
            workload, target_batch=target_batch, device=device, memory=memory, headroom=headroom, malloc=malloc,
            windows=windows, tuned=read, tune_trials=tune_trials, say=say,
        )  # fmt: skip
    print(page.as_json(found) if json else page.as_text(found), end="" if json else "\n")
    if output is not None:
        suffix = output.suffix.lower()
        text = page.as_json(found) if suffix == ".json" else table_page.render(page.sheet(found), suffix)
        write_whole(output, text.encode())
        print(f"wrote {output}", file=sys.stderr)


def _check(
    target_batch: int, device: str, memory: str | None, headroom: str | None, malloc: str, windows: int,
    tune_trials: int, output: Path | None, force: bool,
) -> None:  # fmt: skip
    """Refuses what can be seen to be wrong before anything is run."""
    check_samples("--target-batch", target_batch)
    check_count("--windows", windows, example=5)
    check_count("--tune-trials", tune_trials, least=0, example=12)
    if device not in ("cpu", "cuda") or malloc not in ("fixed", "default"):
        raise UsageError(f"--device {device} --malloc {malloc} can't be.", hint="cpu or cuda; fixed or default.")
    check_memory(memory, headroom)
    if output is None:
        return
    from ..files.whole import check_output
    from ..reporting import check_suffix

    check_suffix(output)
    check_output(output, force=force)
