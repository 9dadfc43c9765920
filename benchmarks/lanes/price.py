"""Time windows in lanes on this CPU; count the bytes they move."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch

from autoaccum import Workload
from autoaccum.window.lanes.host_store import HostStore
from autoaccum.window.step import open_context, train_window

from ..tables import Row
from .models import made, vision

SAMPLES, LANES, ROUNDS = 32, 4, 7
NAMES = ("resnet18", "resnet50", "mobilenet_v3_small", "U-Net")
GB_PER_SECOND = (16, 64)  # PCIe 3.0 and 5.0 with 16 lanes, as their makers count


def timed(name: str) -> Row:
    """Time a model's windows: whole, plain and in lanes, in turns."""
    model, batch = made(name, torch.float32, SAMPLES)
    ways: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for way, how, steps in (("whole", None, 1), ("plain", "per_micro_batch", LANES), ("lanes", "exact", LANES)):
        work = Workload(copy.deepcopy(model), batch, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), batchnorm=how)
        ways[way] = open_context(work), (SAMPLES // steps,) * steps
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, (context, sizes) in ways.items():
            pieces = list(zip(*(leaf.split(sizes) for leaf in batch), strict=True))
            begun = time.perf_counter()
            train_window(context, pieces, sizes)
            if turn:  # the first one makes threads and caches
                seconds[way].append(time.perf_counter() - begun)
    found = {way: statistics.median(each) for way, each in seconds.items()}
    return {
        "model": name,
        **{f"{way}, s": f"{each:.3f}" for way, each in found.items()},
        "lanes / plain": f"{found['lanes'] / found['plain']:.2f}",
        "lanes / whole": f"{found['lanes'] / found['whole']:.2f}",
    }


def moved_bytes(name: str, pixels: int, dtype: torch.dtype | None) -> tuple[int, int]:
    """Return the bytes of a sample that lanes on a GPU move.

    Counted on this CPU, by the same rules, without copying.
    """
    samples = 4
    model = vision(name)().train()
    store = HostStore(torch.device("cpu"), 1 << 50, copies=False)
    store.begin((*model.parameters(), *model.buffers()))
    x = torch.randn(samples, 3, pixels, pixels)
    with store.moving(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(x).float().sum()
    loss.backward()
    return store.saved_bytes // samples, store.returned_bytes // samples


def run() -> list[Row]:
    """Return the rows of times; print those of bytes."""
    rows: list[Row] = []
    for dtype in (None, torch.bfloat16):
        saved, returned = moved_bytes("resnet50", 224, dtype)
        floors = ", ".join(f"{(saved + returned) / each / 1e6:.1f} ms at {each} GB/s" for each in GB_PER_SECOND)
        kind = "fp32" if dtype is None else "bf16 autocast"
        moved = f"{saved / 1e6:.0f} MB a sample to the host, {returned / 1e6:.0f} MB back"
        print(f"ResNet-50, 224 px, {kind}: {moved}: {floors}", flush=True)
    for name in NAMES:
        rows.append(timed(name))
        print(rows[-1], flush=True)
    return rows
