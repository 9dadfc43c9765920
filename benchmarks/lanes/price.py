"""Time windows in lanes on this CPU; count the bytes they move."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from unittest import mock

import torch

from autoaccum import Workload
from autoaccum.devices.cpu import page_cache
from autoaccum.window.lanes import host_store, training
from autoaccum.window.lanes.host_store import HostStore
from autoaccum.window.step import open_context, train_window

from ..tables import Row
from .models import made, vision

SAMPLES, LANES, ROUNDS = 32, 4, 9
NAMES = ("resnet18", "resnet50", "mobilenet_v3_small", "U-Net")
WAYS = {"whole": (None, 1), "plain": ("per_micro_batch", LANES), "planned": ("exact", 1), "lanes": ("exact", LANES)}
GB_PER_SECOND = (16, 64)  # PCIe 3.0 and 5.0 with 16 lanes, as their makers count


class Worker:
    """A process that trains one way, as `autoaccum run` starts it.

    Each has a heap of its own. In one process, what a way gives back to the kernel the next one has to ask for.
    """

    def __init__(self, name: str, way: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.lanes.price", name, way],
            env=page_cache.environment(page_cache.CACHED, dict(os.environ)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._asks, self._answers = self._process.stdin, self._process.stdout

    def window(self) -> list[float]:
        """Train two windows; return the second one's seconds.

        By the clock, and of the processor.
        """
        print("window", file=self._asks, flush=True)
        return [float(each) for each in self._answers.readline().split()]

    def end(self) -> None:
        """End the process."""
        self._asks.close()
        self._process.wait()


def work(name: str, way: str) -> None:
    """Train windows as they are asked for, and print their seconds."""
    torch.set_num_threads(1)
    model, batch = made(name, torch.float32, SAMPLES)
    how, steps = WAYS[way]
    workload = Workload(model, batch, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), batchnorm=how)
    context, sizes = open_context(workload), (SAMPLES // steps,) * steps
    for _ in sys.stdin:
        for _ in range(2):  # another process' window was between: caches are cold in the first
            pieces = list(zip(*(leaf.split(sizes) for leaf in batch), strict=True))
            begun, used = time.perf_counter(), time.process_time()
            train_window(context, pieces, sizes)
            seconds = time.perf_counter() - begun, time.process_time() - used
        print(*seconds, flush=True)


def timed(name: str) -> Row:
    """Time a model's windows, in turns.

    Whole, plain, exact as planned for a CPU, and in lanes.
    """
    workers = {way: Worker(name, way) for way in WAYS}
    seconds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for turn in range(ROUNDS + 1):
        for way, worker in workers.items():
            found = worker.window()
            if turn:
                seconds[way].append(found)
    for worker in workers.values():
        worker.end()
    clock, processor = ({way: [each[i] for each in found] for way, found in seconds.items()} for i in (0, 1))
    return {
        "model": name,
        **{f"{way}, s": f"{statistics.median(each):.3f}" for way, each in clock.items()},
        "planned / plain": f"{_ratio(clock, 'planned', 'plain'):.2f}",
        "lanes / plain": f"{_ratio(clock, 'lanes', 'plain'):.2f}",
        "the same, processor time": f"{_ratio(processor, 'lanes', 'plain'):.2f}",
    }


def _ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median over turns of one way's time by another's."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


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


if __name__ == "__main__":
    work(*sys.argv[1:])
