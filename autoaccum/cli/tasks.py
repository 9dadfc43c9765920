"""Run commands' work in a child process: training, checking, diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import DoesNotFit, UsageError
from ..files.stamps import OpenedFiles, loaded_files, stamps
from ..plan import Plan
from ..planning import cache
from ..process_memory import limit_data
from ..processes.child import Say
from ..units import show_bytes

if TYPE_CHECKING:
    from ..planning.request import PlanRequest
    from ..workload import Workload
    from .architectures.build import Built
    from .architectures.description import Description


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


def fits(
    *,
    say: Say,
    description: Mapping[str, Any],
    request: Mapping[str, Any],
    gpu: str,
    cluster: Mapping[str, Any] | None = None,
    key: str = "",
) -> dict[str, Any]:
    """Build a described model on the virtual GPU, plan it, and answer.

    An answer that rests on a replay is kept under `key`, if there is one.
    """
    say({"say": "loading torch and the architecture"})
    opened = OpenedFiles()
    if key:
        opened.watch()
    from ..devices import oom
    from ..devices.cuda.gpu_specs import find_gpu
    from ..planning.cluster import Cluster
    from ..planning.new_process import plan_on_gpu
    from ..planning.request import PlanRequest
    from .architectures.build import Built, build
    from .architectures.description import Description

    asked, built = Description(**description), list[Built]()

    def workload(device: str) -> Workload:
        built.append(build(asked, device))
        return built[-1].workload

    wanted = PlanRequest(**{**request, "sizes": tuple(request["sizes"])})
    plan, why = None, ""
    try:
        plan = plan_on_gpu(
            workload,
            wanted,
            gpu=find_gpu(gpu),
            progress=lambda text: say({"say": text}),
            cluster=None if cluster is None else Cluster(**cluster),
        )
    except DoesNotFit as error:
        why = error.what
    except RuntimeError as error:
        if built or not oom.is_out_of_memory(error):
            raise
        raise DoesNotFit(f"The parameters alone exceed what {gpu} has.", hint="Name another model or GPU.") from None
    ranks = 1 if cluster is None else int(cluster["ranks"])
    answer = fits_answer(asked, built[0], gpu, wanted, plan, why) | {"ranks": ranks}
    if key and plan is not None and plan.method == cache.REPLAYED:
        cache.keep(key, answer, stamps(loaded_files() | opened.paths()))
    return answer


def fits_answer(
    asked: Description, built: Built, gpu: str, request: PlanRequest, plan: Plan | None, why: str
) -> dict[str, Any]:
    """Return the answer's values; a plan's are None where nothing fits."""
    return {
        "fits": plan is not None,
        "gpu": gpu,
        "target_batch": plan.target_batch if plan else request.target_batch,
        "micro_batch": plan and plan.micro_batch,
        "accumulation_steps": plan and plan.accumulation_steps,
        "split": plan and list(plan.split),
        "predicted_peak_bytes": plan and plan.predicted_peak_bytes,
        "measured_peak_bytes": plan and plan.measured_peak_bytes,
        "budget_bytes": plan and plan.budget_bytes,
        "why": why,
        "architecture": built.architecture,
        "parameters": built.parameters,
        "trained_parameters": built.trained,
        "lora": asked.lora,
        "sample": built.sample_words,
        "assumed": list(built.assumed),
        "source": "real allocator on a virtual GPU",
    }


def doctor(*, say: Say) -> dict[str, Any]:
    """Return what torch reports about itself and its devices."""
    from ..planning.environment import torch_facts

    return torch_facts()
