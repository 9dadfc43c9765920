"""Time a configuration's optimizer steps, alone or in turn."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .. import process_memory
from ..configuration import Configuration, allocator_settings
from ..data import split as cutting
from ..data.window import Window
from ..data.windows import windows
from ..devices.cpu import page_cache
from ..devices.oom import is_out_of_memory
from ..devices.registry import get_device
from ..processes.child import die_with_parent
from ..processes.fork import ForkFailed, in_copy
from ..processes.workload_source import load_workload
from ..simulation.solver import Split, split_within
from ..window import step
from ..workload import Workload
from .apply import configure
from .finals import WARM_UP_WINDOWS, Windows, in_turn
from .fit_check import FitAnswer
from .search import Contenders, Timer, TurnTimer

MIN_WINDOWS, MAX_WINDOWS, ENOUGH_SECONDS = 3, 30, 1.0  # stop between the two once the windows took that long
HOPELESS_TIME_RATIO = 2.0  # of the best time so far: two windows decide


@dataclass(frozen=True)
class TrialTraining:
    """How every configuration is trained while it is timed.

    Attributes:
        workload: The workload's source; None for the function that this process was given.
        device: "cpu" or "cuda".
        malloc: "cached", "fixed" or "default", as for `fit_plan`.
        from_loader: Whether windows come from the workload's loader, so that loading is timed too.
    """

    workload: str | None
    device: str
    malloc: str
    from_loader: bool


def make_timer(training: TrialTraining) -> Timer:
    """Return a function that times one configuration in a copy."""

    def timed(configuration: Configuration, answer: FitAnswer, best_seconds: float | None) -> list[float]:
        def work() -> list[float]:
            workload = _prepared(training, configuration, answer)
            return timed_windows(workload, answer.split, best=best_seconds, from_loader=training.from_loader)

        try:
            return in_copy(work, own_thread=False, is_out_of_memory=is_out_of_memory)
        except ForkFailed as error:
            raise RuntimeError(str(error)) from None

    return timed


def make_turn_timer(training: TrialTraining, progress: Callable[[str], None]) -> TurnTimer:
    """Return a function that times several configurations in turn."""

    def work(configuration: Configuration, answer: FitAnswer) -> Windows:
        workload = _prepared(training, configuration, answer)
        return endless_windows(workload, answer.split, from_loader=training.from_loader)

    def timed(chosen: Contenders, max_seconds: float) -> tuple[dict[int, list[float]], dict[int, str]]:
        works = {number: lambda pair=pair: work(*pair) for number, pair in chosen.items()}
        return in_turn(works, max_seconds, progress)

    return timed


def _prepared(training: TrialTraining, configuration: Configuration, answer: FitAnswer) -> Workload:
    """Return the configured workload, under the plan's settings and limit."""
    die_with_parent()
    on_cuda = training.device == "cuda"
    if configuration.expandable_segments:
        os.environ.update(allocator_settings(os.environ))
    if not on_cuda:
        if training.malloc != page_cache.DEFAULT:
            page_cache.apply(training.malloc)
        process_memory.limit_data(process_memory.committed_bytes() + answer.peak_bytes)
    workload = load_workload(training.workload, training.device)
    if on_cuda:
        workload.model.to("cuda")
    return configure(workload, configuration)


def timed_windows(
    workload: Workload,
    split: Split,
    *,
    best: float | None,
    from_loader: bool,
    min_windows: int = MIN_WINDOWS,
    max_windows: int = MAX_WINDOWS,
) -> list[float]:
    """Return the seconds of whole windows, optimizer step included, after the warm-up.

    Args:
        workload: What is trained, configured.
        split: Samples in each micro-batch.
        best: The best median so far; if the first two windows take twice as long, no other is run.
        from_loader: Whether windows come from the workload's loader, and loading counts; else they are made of its
            sample, once, before.
        min_windows: The fewest windows.
        max_windows: The most windows.
    """
    found: list[float] = []
    for seconds in endless_windows(workload, split, from_loader=from_loader):
        found.append(seconds)
        if best is not None and len(found) == 2 and min(found) > HOPELESS_TIME_RATIO * best:
            break
        if len(found) >= max_windows or (len(found) >= min_windows and sum(found) >= ENOUGH_SECONDS):
            break
    return found


def endless_windows(workload: Workload, split: Split, *, from_loader: bool) -> Iterator[float]:
    """Yield the seconds of window after window, after the warm-up."""
    context = step.open_context(replace(workload, scheduler=None))
    context.model.train()
    source = _from_loader(workload, split) if from_loader else _of_sample(workload, split)
    for number in itertools.count(1 - WARM_UP_WINDOWS):
        started = time.perf_counter()
        window = next(source)
        step.train_window(context, window.pieces, window.sizes)
        get_device(context.device).synchronize()
        seconds = time.perf_counter() - started
        if number > 0:
            yield seconds


def _of_sample(workload: Workload, split: Split) -> Iterator[Window]:
    names = {"shared": workload.shared, "per_sample": workload.per_sample}
    pieces = {size: cutting.tile(workload.sample, size, **names) for size in set(split)}
    return itertools.repeat(Window(tuple(pieces[size] for size in split), split))


def _from_loader(workload: Workload, split: Split) -> Iterator[Window]:
    """Yield whole windows from the loader, epoch after epoch."""
    shared, per_sample = workload.shared, workload.per_sample
    while True:
        loader: Any = workload.loader() if callable(workload.loader) else workload.loader
        whole = 0
        for window in windows(
            loader, sum(split), lambda samples: _cut(split, samples), shared=shared, per_sample=per_sample
        ):
            whole += sum(window.sizes) == sum(split)
            if sum(window.sizes) == sum(split) or not whole:
                yield window


def _cut(split: Split, samples: int) -> Split:
    return split if samples == sum(split) else split_within(samples, split[0])
