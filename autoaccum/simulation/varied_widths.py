"""Replay what the longest samples reserve, for narrower ones. No torch here.

The caching allocator gives a large request a segment of its size, and never joins two segments. Where micro-batches
vary in width, the segments of narrow ones are too small for wider ones, which get others beside them: what is reserved
grows from window to window, with most of it free. From the segments of the longest samples all others are served.

So these are reserved before the first window. What stays from window to window must not lie in the middle of one:
cuBLAS's workspaces, where they are kept, are made before that.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..phases import BETWEEN, BUILD, FIRST, LATER, OPTIMIZER
from ..plan import SegmentRow
from .cuda_allocator.allocator import CachingAllocator, CudaRules
from .recording import Event, Phase
from .training_run import MAX_WINDOWS, Training, TrainingWriter, with_kept_workspaces

NARROWEST = 0.2  # of the longest samples: windows that are replayed have micro-batches of any width from there on
NARROWER_WINDOWS = 8
LEAST_WINDOWS = 3  # the second is the first with the optimizer's state, the third shows what it left
_BEFORE = "before the first window"


@dataclass(frozen=True)
class Course:
    """A training run at the longest samples, and its windows.

    Attributes:
        training: The run, in which cuBLAS's workspaces are given back, or kept.
        split: Samples in each micro-batch of a window.
        workspaces: The bytes of each workspace that is kept.
    """

    training: Training
    split: tuple[int, ...]
    workspaces: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reserved:
    """What windows came to.

    Attributes:
        peak_bytes: The most that was reserved.
        settled: Whether there was no retry in the last window, nor an out-of-memory in any.
    """

    peak_bytes: int
    settled: bool


def course_of(training: Training, split: Sequence[int], *, kept: bool) -> Course:
    """Return the course of a training run.

    Args:
        training: The training run.
        split: Samples in each micro-batch of a window.
        kept: Whether cuBLAS keeps its workspaces.
    """
    program = training.program
    sizes = (s.rule.at(1) for s in program.phases[FIRST] if s.rule is not None and s.block in program.workspaces)
    return Course(with_kept_workspaces(training) if kept else training, tuple(split), tuple(sizes) if kept else ())


def planned_segments(course: Course, rules: CudaRules) -> tuple[SegmentRow, ...]:
    """Return the large segments that windows of a split reserve.

    Without the model's. Those of the stream with most of them, which is the one that computes.

    Args:
        course: The windows.
        rules: The allocator's settings and its capacity.

    Returns:
        Their sizes and numbers, largest first; empty where memory runs out, or each window releases the cache.
    """
    run = _Run(course, rules)
    model = run.allocator.large_segments()
    if not run.windows([course.split] * MAX_WINDOWS, until_settled=True).settled:
        return ()
    large = run.allocator.large_segments()
    stream = max(large, key=lambda each: sum(large[each]), default=0)
    beside = Counter(large.get(stream, ())) - Counter(model.get(stream, ()))
    return tuple(SegmentRow(size, beside[size]) for size in sorted(beside, reverse=True))


def replay_reserved(
    course: Course, rules: CudaRules, segments: Sequence[SegmentRow], *, narrower: bool, seed: int = 0
) -> Reserved:
    """Replay windows after segments were reserved.

    Args:
        course: The windows.
        rules: The allocator's settings and its capacity.
        segments: What is reserved first.
        narrower: Whether micro-batches vary in width, the widest of a window first. Narrow ones are replayed as fewer
            of the longest samples: what grows with tokens is as large.
        seed: Of the widths.
    """
    run, chance = _Run(course, rules), random.Random(seed)
    run.reserve(segments)
    if not narrower:
        return run.windows([course.split] * LEAST_WINDOWS)
    return run.windows([_narrower(course.split, chance) for _ in range(NARROWER_WINDOWS)])


def _narrower(split: Sequence[int], chance: random.Random) -> tuple[int, ...]:
    return tuple(sorted((max(1, round(n * chance.uniform(NARROWEST, 1))) for n in split), reverse=True))


class _Run:
    """Run windows of any sizes, after the model and the workspaces."""

    def __init__(self, course: Course, rules: CudaRules) -> None:
        self.course, self.allocator = course, CachingAllocator(rules)
        self.writer = TrainingWriter(course.training)
        made = tuple(Event(-1 - index, size) for index, size in enumerate(course.workspaces))
        self.fits = all(self._fits(phase) for phase in (Phase(BUILD, course.training.build), Phase(_BEFORE, made)))

    def reserve(self, segments: Sequence[SegmentRow]) -> None:
        """Allocate each segment, then free them all."""
        sizes = [row.bytes for row in segments for _ in range(row.count)]
        names = range(-1 - len(self.course.workspaces), -1 - len(self.course.workspaces) - len(sizes), -1)
        made = [Event(name, size) for name, size in zip(names, sizes, strict=True)]
        freed = [Event(name, -size) for name, size in zip(names, sizes, strict=True)]
        self.fits = self.fits and self._fits(Phase(_BEFORE, (*made, *freed)))

    def windows(self, splits: Sequence[Sequence[int]], *, until_settled: bool = False) -> Reserved:
        """Train windows until memory runs out, or until they settle."""
        peak, last, retries = self.allocator.reserved_bytes, 0, 0
        for index, sizes in enumerate(splits if self.fits else ()):
            before = self.allocator.retries
            for phase in self._phases(sizes, last, is_first=index == 0):
                result = self.allocator.run(phase)
                peak = max(peak, result.peak_reserved_bytes)
                if result.out_of_memory:
                    return Reserved(peak, settled=False)
            last, retries = sizes[-1], self.allocator.retries - before
            if until_settled and index + 1 >= LEAST_WINDOWS and not retries:
                break
        return Reserved(peak, self.fits and not retries)

    def _phases(self, sizes: Sequence[int], last: int, *, is_first: bool) -> Iterator[Phase]:
        writer = self.writer
        yield self._first_of_all(sizes[0]) if is_first else writer.first(sizes[0], last)
        for size in sizes[1:]:
            yield writer.phase(LATER, size)
        yield writer.first_optimizer_step() if is_first else writer.phase(OPTIMIZER, sizes[-1])
        if BETWEEN in writer.program.phases:
            yield writer.phase(BETWEEN, sizes[-1])

    def _first_of_all(self, n: int) -> Phase:
        """Return the very first micro-batch, without the workspaces that are there."""
        phase, there = self.writer.first_of_all(n), Counter(self.course.workspaces)
        if not there:
            return phase
        freed = {name for name, size, _ in phase.events if size <= 0}
        events = []
        for event in phase.events:
            name, size, _ = event
            if there[size] > 0 and name not in freed:
                there[size] -= 1
            else:
                events.append(event)
        return Phase(FIRST, tuple(events))

    def _fits(self, phase: Phase) -> bool:
        return not self.allocator.run(phase).out_of_memory
