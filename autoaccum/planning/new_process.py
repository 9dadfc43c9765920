"""Plan on a GPU in a process that ends afterwards.

The workload's function is called with the allocator's history on, so the model's allocations are known as a new process
makes them; and nothing has to be put back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..data import tree
from ..data.sample import with_sample
from ..devices.cuda.device import CudaDevice
from ..devices.cuda.gpu_specs import Gpu
from ..devices.cuda.model_blocks import model_blocks
from ..devices.registry import get_device
from ..devices.virtual.device import StandInDevice
from ..errors import UsageError
from ..plan import DistributionSection, Plan
from ..processes.workload_source import load_function, make_workload, takes_device
from ..ranks.sharded import keeps_shards_on_host
from ..ranks.shares import EQUAL
from ..simulation.recording import Event
from ..workload import Workload
from . import build_plan, predictor_cuda, predictor_virtual
from .cluster import DDP, Cluster
from .fit import PlanningEnvironment, plan_in
from .request import PlanRequest
from .spread import spread
from .target import RecordingTarget

if TYPE_CHECKING:
    from .kept_plans import KeptPlans


def plan_on_gpu(
    source: str | Callable[[str], Workload] | None,
    request: PlanRequest,
    *,
    gpu: Gpu | None,
    progress: Callable[[str], None],
    cluster: Cluster | None = None,
    change: Callable[[Workload], Workload] = lambda workload: workload,
    kept: KeptPlans | None = None,
) -> Plan:
    """Plan in this process, on its GPU, for training in another.

    Args:
        source: A built-in's name, or FILE.py:FUNCTION; None for the function that this process was given; or a function
            of autoaccum's own that is given the device.
        request: The request.
        gpu: The GPU that a virtual one stands in for; None for a real one.
        progress: Called with progress messages.
        cluster: The GPUs that train together, where that is not one.
        change: Called with the workload before its model is moved to the device.
        kept: Where an earlier plan may be found, and this one is kept; None for nowhere.

    Raises:
        UsageError: There is no GPU, or the workload cannot be used.
        DoesNotFit: Not even the smallest micro-batch fits.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "torch sees no CUDA device here.",
            f"It is torch {torch.__version__}, built for CUDA {torch.version.cuda or 'not at all'}.",
            "Name a GPU to plan for without having one: --gpu a100-40gb. `autoaccum doctor` says what is there.",
        )
    started = time.perf_counter()
    here = get_device(torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(here, CudaDevice)
    device = here if gpu is None else StandInDevice(here.torch_device, gpu)
    workload, build = build_on(source, device, virtual=gpu is not None, change=change)
    note = ""
    if cluster is not None:
        progress(f"spreading the model over {cluster.ranks} ranks")
        found = spread(workload, device, build, cluster)
        workload, build, note = found.workload, found.build, found.note
        request = replace(request, exchanges=cluster.parallel == DDP)
    request = replace(request, train_in_new_process=True)
    make_predictor = predictor_cuda.make_predictor if gpu is None else predictor_virtual.make_predictor
    subject = RecordingTarget if gpu is None else predictor_virtual.UninitializedTarget
    environment = PlanningEnvironment(device, make_predictor, build, keep=False, progress=progress, subject=subject)

    def make() -> Plan:
        plan = build_plan.with_note(plan_in(environment, workload, request), note)
        if request.samples is not None:  # of an unequal share: all ranks' plan is put together by who asked
            plan = replace(plan, request=replace(plan.request, target_batch=request.samples, world_size=1))
        elif cluster is not None and cluster.parallel is not None:
            plan = replace(plan, distribution=DistributionSection((), cluster.parallel, EQUAL))
        return replace(plan, provenance=replace(plan.provenance, planning_seconds=time.perf_counter() - started))

    return make() if kept is None else kept.answer(device, workload, request, make)


def build_on(
    source: str | Callable[[str], Workload] | None,
    device: CudaDevice,
    *,
    virtual: bool,
    change: Callable[[Workload], Workload] = lambda workload: workload,
) -> tuple[Workload, tuple[Event, ...]]:
    """Call a workload's function, and move its model to the device.

    On a virtual GPU its tensors are created there: a model far larger than this machine's memory costs nothing there.
    Their values are meaningless, so a function that reads values may fail; it is then called again on the CPU.

    Returns:
        The workload, its sample on the host; and the allocator's events meanwhile. Where tensors were created there
        that training creates on the host and moves, the events are those of moving the model.
    """
    is_moved = False

    def make() -> Workload:
        nonlocal is_moved
        if callable(source):
            workload = change(source(str(device.torch_device)))
        else:
            function = load_function(source)
            is_moved = virtual and not takes_device(function, source)
            workload = change(make_workload(function, source, "cuda", made_there=virtual))
        if not keeps_shards_on_host(workload.model):
            workload.model.to(device.torch_device)
        return workload

    workload, build = device.record_build(make)
    build = model_blocks(workload.model) if is_moved else build
    sample = tree.to_device(with_sample(workload)[0].sample, torch.device("cpu"))
    return replace(workload, sample=sample), build
