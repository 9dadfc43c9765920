"""Times optimizer steps of a configuration, in a process that ends with it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .. import process_memory
from ..data import split as cutting
from ..data.windows import Window, windows
from ..devices.registry import get_device
from ..simulation.solver import Split, split_within
from ..window import step
from ..workload import Workload
from .turns import WARM_UP

FEWEST, MOST, LONG_ENOUGH_SECONDS = 3, 30, 1.0  # windows; and when to stop between the two
HOPELESS = 2.0  # times the best so far: two windows tell enough


def timed_windows(
    workload: Workload, split: Split, *, best: float | None, from_loader: bool, fewest: int = FEWEST, most: int = MOST
) -> list[float]:
    """Seconds of whole windows, their optimizer step included, after two that aren't counted.

    Args:
        workload: What is trained, configured.
        split: Samples in each micro-batch.
        best: The best median so far: where the first two windows take twice as long, no other is run.
        from_loader: Whether windows come from the workload's loader, and loading is part of their time; else they are
            made of its sample, once, before.
        fewest: Windows at least.
        most: Windows at most.
    """
    seconds: list[float] = []
    for taken in endless_windows(workload, split, from_loader=from_loader):
        seconds.append(taken)
        if best is not None and len(seconds) == 2 and min(seconds) > HOPELESS * best:
            break
        if len(seconds) >= most or (len(seconds) >= fewest and sum(seconds) >= LONG_ENOUGH_SECONDS):
            break
    return seconds


def endless_windows(workload: Workload, split: Split, *, from_loader: bool) -> Iterator[float]:
    """Seconds of window after window, after two that aren't counted; the arguments are those of `timed_windows`."""
    context = step.open_context(replace(workload, scheduler=None))
    context.model.train()
    found = _from_loader(workload, split) if from_loader else _of_sample(workload, split)
    for number in itertools.count(1 - WARM_UP):
        started = time.perf_counter()
        window = next(found)
        step.train_window(context, window.pieces, window.sizes)
        get_device(context.device).synchronize()
        taken = time.perf_counter() - started
        if number > 0:
            yield taken


def _of_sample(workload: Workload, split: Split) -> Iterator[Window]:
    names = {"shared": workload.shared, "per_sample": workload.per_sample}
    pieces = {size: cutting.tile(workload.sample, size, **names) for size in set(split)}
    return itertools.repeat(Window(tuple(pieces[size] for size in split), split))


def _from_loader(workload: Workload, split: Split) -> Iterator[Window]:
    """Whole windows, epoch after epoch; the shorter last one of an epoch only where there is no other."""
    while True:
        loader: Any = workload.loader() if callable(workload.loader) else workload.loader
        whole = 0
        shared, per_sample = workload.shared, workload.per_sample
        for window in windows(
            loader, sum(split), lambda samples: _cut(split, samples), shared=shared, per_sample=per_sample
        ):
            whole += sum(window.sizes) == sum(split)
            if sum(window.sizes) == sum(split) or not whole:
                yield window


def _cut(split: Split, samples: int) -> Split:
    return split if samples == sum(split) else split_within(samples, split[0])


def settle(*, threshold_bytes: int | None, room_bytes: int | None) -> None:
    """Has this process train as the plan's would, and end where it takes far more memory than was predicted.

    Args:
        threshold_bytes: Malloc's setting; None for its default.
        room_bytes: What it may commit above what this process has now; None for no limit.
    """
    if threshold_bytes is not None:
        process_memory.fix_mmap_threshold(threshold_bytes)
    if room_bytes is not None:
        process_memory.limit_data(process_memory.committed_bytes() + room_bytes)
