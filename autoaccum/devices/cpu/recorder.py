"""Record a window on the CPU with torch's profiler."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from ...errors import UsageError
from ...phases import OnPhase
from ...process_memory import trim
from ...processes.fork import ForkFailed, in_copy
from ...simulation.recording import Event, Phase, Recording, name_blocks
from ...torch_compat import end_inherited_profiler, is_profiler_on, profiler_events
from ..oom import is_out_of_memory
from .native_log import native_warnings_left_out

T = TypeVar("T")

_MARK = "autoaccum:"
_KINETOS = re.compile(rb"^[A-Z]+:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \d+:\d+ .*\n?", re.MULTILINE)  # Logger.cpp of kineto


def record(run: Callable[[OnPhase], None], *, micro_batch: int) -> Recording:
    """Record what a run of `step.train_window` allocates.

    A process has room for one profiler. Where the user's own is on, a forked copy of the process records; what the run
    changes it changes here as well, as the copy's changes are lost.

    Args:
        run: Called with the `on_phase` to hand on.
        micro_batch: Samples in each micro-batch of the run.

    Returns:
        The recording; what happens outside of phases is left out.

    Raises:
        UsageError: The user's profiler is on, and a copy of the process can't run the window.
    """
    if not profiler_is_on():
        return _record(run, micro_batch)
    recording = apart(lambda: _record(run, micro_batch))
    run(lambda name: contextlib.nullcontext())
    return recording


def profiler_is_on() -> bool:
    """Return whether the user's profiler watches this thread."""
    return is_profiler_on()


def apart(work: Callable[[], T]) -> T:
    """Work in a copy of the process without the user's profiler.

    Raises:
        UsageError: The copy can't do it.
    """
    try:
        return in_copy(work, prepare=end_inherited_profiler, is_out_of_memory=is_out_of_memory)
    except ForkFailed as error:
        raise UsageError(
            f"torch's profiler is on, and a forked copy of the process could not record ({error}).",
            "A process has room for one profiler, so a copy without it records.",
            "Plan before the profiler starts, or in a process of its own: autoaccum plan --workload FILE.py:FUNCTION",
        ) from None


def _record(run: Callable[[OnPhase], None], micro_batch: int) -> Recording:
    started = time.perf_counter()
    # Kineto writes lines of its own to the descriptor behind stderr when it starts and stops.
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr(), warnings.catch_warnings():
        # torch 2.11 and 2.12 warn that a second cycle would lose events: there is one. acc_events=True parses them all.
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        profiler.start()
    try:
        with native_warnings_left_out():
            run(_mark)
    finally:
        trim()  # the profiler's work on its events, up to hundreds of MiB, has the room that the window had
        with _quiet_stderr():
            profiler.stop()
    seconds = time.perf_counter() - started
    phases = _phases(profiler)
    passes = sum(phase.name in ("first", "later") for phase in phases)
    return Recording(micro_batch, phases, passes, seconds)


def _mark(name: str) -> AbstractContextManager[Any]:
    return torch.profiler.record_function(_MARK + name)


def _phases(profiler: torch.profiler.profile) -> tuple[Phase, ...]:
    raw: list[tuple[int, int, int]] = []
    spans: list[tuple[int, int, str]] = []
    for node in profiler_events(profiler):
        if node.tag.name == "Allocation":
            fields: Any = node.extra_fields
            if fields.device.type == "cpu" and fields.alloc_size:
                raw.append((node.start_time_ns, fields.ptr, fields.alloc_size))
        elif node.name.startswith(_MARK):
            spans.append((node.start_time_ns, node.end_time_ns, node.name.removeprefix(_MARK)))
    raw.sort(key=lambda entry: entry[0])
    events = name_blocks((address, size, 0) for _, address, size in raw)
    return _cut(events, [entry[0] for entry in raw], sorted(spans))


def _cut(events: list[Event], times: list[int], spans: list[tuple[int, int, str]]) -> tuple[Phase, ...]:
    """Sort events into phases.

    What is freed right after a phase ended still counts as its.
    """
    phases: list[list[Event]] = [[] for _ in spans]
    for event, moment in zip(events, times, strict=True):
        index = next((i for i in reversed(range(len(spans))) if spans[i][0] <= moment), None)
        if index is not None and (moment <= spans[index][1] or event.bytes < 0):
            phases[index].append(event)
    return tuple(Phase(name, tuple(found)) for (_, _, name), found in zip(spans, phases, strict=True))


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep Kineto's lines out of descriptor 2 for a moment.

    The descriptor is the whole process's, so whatever else other threads write there meanwhile is written afterwards.
    """
    try:
        kept = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    with os.fdopen(kept, "wb", closefd=True) as real, tempfile.TemporaryFile() as meanwhile:
        os.dup2(meanwhile.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real.fileno(), 2)
            meanwhile.seek(0)
            with contextlib.suppress(OSError):  # stderr may be full, or closed at its other end
                real.write(_KINETOS.sub(b"", meanwhile.read()))
                real.flush()
