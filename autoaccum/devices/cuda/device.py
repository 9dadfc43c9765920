"""Plan for a CUDA device, in reserved bytes.

Windows are recorded by the caching allocator's history and replayed by its rules.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ...budget import Budget
from ...errors import UsageError
from ...phases import OnPhase
from ...simulation.cuda_allocator.allocator import AllocatorState, CudaRules
from ...simulation.cuda_allocator.replay import replay_cuda
from ...simulation.cuda_allocator.ties import LATEST_KNOWN, minor_version, tie_rule_of
from ...simulation.malloc import HeapState, Replay
from ...simulation.recording import Event, Phase, Recording, live_peak
from ...simulation.solver import Split
from ...torch_compat import allocator_settings, clear_cublas_workspaces, memory_fraction, set_memory_fraction
from ..base import CACHING_ALLOCATOR, Device, Measurement, RecordingPolicy, Window
from . import recorder, workspaces
from .allocator_rules import find_rules, read_state
from .budget import read_cuda_budget

T = TypeVar("T")


@dataclass(frozen=True)
class CudaMeasurement(Measurement):
    """The memory and time of windows that were run.

    `seconds` are of the windows after the first.

    Attributes:
        peak_bytes: Peak of the reserved bytes.
        allocated_bytes: Peak of the bytes handed out.
        retries: How often the allocator gave its cache back to make room, in each window.
        recording: Of the first window; None where the user's own memory history kept too little of it.
        kept: Whether cuBLAS kept its workspaces.
    """

    peak_bytes: int
    allocated_bytes: int
    retries: tuple[int, ...]
    recording: Recording | None = None
    kept: bool = False


class CudaDevice(Device):
    """A CUDA device.

    A byte counts as used when the caching allocator has reserved it from the driver.
    """

    kind = "cuda"
    memory_model = CACHING_ALLOCATOR
    policy = RecordingPolicy(
        first_step_micro_batches=2,
        answer_fractions=(0.5, 0.95),  # the nearer to the answer, the less is extrapolated
        agreement=0.0,  # a few MiB decide one micro-batch more or less
        max_lift_error=None,  # workspaces saturate
        max_samples_per_answer=3.0,
    )

    @property
    def name(self) -> str:
        """Return the name that the driver reports, like "NVIDIA A100-SXM4-40GB"."""
        return torch.cuda.get_device_name(self.torch_device)

    @property
    def index(self) -> int:
        """Return the device's number; the current one's where none was named."""
        index = self.torch_device.index
        return torch.cuda.current_device() if index is None else int(index)

    def settings_words(self) -> dict[str, str]:
        """Describe the allocator's settings and rule, and cuDNN's setting.

        Settings from the environment, or set since.
        """
        text = allocator_settings().get("PYTORCH_CUDA_ALLOC_CONF") or "as it comes"
        rule = tie_rule_of(torch.__version__) or find_rules(self.index).tie_rule
        words = {"allocator": text, "allocator reuses": rule}
        return words | ({"cudnn": "benchmark"} if torch.backends.cudnn.benchmark else {})

    def prepare(self, malloc: str = "cached") -> int | None:
        """Find the allocator's rules, while memory for their test is free.

        Returns:
            None: the C library's malloc does not matter here.
        """
        find_rules(self.index)
        return None

    def record(self, run: Window, *, micro_batch: int) -> Recording:
        """Record a window from an empty cache.

        So fragments of smaller sizes are not in its way.

        cuBLAS's workspaces go first: they lie in the middle of large segments, which stay reserved until then.
        """
        if torch.backends.cudnn.benchmark:
            run(lambda name: contextlib.nullcontext())  # the first run at a new size tries large workspaces
        self.release_cache()
        return recorder.record(run, micro_batch=micro_batch)

    def record_build(self, make: Callable[[], T]) -> tuple[T, tuple[Event, ...]]:
        """Call a function with the allocator's history on.

        Returns:
            Its result, and the blocks that were handed out and taken back meanwhile.
        """
        return recorder.record_build(make, self.index)

    def replay(
        self,
        phases: Sequence[Phase],
        threshold_bytes: int | None,
        start: HeapState | None = None,
        unrecorded_bytes: int = 0,
    ) -> Replay:
        """Replay phases from an empty allocator without a limit.

        The malloc arguments do not matter here.
        """
        found = replay_cuda(phases, self.read_rules())
        return Replay(found.peak_reserved_bytes, live_peak(phases), found.phases)

    def input_bytes(self, tensor_bytes: int) -> int:
        """Return 0: samples wait on the host.

        Those of the current micro-batch are in the recording.
        """
        return 0

    def measure(self, train: Callable[..., None], windows: Sequence[Split]) -> CudaMeasurement:
        """Train windows, record the first of them, and read the allocator's statistics.

        cuBLAS's workspaces are cleared before.
        """
        at, retries = self.torch_device, []
        if torch.backends.cudnn.benchmark:
            train(windows[0])  # trying algorithms uses memory that is given back when it is short: it decides nothing
            torch.cuda.empty_cache()
        torch.cuda.synchronize(at)
        torch.cuda.reset_peak_memory_stats(at)
        recording: Recording | None = None
        started = 0.0
        for index, split in enumerate(windows):
            before = self.cache_releases()
            if index == 0:
                recording = self._train_recorded(train, split)
                started = time.perf_counter()
            else:
                train(split)
            retries.append(self.cache_releases() - before)
        torch.cuda.synchronize(at)
        return CudaMeasurement(
            seconds=time.perf_counter() - started,
            peak_bytes=torch.cuda.max_memory_reserved(at),
            allocated_bytes=torch.cuda.max_memory_allocated(at),
            retries=tuple(retries),
            recording=recording,
        )

    def _train_recorded(self, train: Callable[..., None], split: Split) -> Recording | None:
        """Train a window and record it.

        Nothing is cleared from the cache before it.
        """
        trained = False

        def run(on_phase: OnPhase) -> None:
            nonlocal trained
            train(split, on_phase)
            trained = True

        try:
            return recorder.record(run, micro_batch=split[0], device=self.torch_device)
        except UsageError:
            if not trained:
                raise
            return None

    def cache_releases(self) -> int:
        """Return the allocator's retries, each of which gives its cache back."""
        statistics: dict[str, Any] = torch.cuda.memory_stats(self.torch_device)
        return int(statistics.get("num_alloc_retries", 0))

    def read_budget(self, memory: str | int | None = None, headroom: str | int | None = None) -> Budget:
        """Read what the caching allocator may reserve."""
        return read_cuda_budget(self.torch_device, memory, headroom)

    def read_rules(self) -> CudaRules:
        """Read the allocator's settings in this process, without a limit on memory."""
        total, reuse = self.total_bytes(), find_rules(self.index)
        fraction = memory_fraction(self.index)
        version = minor_version(torch.__version__) or LATEST_KNOWN
        found = CudaRules.from_snapshot(allocator_settings(), device_bytes=total, version=version)
        allowed = int(fraction * total) if fraction < 1.0 else found.allowed_bytes
        return replace(found, allowed_bytes=allowed, tie_rule=reuse.tie_rule, addresses_down=reuse.addresses_down)

    def read_allocator(self) -> AllocatorState:
        """Read what the allocator holds now."""
        return read_state(self.index)

    def total_bytes(self) -> int:
        """Return the device's memory."""
        return int(torch.cuda.get_device_properties(self.index).total_memory)

    def limit_memory(self, limit_bytes: int) -> None:
        """Limit the reserved bytes of the caching allocator.

        The allocator compares with a whole number of bytes, rounded down from a fraction of the device's memory. The
        context, libraries and other processes are not counted, nor are they in a plan's budget. A limit above the
        device's memory is none.
        """
        fraction = (limit_bytes + 0.25) / self.total_bytes()
        if fraction < memory_fraction(self.index):
            set_memory_fraction(fraction, self.index)

    def free_bytes(self) -> int:
        """Return what the driver has free and what the allocator has cached."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return int(free) + self.held_bytes() - self.allocated_bytes()

    def obtainable_bytes(self) -> int:
        """Return what the allocator can still reserve.

        It is free in the driver, and below the allocator's limit.
        """
        free, total = torch.cuda.mem_get_info(self.torch_device)
        allowed = int(memory_fraction(self.index) * total)
        return min(int(free), max(0, allowed - self.held_bytes()))

    def held_bytes(self) -> int:
        """Return the reserved bytes."""
        return torch.cuda.memory_reserved(self.torch_device)

    def allocated_bytes(self) -> int:
        """Return the bytes that are handed out."""
        return torch.cuda.memory_allocated(self.torch_device)

    def lifetime_peak_bytes(self) -> int:
        """Return the peak of the reserved bytes."""
        return torch.cuda.max_memory_reserved(self.torch_device)

    def clean(self) -> None:
        """Collect garbage and release the cache."""
        gc.collect()
        self.release_cache()

    def release_cache(self) -> None:
        """Give cached blocks and cuBLAS's workspaces back to the driver."""
        clear_cublas_workspaces()
        torch.cuda.empty_cache()

    def make_workspaces(self) -> None:
        """Make cuBLAS's workspaces, this thread's and that of the backward's."""
        one = torch.ones(2, 2, device=self.torch_device, requires_grad=True)
        (one @ one).sum().backward()  # type: ignore[no-untyped-call]

    def reserve(self, segments: Sequence[tuple[int, int]], limit_bytes: int) -> int:
        """Reserve segments, and leave them in the current stream's pool.

        None is asked for that isn't free: torch counts and logs each failure, also those that are caught.
        """
        before = self.held_bytes()
        room = min(limit_bytes - before, self.obtainable_bytes())
        held = []  # all at once, so that none is split for the next
        for size, count in segments:
            for _ in range(min(count, max(0, room) // size)):
                held.append(torch.empty(size, dtype=torch.uint8, device=self.torch_device))
                room -= size
        return self.held_bytes() - before

    def release_workspaces(self) -> None:
        """Give cuBLAS's workspaces back to the caching allocator."""
        workspaces.release()

    def synchronize(self) -> None:
        """Wait for the device's streams."""
        torch.cuda.synchronize(self.torch_device)


def open_device(torch_device: torch.device) -> CudaDevice:
    """Return the device object; called by devices/registry.py."""
    return CudaDevice(torch_device)
