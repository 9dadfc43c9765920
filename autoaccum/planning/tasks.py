"""What planning runs in a child process."""

from __future__ import annotations

from typing import Any

from ..plan import FEWEST_STEPS
from ..processes.child import Say


def plan(
    *,
    say: Say,
    workload: str,
    target_batch: int | None,
    memory: str | None,
    headroom: str | None,
    max_micro_batch: int | None,
    verify: bool,
    malloc: str,
    device: str = "cpu",
    gpu: str | None = None,
    objective: str = FEWEST_STEPS,
    timing_seconds: float | None = None,
) -> dict[str, Any]:
    """Plans a workload; returns the plan's JSON."""
    say({"say": "loading torch and the workload"})
    asked: dict[str, Any] = {
        "target_batch": target_batch,
        "headroom": headroom,
        "max_micro_batch": max_micro_batch,
        "verify": verify,
        "progress": lambda text: say({"say": text}),
        "objective": objective,
        "timing_seconds": timing_seconds,
    }
    if device == "cuda":
        from ..devices.cuda.gpu_specs import find_gpu
        from .new_process import plan_on_gpu

        found = plan_on_gpu(workload, gpu=find_gpu(gpu) if gpu is not None else None, memory=memory, **asked)
        return {"plan": found.to_json()}
    from ..processes.workload_source import load_workload
    from .fit import fit_plan

    found = fit_plan(load_workload(workload), budget=memory, malloc=malloc, elsewhere=True, **asked)
    return {"plan": found.to_json()}
