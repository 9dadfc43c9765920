"""The CPU as a device to plan for: how it is recorded, replayed and measured.

A device is a module with these names; `fit.py` calls no others.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from . import process_memory
from .allocator import CpuRules, Replay, Start, mapping_bytes, replay
from .budget import Budget, read_cpu_budget
from .record_cpu import record
from .recording import Phase

__all__ = [
    "AGREES_WITHIN",
    "LIFTS_WITHIN",
    "MOST_SAMPLES",
    "SCOUT_STEPS",
    "Measured",
    "clean",
    "data_bytes",
    "measure",
    "name",
    "prepare",
    "read_base",
    "read_budget",
    "record",
    "run",
]

OnPhase = Callable[[str], AbstractContextManager[Any]]
name = "cpu"
AGREES_WITHIN = 0.005  # a recording that was predicted this well needs no further one
LIFTS_WITHIN = 0.03  # a program that is this wrong about the next recording is no program
SCOUT_STEPS = 1  # micro-batches of the very first window recorded
MOST_SAMPLES = None  # recording may take as many samples as it needs


@dataclass(frozen=True)
class Measured:
    """What a real run took, in bytes above where it began.

    Attributes:
        base_bytes: Committed bytes where it began.
        increment_bytes: Committed bytes above that.
        resident_bytes: The most of the whole process that was resident at once.
        seconds: What it took.
        system_share: Part of the processor time that the kernel took.
    """

    base_bytes: int
    increment_bytes: int
    resident_bytes: int
    seconds: float
    system_share: float


def prepare(malloc: str = "fixed") -> int | None:
    """Fixes malloc's threshold, which the plan then holds for; None where it stays the C library's own affair."""
    if malloc == "default":
        return process_memory.fixed_threshold_bytes()
    threshold = process_memory.MMAP_THRESHOLD_BYTES
    return threshold if process_memory.fix_mmap_threshold(threshold) else None


def clean() -> None:
    """Gives back what can be given back. Slow: the collector looks at every object that torch has."""
    gc.collect()
    process_memory.trim()


def read_base() -> tuple[int, Start]:
    """Committed bytes of the process now, without the free part of its heap, and that part.

    A fresh process has no such holes. They are only of use to small blocks.
    """
    free = process_memory.heap_free_bytes()
    return process_memory.committed_bytes() - free, Start(free)


def read_budget(memory: str | int | None, headroom: str | int | None) -> Budget:
    """What this process may commit."""
    return read_cpu_budget(memory, headroom)


def run(phases: list[Phase], threshold_bytes: int | None, start: Start | None = None) -> Replay:
    """Replays phases by the rules of malloc."""
    return replay(phases, CpuRules(threshold_bytes), start or Start())


def data_bytes(tensor_bytes: int) -> int:
    """What the window's own samples take: they lie in the same memory."""
    return mapping_bytes(tensor_bytes)


def measure(work: Callable[[], None]) -> Measured:
    """Runs `work` for real and watches the process."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with process_memory.PeakSampler() as sampler:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    user = after.ru_utime - before.ru_utime
    return Measured(
        base_bytes=sampler.base_bytes,
        increment_bytes=sampler.committed_peak_bytes - sampler.base_bytes,
        resident_bytes=sampler.resident_peak_bytes,
        seconds=seconds,
        system_share=system / max(system + user, 1e-9),
    )
