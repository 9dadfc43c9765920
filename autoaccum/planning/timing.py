"""Time an optimizer step at smaller micro-batches than the plan's own.

Each round is one window with one micro-batch of each size, and one optimizer step: about twice the largest size's
samples. So noise affects all sizes of a round equally. The duration of an optimizer step of all the plan's samples is
composed from these for each size.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..devices import oom
from ..devices.base import Device
from ..plan import FASTEST, TimedSize
from ..simulation.solver import Split, split_within
from ..window import compiled, step
from .predictor import MemoryPredictor
from .resolved_request import ResolvedRequest
from .target import RecordingTarget

log = logging.getLogger("autoaccum")

PLANNING_FRACTION, MAX_SECONDS = 0.15, 3.0  # timing takes this fraction of planning so far, at most so many seconds
FASTEST_SECONDS = 30.0  # where the choice depends on it
MAX_OVERRUN = 2.0  # of the allowed seconds, where fewer rounds would resolve nothing
ROUNDS_NEEDED = 6  # for the median's confidence interval (knee.interval)
MAX_SIZES, MAX_ROUNDS = 8, 15


@dataclass(frozen=True)
class Times:
    """The results of timing.

    Attributes:
        sizes: What was timed, ascending; empty where nothing was.
        why: How it was measured, or why it was not.
    """

    sizes: tuple[TimedSize, ...]
    why: str


def allowed_seconds(request: ResolvedRequest, planning_seconds: float) -> float:
    """Return how long timing may take after so much planning."""
    if request.timing_seconds is not None:
        return request.timing_seconds
    return FASTEST_SECONDS if request.objective == FASTEST else min(MAX_SECONDS, PLANNING_FRACTION * planning_seconds)


def time_sizes(
    predictor: MemoryPredictor,
    split: Split,
    step_seconds: float | None,
    allowed_seconds: float,
    start_over: Callable[[], None],
) -> Times:
    """Time optimizer steps at the split's micro-batch and at smaller ones.

    Args:
        predictor: What is known; its subject is trained.
        split: The plan's.
        step_seconds: Duration of a step by its verification; None where nothing was run, or kernels compute nothing.
        allowed_seconds: How long timing may take; 0 for no timing.
        start_over: Puts back what training changed.
    """
    if step_seconds is None:
        return Times((), "not timed: nothing was run, or on a device whose kernels compute nothing")
    if predictor.request.samples is None:
        return Times((), "not timed: without a target, steps of different micro-batches aren't of the same samples")
    if predictor.subject.context.encode is not None:
        return Times((), "not timed: a loss over representations needs additional passes for each window")
    if compiled.runs_compiled(predictor.subject.context):
        return Times((), "not timed: each size of a compiled model is compiled, which takes longer than timing saves")
    sizes = candidate_sizes(split, predictor.request.least, lambda found: predictor.fits(found))
    if allowed_seconds == 0 or len(sizes) < 2:
        return Times((), "not timed: not asked for" if len(sizes) > 1 else "not timed: there is no smaller size")
    needed = step_seconds * (sum(sizes) + sizes[0]) / sum(split)
    asked = predictor.request.timing_seconds is not None or predictor.request.objective == FASTEST
    if (1 if asked else ROUNDS_NEEDED) * needed > MAX_OVERRUN * allowed_seconds:
        enough = math.ceil(ROUNDS_NEEDED * needed)
        return Times((), f"not timed: resolving 1 % needs about {enough} s (timing_seconds={enough} allows it)")
    start_over()
    predictor.subject.progress(f"timing micro-batches of {', '.join(map(str, sizes))}")
    started = time.perf_counter()
    rounds = _rounds(predictor.subject, sizes, sum(split), allowed_seconds)
    if not rounds:
        return Times((), "not timed: smaller micro-batches than the plan's do not run")
    return Times(_medians(rounds), _how(predictor.subject, rounds, time.perf_counter() - started))


def candidate_sizes(split: Split, least: int, fits: Callable[[Split], bool] = lambda split: True) -> tuple[int, ...]:
    """Return a split's largest micro-batch, and smaller powers of two."""
    samples, largest = sum(split), split[0]
    powers = [1 << p for p in range(largest.bit_length()) if least <= 1 << p <= 2 * largest / 3][1 - MAX_SIZES :]
    splits = [split_within(samples, n, least) for n in powers]
    return tuple(sorted({largest, *(found[0] for found in splits if found[0] < largest and fits(found))}))


def _rounds(
    subject: RecordingTarget, sizes: Sequence[int], samples: int, allowed_seconds: float
) -> list[dict[int, float]]:
    """Return the seconds of an optimizer step by size for each round.

    Sizes that do not run are left out of all rounds. The first round loads libraries, and is dropped where others
    follow.
    """
    rounds: list[dict[int, float]] = []
    left, started = list(sizes), time.perf_counter()
    while len(rounds) <= MAX_ROUNDS:
        found, failed = _try_round(subject, left, samples)
        if found is None:
            if failed is None or len(left) <= 2:
                return []
            left.remove(failed)
            continue
        rounds.append(found)
        spent = time.perf_counter() - started
        if spent + spent / len(rounds) > allowed_seconds:
            break
    rounds = rounds[1:] or rounds
    return [{n: found[n] for n in left} for found in rounds]


def _try_round(
    subject: RecordingTarget, sizes: Sequence[int], samples: int
) -> tuple[dict[int, float] | None, int | None]:
    """Time a round, or return the size that does not run."""
    watch = Stopwatch(subject.device)
    order = [min(sizes), *sorted((n for n in sizes if n < samples), reverse=True)]
    try:
        return _round(subject, watch, order, sizes, samples), None
    except Exception as error:
        log.debug("a round of timing failed", exc_info=True)
        failure = oom.drop_frames(error)
    oom.collect()
    failed = order[len(watch.seconds)] if len(watch.seconds) < len(order) else None
    subject.progress(f"{failed} samples can't be timed: {failure}")
    subject.drop_gradients()
    return None, failed if failed != max(sizes) else None


def _round(
    subject: RecordingTarget, watch: Stopwatch, order: list[int], sizes: Sequence[int], samples: int
) -> dict[int, float]:
    """Time one micro-batch of each size in one window.

    A step has a first micro-batch, later ones and an optimizer step. The rest of the window (counting what a loss
    averages over) is divided by samples. A micro-batch that is the whole batch is timed as a separate window.
    """
    pieces = [subject.tile(n) for n in order]
    started = time.perf_counter()
    step.train_window(subject.context, pieces, order, on_phase=watch.phase)
    whole = time.perf_counter() - started
    first, *later, optimizer = watch.seconds
    rest = (whole - sum(watch.seconds)) * samples / sum(order)
    # The first is of the same size and also makes the gradients: a shorter duration is noise.
    once = rest + optimizer + max(0.0, first - later[-1])
    found = {n: once + seconds * samples / n for n, seconds in zip(order[1:], later, strict=True)}
    if samples in sizes:
        alone, started = [subject.tile(samples)], time.perf_counter()
        with watch.phase(""):
            step.train_window(subject.context, alone, [samples])
        found[samples] = time.perf_counter() - started
    return found


@dataclass
class Stopwatch:
    """Measure the seconds of each phase, pending work included."""

    device: Device
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase."""
        self._settle()
        started = time.perf_counter()
        yield
        self._settle()
        self.seconds.append(time.perf_counter() - started)

    def _settle(self) -> None:
        self.device.synchronize()


def _medians(rounds: list[dict[int, float]]) -> tuple[TimedSize, ...]:
    by_size = {n: tuple(found[n] for found in rounds) for n in sorted(rounds[0])}
    return tuple(TimedSize(n, statistics.median(each), len(each), each) for n, each in by_size.items())


def _how(subject: RecordingTarget, rounds: list[dict[int, float]], seconds: float) -> str:
    on = "this GPU" if subject.device.kind != "cpu" else f"this CPU with {torch.get_num_threads()} threads"
    threshold = subject.mmap_threshold_bytes
    how = "from a cache of pages" if subject.device.keeps_pages else "mapped"
    malloc = f", blocks from {threshold:,} bytes on {how}" if threshold is not None else ""
    return (
        f"measured on {on}{malloc}: {len(rounds)} round{'s' * (len(rounds) > 1)} of one micro-batch of each size in "
        f"turn, {seconds:.1f} s in all"
    )
