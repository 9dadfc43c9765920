"""Compare plans of windows in lanes with a virtual GPU's allocator.

Each plan is made in one process, and trained by a Runner in another one, whose allocator reports what it reserved.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from autoaccum import Plan, Runner, Workload, fit_plan
from autoaccum.devices.virtual import VirtualGpu, launch
from autoaccum.units import show_bytes

from ..tables import Row
from ..truth_models import UNet
from .models import CLASSES

MIB = 2**20
WINDOWS = 3


@dataclass(frozen=True)
class Case:
    """A model, its images, and what it is planned for.

    Attributes:
        make: Makes the model.
        pixels: Width and height of an image.
        target: Samples of a window.
        budget_mib: What the process may use, its context's 512 MiB included.
        precision: Autocast's type.
    """

    make: Callable[[], nn.Module]
    pixels: int
    target: int
    budget_mib: int
    precision: str | None = None


def vision(name: str) -> Callable[[], nn.Module]:
    """Return a function that makes a model of torchvision without weights."""
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=CLASSES)


CASES = {
    "resnet18": Case(vision("resnet18"), 64, 256, 850),
    "resnet50": Case(vision("resnet50"), 64, 128, 1100, "bf16"),
    "densenet121": Case(vision("densenet121"), 64, 96, 900),
    "mobilenet_v3_small": Case(vision("mobilenet_v3_small"), 96, 256, 800),
    "efficientnet_b0": Case(vision("efficientnet_b0"), 64, 128, 800),
    "U-Net": Case(lambda: UNet(16), 64, 64, 650),
}


def workload(case: Case) -> Workload:
    """Make a case's workload, on the GPU."""
    model = case.make().cuda()
    sample = torch.zeros(4, 3, case.pixels, case.pixels), torch.zeros(4, dtype=torch.long)
    return Workload(
        model,
        sample,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        batchnorm="exact",
        precision=case.precision,
    )


def plan(name: str, path: str) -> None:
    """Plan a case, and save the plan."""
    case = CASES[name]
    started = time.perf_counter()
    found = fit_plan(workload(case), target_batch=case.target, budget=case.budget_mib * MIB, check=False)
    found.save(path)
    print(json.dumps({"planning_seconds": time.perf_counter() - started}))


def train(name: str, path: str) -> None:
    """Train windows by a saved plan, and print what they used."""
    case = CASES[name]
    runner = Runner(workload(case), Plan.load(path))
    images = torch.zeros(case.target, 3, case.pixels, case.pixels)
    batch = images, torch.zeros(case.target, dtype=torch.long)
    retries = [runner.step(batch).retries for _ in range(WINDOWS)]
    store = runner.context.host_store
    used = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    print(json.dumps({**used, "host": 0 if store is None else store.bytes, "retries": retries}))


def compare(name: str, gpu: VirtualGpu | None = None) -> dict[str, Any]:
    """Plan a case and train it in another process; return all figures."""
    gpu = gpu or VirtualGpu(memory_bytes=8 * 2**30)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "plan.json")
        figures: dict[str, Any] = {}
        for what in ("plan", "train"):
            process = launch(
                [sys.executable, "-m", "benchmarks.lanes.memory", what, name, path],
                gpu,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            out, err = process.communicate(timeout=600)
            if process.returncode:
                raise RuntimeError(f"{name}: {err.decode()[-3000:]}")
            figures |= json.loads(out.decode().splitlines()[-1])
        return {**figures, "plan": Plan.load(path)}


def run(names: Sequence[str] | None = None) -> list[Row]:
    """Return a row for each case."""
    rows = []
    for name in names or CASES:
        case, found = CASES[name], compare(name)
        made: Plan = found["plan"]
        rows.append(
            {
                "model": f"{name}, {case.precision}" if case.precision else name,
                "window": f"{case.target} of {case.pixels} px",
                "budget": show_bytes(case.budget_mib * MIB),
                "lanes": f"{made.accumulation_steps} of {made.micro_batch}",
                "method": made.method,
                "planned": show_bytes(made.predicted_peak_bytes),
                "reserved": show_bytes(found["reserved"]),
                "error": f"{made.predicted_peak_bytes / found['reserved'] - 1:+.2%}",
                "moved, a window": show_bytes(made.memory.moved_bytes),
                "kept on the device": show_bytes(made.memory.stayed_bytes),
                "computed again": show_bytes(made.memory.recomputed_bytes),
                "spared": show_bytes(made.memory.spared_bytes),
                "host, planned": show_bytes(made.memory.host_bytes),
                "host, used": show_bytes(found["host"]),
                "planning, s": f"{found['planning_seconds']:.0f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    {"plan": plan, "train": train}[sys.argv[1]](*sys.argv[2:])
