"""Plan a workload in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    from .kept_plans import KeptPlans, about

    kept = KeptPlans(cache)
    kept.watch()
    if device == "cuda":
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

    found = plan_workload(load_workload(workload), wanted, progress=progress, kept=kept)
    return {"plan": found.to_json(), **about(kept)}
