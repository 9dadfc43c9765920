"""Run commands' work in a child process: training, checking, diagnosis."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..plan import Plan
from ..process_memory import limit_data
from ..processes.child import Say
from ..units import show_bytes


def run(
    *, say: Say, plan: str, epochs: int, steps: int | None, checkpoint: str | None, checkpoint_seconds: float
) -> dict[str, Any]:
    """Train a plan's workload under the plan's memory limit."""
    say({"say": "loading torch and the workload"})
    from ..processes.workload_source import load_workload
    from ..runner.loop import train

    read = Plan.from_json(plan)
    assert read.request.workload is not None
    if read.on_cuda:
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                f"The plan is for {read.device.name}, and torch sees no CUDA device here.",
                "A plan for one device does not apply to another.",
                "Run it on a machine with that GPU, or plan for this machine: autoaccum plan --target-batch "
                f"{read.target_batch} --workload {read.request.workload}",
            )
        from ..devices.registry import get_device

        workload = load_workload(read.request.workload, "cuda")
        workload.model.to("cuda")
        get_device(torch.device("cuda")).limit_memory(read.budget_bytes)
    else:
        workload = load_workload(read.request.workload)
        limit_data(read.budget_bytes)
    say({"say": f"limited to {show_bytes(read.budget_bytes)}"})
    if read.schedule.configuration:
        from ..tuning.apply import configure

        workload = configure(workload, read)
    return train(
        workload,
        read,
        progress=say,
        epochs=epochs,
        steps=steps,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
    )


def check(*, say: Say, workload: str) -> dict[str, Any]:
    """Check a workload's gradient and return the verdict."""
    say({"say": "loading torch and the workload"})
    from dataclasses import asdict

    from ..data.sample import with_sample
    from ..exactness.check import check
    from ..processes.workload_source import load_workload

    found, assumed = with_sample(load_workload(workload))
    verdict = check(found, progress=lambda text: say({"say": text}))
    answer = asdict(verdict) | {"exact": verdict.exact, "assumed": assumed or None}
    return {name: None if value != value else value for name, value in answer.items()}  # JSON has no NaN


def doctor(*, say: Say) -> dict[str, Any]:
    """Return what torch reports about itself and its devices."""
    from ..planning.environment import torch_facts

    return torch_facts()
