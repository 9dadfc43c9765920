"""Plan a workload in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..processes.child import Say
from .cache import OFF
from .request import PlanRequest


def plan(
    *,
    say: Say,
    workload: str,
    request: Mapping[str, Any],
    device: str = "cpu",
    gpu: str | None = None,
    cluster: Mapping[str, Any] | None = None,
    cache: str = OFF,
) -> dict[str, Any]:
    """Plan a workload and return the plan's JSON.

    Args:
        say: Called with progress messages.
        workload: A built-in's name, or FILE.py:FUNCTION.
        request: The fields of a `PlanRequest`, as JSON.
        device: "cpu" or "cuda".
        gpu: Name of the GPU that a virtual one stands in for; None for a real device.
        cluster: The fields of a `Cluster`; None for one GPU.
        cache: Whether kept plans are used (planning/cache.py).

    Returns:
        The plan, as "plan"; and whether it was kept before, as `kept_plans.about` says.
    """

    def progress(text: str) -> None:
        say({"say": text})

    progress("loading torch and the workload")
    wanted = PlanRequest(**{**request, "sizes": tuple(request["sizes"])})
    from ..processes.launch import choose_device, launched_group, launched_ranks

    _refuse_named_gpu(gpu, launched_ranks())
    from .kept_plans import KeptPlans, about

    kept = KeptPlans(cache if launched_ranks() == 1 else OFF)  # ranks agree on a plan that all of them make
    kept.watch()
    if device == "cuda" and launched_ranks() == 1:
        from ..devices.cuda.gpu_specs import find_gpu
        from .cluster import Cluster
        from .new_process import plan_on_gpu

        found = plan_on_gpu(
            workload,
            wanted,
            gpu=find_gpu(gpu) if gpu is not None else None,
            progress=progress,
            cluster=None if cluster is None else Cluster(**cluster),
            kept=kept,
        )
        return {"plan": found.to_json(), **about(kept)}
    from ..processes.workload_source import load_workload
    from .fit import plan_workload

    choose_device(device)
    loaded = load_workload(workload, device)
    loaded.model.to(device)
    with launched_group(device):
        found = plan_workload(loaded, with_ranks(wanted), progress=progress, kept=kept)
    return {"plan": found.to_json(), **about(kept)}


def with_ranks(request: PlanRequest) -> PlanRequest:
    """Return a request with this process's place among its ranks."""
    from dataclasses import replace

    from .over_ranks import request_here

    rank, world_size = request_here(None, None)
    return request if world_size == 1 else replace(request, rank=rank, world_size=world_size)


def _refuse_named_gpu(gpu: str | None, ranks: int) -> None:
    if gpu is None or ranks == 1:
        return
    raise UsageError(
        f"--gpu plans for a GPU that isn't here, and {ranks} processes were launched together.",
        "One process plans for all ranks of such a GPU; launched ones plan on their own devices.",
        "Leave out --gpu, or plan in one process: autoaccum plan --gpu NAME --gpus 8 --parallel ddp.",
    )
