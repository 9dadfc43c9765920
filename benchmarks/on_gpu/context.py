"""Part (c): what a process holds on the card outside torch's allocator.

NVML's used memory before this process touches the card and after some training, less what torch reserved, with nothing
else running. Budgets of `--gpu` assume the table's context and library bytes; those of a plan on the card itself read
`DeviceMemory.context_bytes`. Both are beside it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from autoaccum.devices.cuda.budget import read_device
from autoaccum.window import step

from . import apart
from .job import Job
from .memory import limit_to
from .models import MODELS, made, on_device

SAMPLES = 8


def run(job: Job) -> None:
    """Measure one model's context, alone on the card."""
    if importlib.util.find_spec("pynvml") is None:
        job.emit("skipped", why="nvidia-ml-py isn't installed")
        return
    made(job.model)
    assumed = int(job.card["spec outside bytes"])
    job.emit("context", assumed=assumed, gpu=job.card["spec"], **apart.call(measured, job.model, str(job.card["uuid"])))


def measured(name: str, uuid: str) -> dict[str, Any]:
    """Measure before, after the first tensor, and after each window."""
    before = used_bytes(uuid)
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    found: dict[str, Any] = {"before": before, "empty": _outside(uuid, before)}
    limit_to(MODELS[name].limit_bytes)
    work = on_device(name)
    context = step.open_context(work)
    for window in (1, 2, 3):
        step.train_window(context, [work.sample] * 2, (SAMPLES,) * 2)
        torch.cuda.synchronize()
        found[f"window {window}"] = _outside(uuid, before)
    return found | {"read by budgets": read_device().context_bytes}


def used_bytes(uuid: str) -> int:
    """Return the card's used memory as NVML has it."""
    import pynvml

    pynvml.nvmlInit()
    try:
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError:
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    finally:
        pynvml.nvmlShutdown()


def _outside(uuid: str, before: int) -> int:
    return used_bytes(uuid) - before - torch.cuda.memory_reserved()
