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
    """Train a plan's workload under the plan's memory limit.

    On as many ranks as were launched together; a plan for another number is made anew, for the same target.
    """
    say({"say": "loading torch and the workload"})
    from ..processes.launch import launched_group
    from ..processes.workload_source import load_workload
    from ..runner.loop import train

    read = Plan.from_json(plan)
    assert read.request.workload is not None
    device = "cuda" if read.on_cuda else "cpu"
    if read.on_cuda:
        _require_cuda(read)
    workload = load_workload(read.request.workload, device)
    workload.model.to(device)
    with launched_group(device):
        read = _plan_of_these_ranks(read, workload, say)
        _limit_memory(read.budget_bytes, on_cuda=read.on_cuda)
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


def _require_cuda(plan: Plan) -> None:
    """Make this process's GPU the current one.

    Raises:
        UsageError: There is none.
    """
    import torch

    from ..processes.launch import choose_device

    if not torch.cuda.is_available():
        raise UsageError(
            f"The plan is for {plan.device.name}, and torch sees no CUDA device here.",
            "A plan for one device does not apply to another.",
            "Run it on a machine with that GPU, or plan for this machine: autoaccum plan --target-batch "
            f"{plan.target_batch} --workload {plan.request.workload}",
        )
    choose_device("cuda")


def _limit_memory(budget_bytes: int, *, on_cuda: bool) -> None:
    if not on_cuda:
        limit_data(budget_bytes)
        return
    import torch

    from ..devices.registry import get_device

    get_device(torch.device("cuda", torch.cuda.current_device())).limit_memory(budget_bytes)


def _plan_of_these_ranks(plan: Plan, workload: Workload, say: Say) -> Plan:
    """Return a plan for the launched ranks, made anew if for others."""
    from ..planning.fit import plan_workload
    from ..planning.request import PlanRequest
    from ..planning.tasks import with_ranks

    request = with_ranks(
        PlanRequest(
            plan.target_batch,
            min_micro_batch=plan.request.min_micro_batch,
            max_micro_batch=plan.request.max_micro_batch,
            objective=plan.request.objective,
            check=False,
            train_in_new_process=True,
        )
    )
    if request.world_size == plan.world_size:
        return plan.for_rank(request.rank)
    say({"say": f"planning for {request.world_size} ranks; the plan is for {plan.world_size}"})
    return plan_workload(workload, request, progress=lambda text: say({"say": text}))


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
