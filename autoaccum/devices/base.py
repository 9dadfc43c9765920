"""The interface of a device: what planning and training ask of it.

A subclass for each kind stands in a folder beside this file. docs/adding-a-device.md describes how to add one.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch

from ..budget import Budget
from ..phases import OnPhase
from ..process_memory import Heap
from ..simulation.malloc import HeapState, Replay
from ..simulation.recording import Phase, Recording
from ..simulation.solver import Split

MALLOC: Final = "malloc"
CACHING_ALLOCATOR: Final = "caching allocator"
Window = Callable[[OnPhase], None]
"""Runs one window; called with the `on_phase` that its phases are entered with."""


@dataclass(frozen=True)
class RecordingPolicy:
    """Which sizes are recorded, and how close a prediction has to come.

    Attributes:
        first_step_micro_batches: Micro-batches of the first window recorded. Two where that window also serves as a
            recording beside the others, which have two.
        answer_fractions: Fractions of the expected micro-batch at which to record once it is roughly known.
        agreement: Relative error of a predicted recording below which no further one is needed. 0 where the recordings
            nearest to the answer decide.
        max_lift_error: Relative error about the next recording above which sizes are not predicted any more. None
            where a larger error is expected (workspaces that saturate), and verification decides.
        max_samples_per_answer: Limit on the samples that recording may use, as a multiple of the micro-batch found;
            None for no limit.
    """

    first_step_micro_batches: int
    answer_fractions: tuple[float, ...]
    agreement: float
    max_lift_error: float | None
    max_samples_per_answer: float | None


@dataclass(frozen=True)
class Measurement:
    """The result of running windows for real.

    Subclasses add what their device counts.

    Attributes:
        seconds: Duration of the windows that are timed.
    """

    seconds: float


class Device(ABC):
    """One device. All sizes are bytes, as `int`.

    Attributes:
        kind: The device's type in torch: `torch.device.type`.
        memory_model: How memory is given out, and so which predictor of planning/ applies: "malloc" (blocks come
            straight from the operating system; bytes are *committed*) or "caching allocator" (bytes are *reserved*).
        policy: Which sizes are recorded.
        computes: Whether kernels compute. Where they do not, values and times mean nothing, and none is reported.
        torch_device: The device in torch's terms.
    """

    kind: ClassVar[str]
    memory_model: ClassVar[Literal["malloc", "caching allocator"]]
    policy: ClassVar[RecordingPolicy]
    computes: ClassVar[bool] = True

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    @property
    @abstractmethod
    def name(self) -> str:
        """The device's name, as plans and reports show it."""

    @property
    def keeps_pages(self) -> bool:
        """Return whether a cache of pages serves the C library's large blocks.

        On the CPU one may (devices/cpu/page_cache.py).
        """
        return False

    def settings_words(self) -> dict[str, str]:
        """Describe the settings that memory depends on.

        By name. A plan holds only where they are the same.
        """
        return {}

    # Recording and replaying

    @abstractmethod
    def prepare(self, malloc: str = "cached") -> int | None:
        """Apply an allocator setting for the rest of the process.

        Args:
            malloc: "cached", "fixed" or "default", as in `fit_plan`.

        Returns:
            The mmap threshold in bytes that the plan holds for; None where there is none.
        """

    @abstractmethod
    def record(self, run: Window, *, micro_batch: int) -> Recording:
        """Record each block of a window, in order, by phase.

        Args:
            run: Runs the window.
            micro_batch: Samples in each of its micro-batches.
        """

    def unrecorded_bytes(self, run: Window, recording: Recording, threshold_bytes: int | None) -> int:
        """Return a micro-batch's bytes that its recording does not show.

        0 where it shows all.
        """
        return 0

    @abstractmethod
    def replay(
        self,
        phases: Sequence[Phase],
        threshold_bytes: int | None,
        start: HeapState | None = None,
        unrecorded_bytes: int = 0,
    ) -> Replay:
        """Replay phases by this device's allocator, without a limit on memory."""

    @abstractmethod
    def input_bytes(self, tensor_bytes: int) -> int:
        """Return the bytes that a window's samples use on the device.

        They are held until the optimizer step is done.
        """

    @abstractmethod
    def measure(self, train: Callable[..., None], windows: Sequence[Split]) -> Measurement:
        """Train windows for real and measure their memory and time.

        Args:
            train: Trains one window of a split; takes an `on_phase` too, as `step.train_window` does.
            windows: The splits of the windows, trained in this order.
        """

    # Memory now

    @abstractmethod
    def read_budget(self, memory: str | int | None = None, headroom: str | int | None = None) -> Budget:
        """Read what training may use, with a reason behind each number.

        Args:
            memory: What the whole process may use; None for what is free.
            headroom: Bytes, or percent of the limit, to keep free.

        Raises:
            UsageError: A size cannot be read, or nothing is left.
        """

    @abstractmethod
    def limit_memory(self, limit_bytes: int) -> None:
        """Refuse allocations above a limit, in the bytes of a budget.

        A lower limit in force stays.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Return what can still be allocated, cached blocks included."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Return what the process holds now, in the bytes of a budget."""

    @abstractmethod
    def lifetime_peak_bytes(self) -> int:
        """Return the peak since the process began.

        As far as the system keeps it.
        """

    def read_heap(self) -> Heap | None:
        """Return the state of the C library's heap.

        None where it does not matter.
        """
        return None

    def holes_filled(self, threshold_bytes: int | None) -> AbstractContextManager[int]:
        """Occupy free blocks of the C library's heap; yield their bytes.

        Those that tensors would fit.

        Args:
            threshold_bytes: As `prepare` returned it.
        """
        return contextlib.nullcontext(0)

    @abstractmethod
    def clean(self) -> None:
        """Collect garbage and give all free memory back to the system.

        Slow: the collector visits every object.
        """

    def release_cache(self) -> None:
        """Give cached blocks and library workspaces back to the driver.

        Nothing where there are none.
        """
        return

    def obtainable_bytes(self) -> int:
        """Return what can still be taken from the system or the driver."""
        return self.free_bytes()

    def cache_releases(self) -> int:
        """Return how often the device's cache was given back to make room.

        0 where there is none.
        """
        return 0

    def make_workspaces(self) -> None:
        """Make library workspaces that stay from now on.

        Nothing where there are none.
        """
        return

    def reserve(self, segments: Sequence[tuple[int, int]], limit_bytes: int) -> int:
        """Reserve segments, and leave them in the device's cache.

        Nothing where there is none.

        Args:
            segments: The bytes of each, and how many of them; the largest first.
            limit_bytes: What may be held then, in the bytes of a budget.

        Returns:
            The bytes that were reserved: without those that have no room.
        """
        return 0

    def release_workspaces(self) -> None:
        """Give library workspaces back to the caching allocator.

        Nothing where there are none.
        """
        return

    def synchronize(self) -> None:
        """Wait until all queued work is done.

        Nothing where work is not queued.
        """
        return
