"""Plans on a virtual GPU, or tries a window there; prints JSON. A program of test_cuda_plan.py's, not a test."""

from __future__ import annotations

import json
import sys
from typing import Any

import replay_cases as cases
import torch

from autoaccum import Workload, fit_plan, oom, split, step
from autoaccum.outlook_virtual import limited_to
from autoaccum.restore import take


def workload(model: str, optimizer: str, precision: str) -> Workload:
    """One of the replay cases, on the GPU."""
    make, batch, _ = cases.MODELS[model]
    return Workload(
        make().cuda(),
        batch(4),
        optimizer=cases.OPTIMIZERS[optimizer],
        precision=precision,
        scaler=torch.amp.GradScaler("cuda") if precision == "fp16" else None,
        clip_grad_norm=1.0,
    )


def plan(model: str, optimizer: str, precision: str, target: str) -> dict[str, Any]:
    """Plans, and compares what was there before."""
    work = workload(model, optimizer, precision)
    before = take(model=work.model, scaler=work.scaler)
    counted = torch.cuda.memory_stats().get("num_ooms", 0)
    found = fit_plan(work, target_batch=int(target))
    return {
        "split": found.split,
        "budget_bytes": found.budget_bytes,
        "predicted": found.predicted_peak_bytes,
        "measured": found.measured_peak_bytes,
        "retries": list(found.retries[:3]),
        "passes": 2 + sum(note.passes for note in found.recordings),
        "samples": 4 + sum(note.passes * note.micro_batch for note in found.recordings),
        "out_of_memory": torch.cuda.memory_stats().get("num_ooms", 0) - counted,
        "differences": before.differences(),
    }


def attempt(model: str, optimizer: str, precision: str, sizes: str, capacity_bytes: str) -> dict[str, Any]:
    """Trains four windows within a capacity, as a fresh process does."""
    torch.cuda.mem_get_info()  # makes the context, which the capacity is beyond
    retries = []
    try:
        with limited_to(int(capacity_bytes)):
            work = workload(model, optimizer, precision)
            parts = step.open_parts(work)
            for _ in range(4):
                before = torch.cuda.memory_stats().get("num_alloc_retries", 0)
                windows = [split.tile(work.sample, size) for size in json.loads(sizes)]
                step.train_window(parts, windows, json.loads(sizes))
                retries.append(torch.cuda.memory_stats()["num_alloc_retries"] - before)
    except torch.OutOfMemoryError as error:
        oom.drop_frames(error)
        return {"fits": False}
    return {"fits": not any(retries[2:]), "peak": torch.cuda.max_memory_reserved(), "retries": retries[:3]}


if __name__ == "__main__":
    print(json.dumps({"plan": plan, "try": attempt}[sys.argv[1]](*sys.argv[2:])))
