"""Plan for the CPU, in committed bytes.

Windows are recorded by torch's profiler and replayed by the rules of malloc.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch

from ... import process_memory
from ...budget import Budget
from ...phases import FIRST, LATER
from ...process_memory import Heap
from ...simulation.malloc import CpuRules, HeapState, Replay, in_use_peaks, mapping_bytes, replay
from ...simulation.recording import Phase, Recording
from ...simulation.solver import Split
from ..base import MALLOC, Device, Measurement, RecordingPolicy, Window
from . import heap_holes, page_cache, recorder
from .budget import read_cpu_budget
from .library_buffers import free_library_buffers
from .page_cache import MallocSetting
from .peak_sampler import PeakSampler, Watcher


@dataclass(frozen=True)
class CpuMeasurement(Measurement):
    """The memory and time of windows that were run.

    Attributes:
        baseline_bytes: Committed bytes before they ran.
        increment_bytes: Committed bytes above that, at most.
        resident_bytes: Peak of the resident bytes of the whole process.
        system_share: Fraction of the processor time that was spent in the kernel.
    """

    baseline_bytes: int
    increment_bytes: int
    resident_bytes: int
    system_share: float


@dataclass(frozen=True)
class Baseline:
    """What the process has committed before training.

    Attributes:
        bytes: Committed by a new process, the free part of its heap included.
        new_process: The free part of a new process's heap. Only small blocks can use it.
        this_process: The free part of this process's heap.
        planning_bytes: What this process uses beside that now: planning's own objects and threads, and what libraries
            keep for windows of other sizes.
    """

    bytes: int
    new_process: HeapState
    this_process: HeapState
    planning_bytes: int = 0


class CpuDevice(Device):
    """The CPU."""

    kind = "cpu"
    memory_model = MALLOC
    policy = RecordingPolicy(
        first_step_micro_batches=1,
        answer_fractions=(0.5, 0.8),
        agreement=0.005,
        max_lift_error=0.03,
        max_samples_per_answer=None,
    )

    setting = MallocSetting(page_cache.FIXED, process_memory.MMAP_THRESHOLD_BYTES)  # until `prepare`

    @property
    def name(self) -> str:
        """Return "cpu"."""
        return self.kind

    @property
    def keeps_pages(self) -> bool:
        """Return whether tensors come from the page cache."""
        return self.setting.name == page_cache.CACHED

    def prepare(self, malloc: str = page_cache.CACHED) -> int | None:
        """Give this process malloc's setting, or what comes closest to it.

        Returns:
            The mmap threshold in bytes; None where malloc keeps its default, or is not glibc's.

        Raises:
            UsageError: The default is asked for, and the threshold was fixed before in this process.
        """
        self.setting = page_cache.apply(malloc)
        return self.setting.mmap_threshold_bytes

    def record(self, run: Window, *, micro_batch: int) -> Recording:
        """Record a window with torch's profiler."""
        free_library_buffers()
        recording = recorder.record(run, micro_batch=micro_batch)
        return replace(recording, library_bytes=free_library_buffers())

    def unrecorded_bytes(self, run: Window, recording: Recording, threshold_bytes: int | None) -> int:
        """Measure what a micro-batch allocates beside its recording: autograd's nodes, Python's objects.

        They do not depend on the batch, so a small one shows them. The window runs again without the profiler, whose
        own events would hide them, and what malloc has handed out is compared with what the recorded blocks amount to.

        Args:
            run: Runs the recorded window once more.
            recording: Of that window.
            threshold_bytes: Malloc's threshold. Without one the prediction has a margin that includes these bytes.

        Returns:
            The most by which the first or the later micro-batch exceeds its recording, at least 0.
        """
        if threshold_bytes is None or process_memory.in_use_bytes() is None:
            return 0
        rules = CpuRules(threshold_bytes, keeps_pages=self.keeps_pages)

        def of_the_second() -> int:
            """Measure twice, and return the second.

            The first run makes what libraries keep, and may free what the profiler left.
            """
            return [_unrecorded_bytes(run, recording, rules) for _ in range(2)][-1]

        return recorder.apart(of_the_second) if recorder.profiler_is_on() else of_the_second()

    def replay(
        self,
        phases: Sequence[Phase],
        threshold_bytes: int | None,
        start: HeapState | None = None,
        unrecorded_bytes: int = 0,
    ) -> Replay:
        """Replay phases by the rules of malloc."""
        return replay(list(phases), CpuRules(threshold_bytes, unrecorded_bytes, self.keeps_pages), start or HeapState())

    def input_bytes(self, tensor_bytes: int) -> int:
        """Return the samples' bytes as memory mappings.

        They lie in the memory that is trained in.
        """
        return mapping_bytes(tensor_bytes, CpuRules(None, keeps_pages=self.keeps_pages).overhead_bytes)

    def measure(self, train: Callable[..., None], windows: Sequence[Split]) -> CpuMeasurement:
        """Train windows and watch the process. All of them are timed."""
        process_memory.trim()  # what the page cache keeps is committed before, and would not be seen to be taken
        before = resource.getrusage(resource.RUSAGE_SELF)
        with PeakSampler() as sampler:
            started = time.perf_counter()
            for split in windows:
                train(split)
            seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
        own_user, own_system = sampler.own_seconds
        system = max(0.0, after.ru_stime - before.ru_stime - own_system)
        user = max(0.0, after.ru_utime - before.ru_utime - own_user)
        return CpuMeasurement(
            seconds=seconds,
            baseline_bytes=sampler.baseline_bytes,
            increment_bytes=sampler.committed_peak_bytes - sampler.baseline_bytes,
            resident_bytes=sampler.resident_peak_bytes,
            system_share=system / max(system + user, 1e-9),
        )

    def read_budget(self, memory: str | int | None = None, headroom: str | int | None = None) -> Budget:
        """Read what this process may commit."""
        return read_cpu_budget(memory, headroom)

    def read_baseline(self, before: Heap, after: Heap | None = None) -> Baseline:
        """Read what a new process has committed before training.

        What libraries make on first use belongs to it (oneDNN's compiled code, threads), so it is read after a window
        that nothing recorded: the profiler's thread, recordings, and the code for each further size are planning's. The
        heap counts with what was in use then, or with all it had before anything was trained, whichever is more: free
        parts that training left are not in a new process, those from before are, as far as nothing lasting has filled
        them.

        Args:
            before: The heap before anything was trained.
            after: The heap after such a window, without its gradients and state; None to read it now.
        """
        now = process_memory.read_heap()
        after = now if after is None else after
        free = max(0, before.taken_bytes - (after.taken_bytes - after.free_bytes))
        used = after.outside_bytes + after.in_use_bytes
        own = max(0, now.outside_bytes + now.in_use_bytes - used)
        return Baseline(used + free, HeapState(free), HeapState(now.free_bytes), own)

    def limit_memory(self, limit_bytes: int) -> None:
        """Limit the process's committed bytes (RLIMIT_DATA)."""
        process_memory.limit_data(limit_bytes)

    def free_bytes(self) -> int:
        """Return what the machine and the limits on this process leave."""
        kept = process_memory.read_page_cache().kept_bytes
        return read_cpu_budget(headroom=0).limit_bytes - process_memory.committed_bytes() + kept

    def held_bytes(self) -> int:
        """Return the committed bytes."""
        return process_memory.committed_bytes()

    def lifetime_peak_bytes(self) -> int:
        """Return the peak of the resident bytes.

        The kernel keeps none of the committed ones.
        """
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def read_heap(self) -> Heap:
        """Return the state of malloc's heap."""
        return process_memory.read_heap()

    def holes_filled(self, threshold_bytes: int | None) -> AbstractContextManager[int]:
        """Occupy the holes in malloc's heap from the threshold on.

        The page cache's blocks go into none.
        """
        return heap_holes.filled(None if self.keeps_pages else threshold_bytes)

    def clean(self) -> None:
        """Collect garbage; trim the heap, the page cache, and libraries' buffers."""
        gc.collect()
        free_library_buffers()
        process_memory.trim()


def open_device(torch_device: torch.device) -> CpuDevice:
    """Return the device object; called by devices/registry.py."""
    return CpuDevice(torch_device)


def _unrecorded_bytes(run: Window, recording: Recording, rules: CpuRules) -> int:
    peaks: dict[str, int] = {}
    phase = ""

    def sample() -> None:
        peaks[phase] = max(peaks.get(phase, 0), process_memory.in_use_bytes() or 0)

    @contextmanager
    def on_phase(name: str) -> Iterator[None]:
        nonlocal phase
        phase = name
        try:
            yield
        finally:
            phase = ""

    collects = gc.isenabled()
    gc.disable()  # what it frees meanwhile would be missing in the difference
    try:
        with Watcher(sample):
            before = process_memory.in_use_bytes() or 0
            run(on_phase)
    finally:
        if collects:
            gc.enable()
    recorded = in_use_peaks(recording.phases, rules)
    seen = [peaks[name] - before - recorded[name] for name in (FIRST, LATER) if name in peaks and name in recorded]
    return max([0, *seen])
