"""Train one candidate for a few windows, limited to the budget.

Windows are made of the workload's sample, so that training is timed and not a loader.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from ...data import split as cutting
from ...devices import oom
from ...devices.base import CACHING_ALLOCATOR, Device
from ...devices.cpu.peak_sampler import PeakSampler
from ...devices.registry import get_device
from ...plan import Plan
from ...process_memory import trim
from ...processes.child import Say
from ...runner.runner import Runner
from ...window import step
from ...workload import Workload
from ..apply import configure

ENOUGH_SECONDS, MIN_WINDOWS = 30.0, 2


def train_candidate(
    *,
    say: Say,
    workload: str,
    limit_bytes: int,
    windows: int,
    target_batch: int,
    micro_batch: int,
    steps: int,
    halves: bool,
    plan: str | None,
    device: str,
) -> dict[str, Any]:
    """Train a candidate; return fields of `candidates.Trained` that only the run knows."""
    say({"say": "loading torch and the workload"})
    from ...processes.workload_source import load_workload

    read = Plan.from_json(plan) if plan is not None else None
    loaded = _with_sample(load_workload(workload, device))
    loaded.model.to(device)
    target = get_device(torch.device(device))
    target.limit_memory(limit_bytes)
    meter = PeakMeter(target)
    loop = _by_plan(loaded, read) if read is not None else _plain(loaded)
    started, ooms, size, failure = time.perf_counter(), 0, micro_batch, ""
    while True:
        sizes = (size,) * (target_batch // size if halves else steps)
        say({"say": f"{len(sizes)} micro-batches of {size}"})
        try:
            found = _timed(loop, target_batch if read is not None else sum(sizes), sizes, windows, meter)
            break
        except (RuntimeError, MemoryError) as error:
            if not oom.is_out_of_memory(error):
                raise
            failure = oom.drop_frames(error)
        ooms += 1
        oom.collect()
        trim()
        if not halves or size == 1:
            return {
                "micro_batch": size,
                "steps": len(sizes),
                "effective_batch": 0,
                "ooms": ooms,
                "why": f"ran out of memory ({failure})",
                "peak_bytes": meter.peak_bytes,
                "search_seconds": time.perf_counter() - started,
            }
        size //= 2
    trained: tuple[int, ...] = found["split"]
    return {
        "micro_batch": max(trained),
        "steps": len(trained),
        "effective_batch": sum(trained),
        "window_seconds": found["seconds"] if target.computes else [],
        "ooms": ooms + found["retries"],
        "search_seconds": found["began"] - started,
        "peak_bytes": meter.peak_bytes,
    }


Loop = Callable[[int, tuple[int, ...]], tuple[tuple[int, ...], int]]


def _timed(loop: Loop, samples: int, sizes: tuple[int, ...], windows: int, meter: PeakMeter) -> dict[str, Any]:
    """Run a metered window, timed ones, and a metered one."""
    began, retries = time.perf_counter(), 0
    seconds: list[float] = []
    with meter.metering():
        split, again = loop(samples, sizes)
    retries += again
    while len(seconds) < windows and not (len(seconds) >= MIN_WINDOWS and sum(seconds) > ENOUGH_SECONDS):
        meter.synchronize()
        started = time.perf_counter()
        split, again = loop(samples, sizes)
        meter.synchronize()
        seconds.append(time.perf_counter() - started)
        retries += again
    with meter.metering():
        split, again = loop(samples, sizes)
    return {"split": split, "seconds": seconds, "retries": retries + again, "began": began}


def _plain(workload: Workload) -> Loop:
    """Return a plain loop: equal micro-batches and an optimizer step."""
    context = step.open_context(workload)
    context.model.train()

    def loop(samples: int, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        pieces = [_tile(workload, size) for size in sizes]
        context.model.zero_grad(set_to_none=True)
        step.train_window(context, pieces, sizes)
        return sizes, 0

    return loop


def _by_plan(workload: Workload, plan: Plan) -> Loop:
    """Return a loop that steps the Runner with a plan."""
    if plan.schedule.configuration:
        workload = configure(workload, plan)
    runner = Runner(workload, plan)

    def loop(samples: int, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        result = runner.step(_tile(workload, samples))
        return result.split, result.retries

    return loop


def _tile(workload: Workload, samples: int) -> Any:
    return cutting.tile(workload.sample, samples, shared=workload.shared, per_sample=workload.per_sample)


def _with_sample(workload: Workload) -> Workload:
    from ...data.sample import with_sample

    return with_sample(workload)[0]


class PeakMeter:
    """Measure peak bytes committed by the process, or reserved on the GPU."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.peak_bytes = 0

    @contextmanager
    def metering(self) -> Any:
        """Measure until exit, also if the body fails."""
        if self._device.memory_model == CACHING_ALLOCATOR:
            try:
                yield
            finally:
                self.peak_bytes = max(self.peak_bytes, self._device.lifetime_peak_bytes())
            return
        sampler = PeakSampler()
        try:
            with sampler:
                yield
        finally:
            self.peak_bytes = max(self.peak_bytes, sampler.committed_peak_bytes)

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        self._device.synchronize()
