"""What runs in a child process of the command line: planning and training a workload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from ..plan import FEWEST_STEPS, Plan
from ..process_memory import limit_data
from ..processes.child import Say
from ..units import show_bytes


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
        from ..planning.new_process import plan_on_gpu

        found = plan_on_gpu(workload, gpu=find_gpu(gpu) if gpu is not None else None, memory=memory, **asked)
        return {"plan": found.to_json()}
    from ..planning.fit import fit_plan
    from ..processes.workload_source import load_workload

    found = fit_plan(load_workload(workload), budget=memory, malloc=malloc, elsewhere=True, **asked)
    return {"plan": found.to_json()}


def run(
    *, say: Say, plan: str, epochs: int, steps: int | None, checkpoint: str | None, checkpoint_seconds: float
) -> dict[str, Any]:
    """Trains a plan's workload under the plan's own limit."""
    say({"say": "loading torch and the workload"})
    from ..processes.workload_source import load_workload
    from ..runner.loop import train

    read = Plan.from_json(plan)
    assert read.workload is not None
    if read.on_cuda:
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                f"The plan is for {read.device}, and torch sees no CUDA device here.",
                "A plan for one device says nothing about another.",
                "Run it where that GPU is, or plan for this machine: autoaccum plan --target-batch "
                f"{read.target_batch} --workload {read.workload}",
            )
        from ..devices.cuda.device import limit_reserved

        workload = load_workload(read.workload, "cuda")
        workload.model.to("cuda")
        limit_reserved(read.budget.bytes)
    else:
        workload = load_workload(read.workload)
        limit_data(read.budget.bytes)
    say({"say": f"limited to {show_bytes(read.budget.bytes)}"})
    if read.configuration:
        from ..tuning.apply import configure

        workload = configure(workload, read)
    return train(
        workload,
        read,
        say=say,
        epochs=epochs,
        steps=steps,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
    )


def check(*, say: Say, workload: str) -> dict[str, Any]:
    """Tests a workload's gradient; returns the verdict."""
    say({"say": "loading torch and the workload"})
    from dataclasses import asdict, replace

    from ..data.infer_sample import infer_sample
    from ..exactness.check import check
    from ..processes.workload_source import load_workload

    found, assumed = load_workload(workload), None
    if found.sample is None:
        sample, assumed = infer_sample(found.model)
        found = replace(found, sample=sample)
    verdict = check(found, progress=lambda text: say({"say": text}))
    answer = asdict(verdict) | {"exact": verdict.exact, "assumed": assumed}
    return {name: None if value != value else value for name, value in answer.items()}  # JSON has no NaN


def doctor(*, say: Say) -> dict[str, Any]:
    """What torch says of itself and its devices."""
    from ..planning.environment import torch_facts

    return torch_facts()


def bench(*, say: Say, **asked: Any) -> dict[str, Any]:
    """Trains one candidate of a comparison for a few windows."""
    say({"say": "loading torch and the workload"})
    from ..tuning.compare.trial import run

    return run(say=say, **asked)


def tune(*, say: Say, **asked: Any) -> dict[str, Any]:
    """Searches configurations; returns what was found, as JSON."""
    say({"say": "loading torch and the workload"})
    from ..tuning.session import tune

    return tune(say=say, **asked)


def tuning_record(*, say: Say, **asked: Any) -> dict[str, Any]:
    """Records one configuration; returns what it takes at every micro-batch."""
    from ..tuning.tasks import record

    return record(say=say, **asked)


def tuning_plan(*, say: Say, **asked: Any) -> dict[str, Any]:
    """Plans a tuned workload; returns the plan's JSON."""
    from ..tuning.tasks import plan

    return plan(say=say, **asked)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "plan": plan,
    "run": run,
    "check": check,
    "doctor": doctor,
    "bench": bench,
    "tune": tune,
    "tuning_record": tuning_record,
    "tuning_plan": tuning_plan,
}
