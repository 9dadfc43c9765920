"""The CPU as a device to plan for: how it is recorded, replayed and measured.

A device is a module with these names; `fit.py` calls no others.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import process_memory
from .allocator import CpuRules, Replay, Start, in_use_peaks, mapping_bytes, replay
from .budget import Budget, read_cpu_budget
from .errors import UsageError
from .record_cpu import record
from .recording import FIRST, LATER, Phase, Recording
from .step import OnPhase

__all__ = [
    "Measured", "clean", "data_bytes", "measure", "name", "prepare", "read_base", "read_budget", "record", "run",
    "unrecorded_bytes",
]  # fmt: skip

name = "cpu"


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
    """Fixes malloc's threshold, which the plan then holds for; None where it stays the C library's own affair.

    Raises:
        UsageError: The default is asked for, and the threshold was fixed before in this process.
    """
    if malloc == "default":
        if process_memory.fixed_threshold_bytes() is not None:
            raise UsageError(
                "malloc='default' can't be had in this process any more: its mmap threshold is fixed.",
                "An earlier plan or Runner with malloc='fixed' did that, and the C library can't undo it.",
                "Plan in a fresh process (autoaccum plan --malloc default), or with malloc='fixed'.",
            )
        return None
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


def run(
    phases: list[Phase], threshold_bytes: int | None, start: Start | None = None, unrecorded_bytes: int = 0
) -> Replay:
    """Replays phases by the rules of malloc."""
    return replay(phases, CpuRules(threshold_bytes, unrecorded_bytes), start or Start())


def unrecorded_bytes(work: Callable[[OnPhase], None], recording: Recording, threshold_bytes: int | None) -> int:
    """What a micro-batch makes that its recording doesn't show: autograd's nodes, Python's objects.

    They don't depend on the batch, so a small one tells. The window is run again without the profiler, whose own
    events would drown them, and what malloc has handed out is compared with what it would have for the recorded blocks.

    Args:
        work: Runs the recorded window once more.
        recording: Of that window.
        threshold_bytes: Malloc's threshold; where it isn't fixed, a quarter is reckoned on top and this is part of it.

    Returns:
        The most by which the first or the later micro-batch exceeds its recording, at least 0.
    """
    before = process_memory.in_use_bytes()
    if threshold_bytes is None or before is None:
        return 0
    peaks: dict[str, int] = {}
    present = ""

    def look() -> None:
        peaks[present] = max(peaks.get(present, 0), process_memory.in_use_bytes() or 0)

    @contextmanager
    def on_phase(name: str) -> Iterator[None]:
        nonlocal present
        present = name
        try:
            yield
        finally:
            present = ""

    collects = gc.isenabled()
    gc.disable()  # what it frees meanwhile would be missing in the difference
    try:
        with process_memory.Watcher(look):
            before = process_memory.in_use_bytes() or 0
            work(on_phase)
    finally:
        if collects:
            gc.enable()
    recorded = in_use_peaks(recording.phases, threshold_bytes)
    seen = [peaks[name] - before - recorded[name] for name in (FIRST, LATER) if name in peaks and name in recorded]
    return max([0, *seen])


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
