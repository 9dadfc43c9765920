"""Record windows in lanes, stretch by stretch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..phases import FIRST, OnPhase
from ..simulation.lane_windows import LaneWindow, cut, phase_name
from .target import RecordingTarget


def record_lanes(subject: RecordingTarget, n: int, lanes: int) -> LaneWindow:
    """Record a window of lanes of n samples.

    Args:
        subject: What is recorded. Its optimizer's state exists.
        n: Samples in each lane.
        lanes: Number of lanes.

    Raises:
        NotRegular: The window can't be cut into stretches.
    """
    subject.progress(f"recording {lanes} lanes of {n} samples")
    marked = _Marked(subject, n, lanes)
    recording = subject.device.record(marked.run, micro_batch=n)
    subject.remove_appended()
    store = subject.context.host_store
    recomputed_bytes = 0 if store is None else store.recomputation.bytes
    return replace(cut(recording, lanes, marked.moved_by_phase()), recomputed_bytes=recomputed_bytes)


class _Marked:
    """Run a window; note what moved to the host before each stretch."""

    def __init__(self, subject: RecordingTarget, n: int, lanes: int) -> None:
        self._subject, self._window = subject, subject.window(n, lanes)
        self._counts: list[int] = []

    def run(self, on_phase: OnPhase) -> None:
        """Run the window, each stretch as a phase."""
        self._counts = []
        context = self._subject.context

        def on_stretch(name: str, part: int, lane: int) -> None:
            with self._noted(phase_name(name, part, lane), on_phase):
                pass

        def noted(name: str) -> AbstractContextManager[Any]:
            return self._noted(name, on_phase)

        context.on_stretch = on_stretch
        try:
            self._window(noted)
        finally:
            context.on_stretch = None

    @contextlib.contextmanager
    def _noted(self, name: str, on_phase: OnPhase) -> Iterator[None]:
        store = self._subject.context.host_store
        is_new = store is None or name == FIRST  # the store still has the sizes of the window before
        self._counts.append(0 if is_new or store is None else len(store.moved))
        with on_phase(name):
            yield

    def moved_by_phase(self) -> list[list[int]]:
        """Return the bytes of what each phase moved to the host."""
        store = self._subject.context.host_store
        moved = store.moved if store is not None else []
        ends = [*self._counts[1:], len(moved)]
        return [moved[begin:end] for begin, end in zip(self._counts, ends, strict=True)]
