"""`autoaccum plan`."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import UsageError
from ..files.whole import check_output
from ..plan import FASTEST, FEWEST_STEPS, OBJECTIVES
from ..processes.examples import BUILT_IN, DEFAULT
from ..units import check_memory, check_samples, check_seconds


def plan(
    target_batch: int = typer.Option(None, help="Samples in an optimizer step. Left out: the largest micro-batch."),
    workload: str = typer.Option(DEFAULT, help=f"FILE.py:FUNCTION, or one of: {', '.join(BUILT_IN)}."),
    device: str = typer.Option(None, help="cpu, or cuda for this machine's GPU. Left out: cpu, or cuda with --gpu."),
    gpu: str = typer.Option(None, help="Plan for a GPU that isn't here, like a100-40gb (doctor --gpus lists them)."),
    memory: str = typer.Option(None, help="What the whole process may use, like 2GiB. Left out: what is free."),
    headroom: str = typer.Option(None, help="How much of that to keep free, like 500MiB or 5%."),
    max_micro_batch: int = typer.Option(None, help="The largest micro-batch allowed."),
    malloc: str = typer.Option("fixed", help="fixed: predictable memory; default: faster, with a quarter kept free."),
    verify: bool = typer.Option(True, help="Run the plan's window for real."),
    objective: str = typer.Option(
        FEWEST_STEPS,
        help="fewest-steps: the largest micro-batches; fastest: the smallest within 1 % of the fastest step.",
    ),
    timing: float = typer.Option(None, help="Seconds to time smaller micro-batches for. Left out: 3 at most, or 30."),
    output: Path = typer.Option(None, "--output", "-o", help="Write the plan to this file, as JSON."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file."),
    json: bool = typer.Option(False, "--json", help="Print the plan's JSON alone."),
) -> None:
    """Find the fewest accumulation steps that fit, and verify them."""
    _check(target_batch, max_micro_batch, timing, device, gpu, memory, headroom, output, force)
    _check_times(objective, target_batch, gpu, verify)
    from ..devices.virtual import planning_environment
    from ..plan import Plan
    from ..processes.child import call
    from ..processes.workload_source import check_source
    from .terminal import keep_plan, progress

    check_source(workload)
    arguments = {
        "workload": workload,
        "target_batch": target_batch,
        "memory": memory,
        "headroom": headroom,
        "max_micro_batch": max_micro_batch,
        "verify": verify,
        "malloc": malloc,
        "device": "cuda" if gpu is not None else device or "cpu",
        "gpu": gpu,
        "objective": objective,
        "timing_seconds": timing,
    }
    with progress("planning") as say:
        found = Plan.from_json(
            call("planning.tasks:plan", arguments, on_message=say, env=planning_environment(gpu))["plan"]
        )
    if output is not None:
        keep_plan(found, output)
    if json:
        print(found.to_json(), end="")
        return
    from ..reporting.explain import summary

    print(summary(found))
    told = output or "plan.json"
    keep = "" if output is not None else " (keep the plan: -o plan.json)"
    print(f"next        autoaccum run {told}, autoaccum explain {told}{keep}")


def _check(
    target_batch: int | None, max_micro_batch: int | None, timing: float | None, device: str | None, gpu: str | None,
    memory: str | None, headroom: str | None, output: Path | None, force: bool,
) -> None:  # fmt: skip
    """Refuses what can be seen to be wrong before two seconds are spent on importing torch."""
    check_samples("--target-batch", target_batch)
    check_samples("--max-micro-batch", max_micro_batch)
    check_seconds("--timing", timing)
    if device not in (None, "cpu", "cuda") or (gpu is not None and device == "cpu"):
        given = f"--device {device}" + (f" with --gpu {gpu}" if gpu is not None else "")
        raise UsageError(f"{given} can't be.", hint="Give --device cpu, --device cuda, or --gpu NAME alone.")
    check_memory(memory, headroom)
    if output is not None:
        check_output(output, force=force)


def _check_times(objective: str, target_batch: int | None, gpu: str | None, verify: bool) -> None:
    """What has no times; `wish.with_objective` says the same, after torch was imported."""
    if objective not in OBJECTIVES:
        raise UsageError(f"--objective {objective} is not known.", hint=f"Give {' or '.join(OBJECTIVES)}.")
    if objective == FASTEST and (gpu is not None or target_batch is None or not verify):
        raise UsageError(
            "--objective fastest needs times.",
            "A virtual GPU has none, nothing is run without verifying, and steps are compared at one target.",
            "autoaccum plan --objective fastest --target-batch 512, without --gpu and --no-verify.",
        )
