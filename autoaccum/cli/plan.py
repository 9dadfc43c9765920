"""Implement `autoaccum plan`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..devices.cpu import page_cache
from ..errors import UsageError
from ..files.escape import one_line
from ..files.whole import check_output
from ..plan import FASTEST, FEWEST_STEPS, OBJECTIVES
from ..planning.request import PlanRequest
from ..planning.unequal import GpuKind, plan_unequal
from ..processes.examples import BUILT_IN, DEFAULT
from ..processes.launch import launched_rank
from ..units import check_memory, check_samples, check_seconds, parse_target
from .completion import choices, workloads
from .completion import gpus as complete_gpus
from .flags import in_flags
from .gpus import GPUS, PARALLEL, read_gpus

if TYPE_CHECKING:
    from ..plan import Plan
    from ..planning.cluster import Cluster

_WORKLOAD = typer.Option(DEFAULT, help=f"FILE.py:FUNCTION, or one of: {', '.join(BUILT_IN)}.", autocompletion=workloads)
_DEVICE = typer.Option(
    None,
    help="cpu, or cuda for this machine's GPU. Left out: cpu, or cuda with --gpu.",
    autocompletion=choices("cpu", "cuda"),
)
_GPU = typer.Option(
    None,
    help="Plan for a GPU that isn't here, like a100-40gb (doctor --gpus lists them); once for each kind: a100-40gb:2.",
    autocompletion=complete_gpus,
)
_MALLOC = typer.Option(
    page_cache.CACHED,
    help=page_cache.HELP,
    autocompletion=choices(*page_cache.MALLOCS),
)
_OBJECTIVE = typer.Option(
    FEWEST_STEPS,
    help="fewest-steps: the largest micro-batches; fastest: the smallest within 1 % of the fastest step.",
    autocompletion=choices(*OBJECTIVES),
)


def plan(
    target_batch: str = typer.Option(
        None, help="Samples in an optimizer step, or 4M-tokens. Left out: the largest micro-batch."
    ),
    workload: str = _WORKLOAD,
    device: str = _DEVICE,
    gpu: list[str] = _GPU,
    gpus: int = GPUS,
    parallel: str = PARALLEL,
    memory: str = typer.Option(None, help="Memory limit of the process, like 2GiB. Left out: all free memory."),
    headroom: str = typer.Option(None, help="Part of it to keep free, like 500MiB or 5%."),
    max_micro_batch: int = typer.Option(None, help="The largest micro-batch allowed."),
    malloc: str = _MALLOC,
    verify: bool = typer.Option(True, help="Run the plan's window."),
    objective: str = _OBJECTIVE,
    uniform: bool = typer.Option(
        False, "--uniform", help="One size for all micro-batches, for trainers that know only one (see export)."
    ),
    host_memory: str = typer.Option(None, help="What lanes on a GPU may keep on the host, like 24GiB."),
    timing: float = typer.Option(None, help="Seconds to time smaller micro-batches for. Left out: 3 at most, or 30."),
    output: Path = typer.Option(None, "--output", "-o", help="Write the plan to this file, as JSON."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file."),
    refresh: bool = typer.Option(False, "--refresh", help="Plan anew, even where this was planned before."),
    json: bool = typer.Option(False, "--json", help="Print the plan's JSON alone."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Print how it was found, too."),
) -> None:
    """Find the fewest accumulation steps that fit, and verify them."""
    samples, tokens = parse_target(target_batch, "--target-batch")
    request = PlanRequest(
        target_batch=samples, target_tokens=tokens, budget=memory, headroom=headroom, verify=verify, malloc=malloc,
        max_micro_batch=max_micro_batch, objective=objective, timing_seconds=timing, train_in_new_process=True,
        uniform=uniform, host_memory=host_memory,
    )  # fmt: skip
    kinds, cluster = read_gpus(gpu, gpus, parallel)
    named = kinds[0].name if kinds else None
    _check_device(device, named)
    _check_request(request, named)
    if output is not None and launched_rank() == 0:
        check_output(output, force=force)
    from ..plan import Plan
    from .terminal import keep_plan

    def planned(kind: GpuKind, wanted: PlanRequest) -> Plan:
        return Plan.from_json(_planned(workload, wanted, device, kind.name, cluster, refresh=refresh)["plan"])

    if len(kinds) > 1:
        found, answer = plan_unequal(kinds, request, planned), {"origin": "", "not_kept": "it is of several GPUs"}
    else:
        answer = _planned(workload, request, device, named, cluster, refresh=refresh)
        found = Plan.from_json(answer["plan"])
    if launched_rank() > 0:  # the first one prints and writes what all have agreed on
        return
    if output is not None:
        keep_plan(found, output)
    if json:
        print(found.to_json(), end="")
        if answer["origin"]:
            print(answer["origin"], file=sys.stderr)
        return
    _print(found, output, answer, verbose=verbose)


def _planned(
    workload: str,
    request: PlanRequest,
    device: str | None,
    gpu: str | None,
    cluster: Cluster | None,
    *,
    refresh: bool,
) -> dict[str, Any]:
    """Plan in a child process, on a virtual GPU if named.

    Nothing is kept without a limit, where the budget is what is free now; nor for a cluster.
    """
    from ..devices.virtual import planning_environment
    from ..planning.cache import OFF, mode_of
    from ..processes.child import call
    from ..processes.workload_source import check_source
    from .terminal import progress

    check_source(workload)
    kind = "cuda" if gpu is not None else device or "cpu"
    is_kept = cluster is None and (gpu is not None or request.budget is not None)
    arguments = {
        "workload": workload,
        "request": asdict(request),
        "device": kind,
        "gpu": gpu,
        "cluster": None if cluster is None else asdict(cluster),
        "cache": mode_of(refresh=refresh) if is_kept else OFF,
    }
    env = page_cache.environment(request.malloc) if kind == "cpu" else planning_environment(gpu)
    with progress("planning") as say:
        return call("planning.tasks:plan", arguments, on_message=say, env=env)


def _print(found: Plan, output: Path | None, answer: dict[str, Any], *, verbose: bool) -> None:
    """Print a plan as a card, or all of its summary."""
    following = "-o plan.json keeps it for autoaccum run and autoaccum explain"
    if output is not None:
        file = shlex.quote(str(output))
        following = f"autoaccum run {file}, autoaccum explain {file}"
    if verbose:
        from ..reporting.explain import summary

        print(in_flags(summary(found)))
        print(f"cache       {answer['origin'] or _about_keeping(answer['not_kept'])}")
        print(f"next        {following}")
        return
    from ..reporting.card import card
    from .terminal import look_of

    print(card(found, look_of(sys.stdout), following, in_flags, origin=answer["origin"]))


def _about_keeping(reason: str) -> str:
    """Return what a verbose plan says of the cache."""
    return f"not kept: {one_line(reason)}" if reason else "kept for the same question; --refresh plans anew"


def _check_device(device: str | None, gpu: str | None) -> None:
    """Refuse an unknown device, and --gpu with --device cpu."""
    hint = "Give --device cpu, --device cuda, or --gpu NAME alone."
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda, and is {device}.", hint=hint)
    if gpu is not None and device == "cpu":
        raise UsageError("--gpu cannot be combined with --device cpu.", hint=hint)


def _check_request(request: PlanRequest, gpu: str | None) -> None:
    """Refuse invalid options before torch is imported.

    Importing it takes seconds; `resolve` checks the options again.
    """
    check_samples("--max-micro-batch", request.max_micro_batch)
    check_seconds("--timing", request.timing_seconds)
    check_memory(request.budget, request.headroom)
    check_memory(request.host_memory, None)
    if request.objective not in OBJECTIVES:
        raise UsageError(f"--objective {request.objective} is not known.", hint=f"Give {' or '.join(OBJECTIVES)}.")
    has_target = request.target_batch is not None or request.target_tokens is not None
    timed = gpu is None and has_target and request.verify
    if request.objective == FASTEST and not timed:
        raise UsageError(
            "--objective fastest needs times.",
            "A virtual GPU has none, no window is run without verification, and steps are compared at one target.",
            "autoaccum plan --objective fastest --target-batch 512, without --gpu and --no-verify.",
        )
