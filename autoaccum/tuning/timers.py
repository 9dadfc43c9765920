"""What a search times with: configurations trained in copies of this process, one by itself or several in turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..configuration import Configuration, allocator_settings
from ..processes import function_pipe
from ..processes.fork import ForkFailed, in_copy
from .memory import Answer
from .study import Timer, Turns

if TYPE_CHECKING:
    from ..workload import Workload


@dataclass(frozen=True)
class Training:
    """What every configuration is trained with.

    Attributes:
        workload: Its source; None for the function that this process was handed.
        device: "cpu" or "cuda".
        malloc: "fixed" or "default", as for `fit_plan`.
        from_loader: Whether windows come from the workload's loader, and loading is part of their time.
    """

    workload: str | None
    device: str
    malloc: str
    from_loader: bool


def timer(training: Training) -> Timer:
    """Times a configuration by itself, in a copy of this process."""
    from ..devices.oom import is_out_of_memory

    def timed(configuration: Configuration, answer: Answer, best: float | None) -> list[float]:
        def work() -> list[float]:
            from .measure import timed_windows

            made = _made(training, configuration, answer)
            return timed_windows(made, answer.split, best=best, from_loader=training.from_loader)

        try:
            return in_copy(work, own_thread=False, is_out_of_memory=is_out_of_memory)
        except ForkFailed as error:
            raise RuntimeError(str(error)) from None

    return timed


def turns(training: Training, say: Callable[[str], None]) -> Turns:
    """Times several in turn, each in a copy of this process."""
    from .measure import endless_windows
    from .turns import Windows, in_turn

    def work(configuration: Configuration, answer: Answer) -> Windows:
        made = _made(training, configuration, answer)
        return endless_windows(made, answer.split, from_loader=training.from_loader)

    def timed(
        asked: dict[int, tuple[Configuration, Answer]], most_seconds: float
    ) -> tuple[dict[int, list[float]], dict[int, str]]:
        works = {number: lambda pair=pair: work(*pair) for number, pair in asked.items()}
        return in_turn(works, most_seconds, say)

    return timed


def _made(training: Training, configuration: Configuration, answer: Answer) -> Workload:
    """The configured workload, in a process that was made for it and is settled for it."""
    from ..process_memory import MMAP_THRESHOLD_BYTES
    from ..processes.child import die_with_parent
    from ..processes.workload_source import load_workload
    from .apply import configure
    from .measure import settle

    die_with_parent()
    on_cuda = training.device == "cuda"
    if configuration.expandable_segments:
        os.environ.update(allocator_settings(os.environ))
    settle(
        threshold_bytes=None if on_cuda or training.malloc == "default" else MMAP_THRESHOLD_BYTES,
        room_bytes=None if on_cuda else answer.peak_bytes,
    )
    made = load_workload(training.workload, training.device)
    if on_cuda:
        made.model.to("cuda")
    return configure(made, configuration, function_pipe.functions().extra)
