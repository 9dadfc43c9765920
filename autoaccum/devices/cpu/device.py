"""The CPU as a device to plan for: how it is recorded, replayed and measured.

A device is a module with these names; `planning/fit.py` calls no others.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ... import process_memory
from ...budget import Budget
from ...errors import UsageError
from ...phases import FIRST, LATER, OnPhase
from ...process_memory import Heap, read_heap
from ...simulation.malloc import CpuRules, HeapState, Replay, in_use_peaks, mapping_bytes, replay
from ...simulation.recording import Phase, Recording
from .budget import read_cpu_budget
from .heap_holes import filled as holes_filled
from .recorder import apart, profiler_is_on, record

__all__ = [
    "AGREES_WITHIN",
    "LIFTS_WITHIN",
    "MOST_SAMPLES",
    "PARTS",
    "SCOUT_STEPS",
    "Base",
    "Measured",
    "clean",
    "holes_filled",
    "input_bytes",
    "measure",
    "name",
    "prepare",
    "read_base",
    "read_budget",
    "read_heap",
    "record",
    "run",
    "unrecorded_bytes",
]

name = "cpu"
AGREES_WITHIN = 0.005  # a recording that was predicted this well needs no further one
LIFTS_WITHIN = 0.03  # a program that is this wrong about the next recording is no program
PARTS = (0.5, 0.8)  # of the answer: where to record, once it is roughly known
SCOUT_STEPS = 1  # micro-batches of the very first window recorded
MOST_SAMPLES = None  # recording may take as many samples as it needs


@dataclass(frozen=True)
class Measured:
    """What a real run took, in bytes above where it began.

    Attributes:
        baseline_bytes: Committed bytes where it began.
        increment_bytes: Committed bytes above that.
        resident_bytes: The most of the whole process that was resident at once.
        seconds: What it took.
        system_share: Part of the processor time that the kernel took.
    """

    baseline_bytes: int
    increment_bytes: int
    resident_bytes: int
    seconds: float
    system_share: float


@dataclass(frozen=True)
class Base:
    """Where training begins.

    Attributes:
        bytes: Committed by a fresh process, the holes in its heap included.
        fresh: These holes. They are of use to small blocks only.
        here: The holes in this process's heap.
        own_bytes: What this process has committed beside that, for planning's own objects and threads.
    """

    bytes: int
    fresh: HeapState
    here: HeapState
    own_bytes: int = 0


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


def read_base(before: Heap, after: Heap | None = None) -> Base:
    """What the process has committed without training, as a fresh one would.

    Buffers that libraries allocate on first use belong to it, so it is read after a window. The heap counts with what
    is in use now, or with all it had taken before anything was trained, whichever is more: holes that training left
    aren't there in a fresh process, those that were there before it are, as far as nothing lasting has filled them.

    Outside of malloc, training takes nothing more once its first window is done: what has grown there since then is
    planning's own (Python's objects, stacks of threads), some 10 to 25 MiB.

    Args:
        before: The heap before anything was trained.
        after: The same after the first window; left out, all is taken to be training's.
    """
    heap = read_heap()
    holes = max(0, before.taken_bytes - (heap.taken_bytes - heap.free_bytes))
    own = max(0, heap.outside_bytes - after.outside_bytes) if after is not None else 0
    committed = process_memory.committed_bytes() - own
    return Base(committed - heap.free_bytes + holes, HeapState(holes), HeapState(heap.free_bytes), own)


def read_budget(memory: str | int | None, headroom: str | int | None) -> Budget:
    """What this process may commit."""
    return read_cpu_budget(memory, headroom)


def run(
    phases: list[Phase], threshold_bytes: int | None, start: HeapState | None = None, unrecorded_bytes: int = 0
) -> Replay:
    """Replays phases by the rules of malloc."""
    return replay(phases, CpuRules(threshold_bytes, unrecorded_bytes), start or HeapState())


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
    if threshold_bytes is None or process_memory.in_use_bytes() is None:
        return 0
    if profiler_is_on():
        # The last of two: in a copy of a process that has not trained, the first makes buffers that libraries keep.
        return apart(lambda: [_unrecorded_bytes(work, recording, threshold_bytes) for _ in range(2)][-1])
    # Twice: the first run may free what the recording's profiler left, which would be missing in the difference.
    return max(_unrecorded_bytes(work, recording, threshold_bytes) for _ in range(2))


def _unrecorded_bytes(work: Callable[[OnPhase], None], recording: Recording, threshold_bytes: int) -> int:
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


def input_bytes(tensor_bytes: int) -> int:
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
    own_user, own_system = sampler.own_seconds
    system = max(0.0, after.ru_stime - before.ru_stime - own_system)
    user = max(0.0, after.ru_utime - before.ru_utime - own_user)
    return Measured(
        baseline_bytes=sampler.baseline_bytes,
        increment_bytes=sampler.committed_peak_bytes - sampler.baseline_bytes,
        resident_bytes=sampler.resident_peak_bytes,
        seconds=seconds,
        system_share=system / max(system + user, 1e-9),
    )
