"""Time windows in lanes on this CPU; count the bytes they move."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any
from unittest import mock

import torch

from autoaccum import Workload
from autoaccum.window.lanes import host_store, training
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
        workload = Workload(copy.deepcopy(model), batch, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), batchnorm=how)
        ways[way] = open_context(workload), (SAMPLES // steps,) * steps
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, (context, sizes) in ways.items():
            pieces = list(zip(*(leaf.split(sizes) for leaf in batch), strict=True))
            begun, used = time.perf_counter(), time.process_time()
            train_window(context, pieces, sizes)
            if turn:  # the first one makes threads and caches
                seconds[way].append(time.perf_counter() - begun)
                processor[way].append(time.process_time() - used)
    found = {way: statistics.median(each) for way, each in seconds.items()}
    work = {way: statistics.median(each) for way, each in processor.items()}
    return {
        "model": name,
        **{f"{way}, s": f"{each:.3f}" for way, each in found.items()},
        "lanes / plain": f"{found['lanes'] / found['plain']:.2f}",
        "the same, processor time": f"{work['lanes'] / work['plain']:.2f}",
        "lanes / whole, processor time": f"{work['lanes'] / work['whole']:.2f}",
    }


def moved_bytes(name: str, pixels: int, precision: str, *, recomputes: bool) -> tuple[int, int, int]:
    """Return the bytes of a sample that move, and are computed again.

    Counted on this CPU, in lanes whose saved tensors are copied to buffers as a GPU's are.
    """
    samples = 4
    store = HostStore(torch.device("cpu"), 1 << 50)
    batch = torch.randn(samples, 3, pixels, pixels), torch.zeros(samples, dtype=torch.long)
    work = Workload(
        vision(name)(), batch, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), precision=precision, batchnorm="exact"
    )
    context = open_context(work)
    store.begin((*context.model.parameters(), *context.model.buffers()), recomputes=recomputes)
    each = mock.patch.object(host_store, "THRESHOLD_BYTES", host_store.THRESHOLD_BYTES // 32)  # as in lanes of 64
    with each, mock.patch.object(training, "_host_store", lambda context: store):
        train_window(context, list(zip(*(leaf.split(2) for leaf in batch), strict=True)), (2, 2))
    return store.saved_bytes // samples, store.returned_bytes // samples, store.recomputation.bytes // samples


def run() -> list[Row]:
    """Return the rows of times; print those of bytes."""
    rows: list[Row] = []
    for precision in ("fp32", "bf16"):
        for recomputes in (False, True):
            saved, returned, again = moved_bytes("resnet50", 224, precision, recomputes=recomputes)
            floors = ", ".join(f"{(saved + returned) / each / 1e6:.1f} ms at {each} GB/s" for each in GB_PER_SECOND)
            moved = f"{saved / 1e6:.0f} MB a sample to the host, {returned / 1e6:.0f} MB back"
            print(f"ResNet-50, 224 px, {precision}, {again / 1e6:.0f} MB computed again: {moved}: {floors}", flush=True)
    for name in NAMES:
        rows.append(timed(name))
        print(rows[-1], flush=True)
    return rows
