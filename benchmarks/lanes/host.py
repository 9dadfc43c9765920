"""Measure what lanes hold on the device and on the host.

On a virtual GPU.

ResNet-50 in bf16 autocast, 8 micro-batches of 64 images of 128 px, SGD with momentum: the allocator's peaks of three
windows, of plain accumulation, of lanes, of lanes that compute again what is cheap, and of lanes with each block
checkpointed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from autoaccum import Workload
from autoaccum.devices.virtual import VirtualGpu, launch
from autoaccum.window.step import open_context, train_window

from ..tables import Row
from .models import vision

STEPS, MICRO_BATCH, PIXELS, WINDOWS = 8, 64, 128, 3
AGAIN = "lanes, computing again"
WAYS = ("plain accumulation", "lanes", AGAIN, "lanes, blocks checkpointed")
GIB = 2**30


def run() -> list[Row]:
    """Return a row for each way, each measured in its own process."""
    rows: list[Row] = []
    for way in WAYS:
        process = launch(
            [sys.executable, "-m", "benchmarks.lanes.host", way],
            VirtualGpu(memory_bytes=16 * GIB),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=900)
        if process.returncode:
            raise RuntimeError(f"{way}: {err.decode()[-3000:]}")
        rows.append({"way": way, **json.loads(out.decode().splitlines()[-1])})
        print(rows[-1], flush=True)
    return rows


def measure(way: str) -> dict[str, str]:
    """Train windows on this process' device; return what they used."""
    model: Any = vision("resnet50")().cuda()
    if way.endswith("checkpointed"):
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in layer:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    batch = torch.zeros(MICRO_BATCH, 3, PIXELS, PIXELS), torch.zeros(MICRO_BATCH, dtype=torch.long)
    workload = Workload(
        model,
        batch,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        precision="bf16",
        batchnorm="exact" if way.startswith("lanes") else "per_micro_batch",
    )
    context = open_context(workload)
    context.recomputes = way == AGAIN
    for _ in range(WINDOWS):
        train_window(context, [batch] * STEPS, (MICRO_BATCH,) * STEPS)
    store = context.host_store
    used = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    moved = (0, 0, 0, 0, 0)
    if store is not None:
        moved = store.bytes, store.saved_bytes, store.returned_bytes, store.recomputation.bytes, store.late
    names = ("buffers on the host", "moved there", "moved back", "computed again")
    sizes = {**used, **dict(zip(names, moved, strict=False))}
    return {**{name: f"{size / GIB:.2f} GiB" for name, size in sizes.items()}, "not ahead": str(moved[-1])}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
