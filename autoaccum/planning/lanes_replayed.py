"""Find the fewest lanes that fit, and what can stay.

On a GPU, by predicting their windows, which are recorded in short.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

from ..devices.cuda.device import CudaMeasurement
from ..errors import DoesNotFit
from ..simulation.lane_keeping import least_moved_parts, moved_by_part
from ..simulation.lane_windows import NotRegular
from ..simulation.solver import Split
from ..units import show_bytes
from ..window.lanes.host_store import THRESHOLD_BYTES
from .lane_predictor import FEW, LanePredictor
from .trial import unless_out_of_memory

SMALL_BYTES = THRESHOLD_BYTES // 16  # what moves where nothing fits otherwise: copies are slower for each byte then
ATTEMPTS = 3  # windows that are run to verify the answer
MORE_LANES, MORE_FACTOR = 3, 1.5  # numbers of lanes that are tried where the host binds, each so much larger
LEAST_RATIO = 16  # of the speeds of a GPU's memory and of PCIe; 20 to 60 of those that are sold
PASSES, CROSSINGS = 3, 2  # of a byte that is computed again: read, written, read; and of one that waits on the host
TRIES = 5  # numbers of parts that are recorded to find the fewest that have to move


@dataclass(frozen=True)
class LanesSolved:
    """The fewest lanes that fit, and what they move.

    Attributes:
        predictor: Predicts their window.
        split: Samples in each lane.
        measured: What its windows used; None where nothing was run.
        stayed_bytes: What a window could move to the host, and keeps on the device.
        host_binds: Whether fewer lanes fit the device, and would move more than the host may hold.
        spared_bytes: What a window would move more to the host if it computed nothing again.
    """

    predictor: LanePredictor
    split: Split
    measured: CudaMeasurement | None
    stayed_bytes: int = 0
    host_binds: bool = False
    spared_bytes: int = 0


def solve_by_replay(start: LanePredictor, splits: list[Split], micro_batch: int, *, verify: bool) -> LanesSolved:
    """Find the fewest lanes that fit, and what has to move.

    Their window is run, too. What can be computed again in place of moving is, where that is cheaper.

    Args:
        start: Without recordings.
        splits: What may be planned, fewest lanes first; two lanes at least.
        micro_batch: The answer, roughly.
        verify: Whether to run it.

    Raises:
        NotRegular: The windows can't be lifted, or what was run isn't as predicted.
        DoesNotFit: No number of lanes fits the device, or what they move doesn't fit the host.
    """
    reason = ""
    try:
        moving, split = _first_fit(start.moving(start.bytes_per_sample, recomputes=True), splits, micro_batch)
        spared, recomputed = _spared_bytes(moving, split), moving.recomputed_bytes(split)
        if spared * CROSSINGS * LEAST_RATIO > recomputed * PASSES:
            return replace(_solve(moving, split, splits, verify=verify), spared_bytes=spared)
        reason = f"it would spare {show_bytes(spared)} for {show_bytes(recomputed)}"
    except (NotRegular, DoesNotFit) as error:
        reason = f"{error}"
    start.plain.subject.progress(f"nothing is computed again: {reason}")
    return _solve(*_first_fit(start, splits, micro_batch), splits, verify=verify)


def _spared_bytes(moving: LanePredictor, split: Split) -> int:
    """Return what a window would move more if it computed nothing again."""
    window = moving.last_recorded(split)
    other = moving.moving(moving.bytes_per_sample, recomputes=False).record_like(window)
    return (other.moved_bytes - window.moved_bytes) * sum(split) // window.samples


def _solve(moving: LanePredictor, split: Split, splits: list[Split], *, verify: bool) -> LanesSolved:
    """Find what the fewest lanes have to move; run their window.

    Args:
        moving: Of windows in which all parts move.
        split: The fewest lanes that fit.
        splits: What may be planned.
        verify: Whether to run it.

    Raises:
        NotRegular: What is recorded or run isn't as predicted.
        DoesNotFit: What moves doesn't fit the host.
    """
    moving.record_near(split)
    fewest = _solved(moving, splits)
    kept, split = _within_host(moving, splits, fewest)
    if kept is not moving:
        measured, failure = _measured(kept, split) if verify else (None, "")
        if not failure:
            stayed = sum(moving.moved_sizes(split)) - sum(kept.moved_sizes(split))
            return LanesSolved(kept, split, measured, stayed, host_binds=split != fewest)
        moving.plain.subject.progress(f"a window of {len(split)} lanes that keeps more here {failure}: all moves")
    if not moving.host_holds(fewest):
        raise _host_too_small(moving, fewest)
    if not verify:
        return LanesSolved(moving, fewest, None)
    return _verified(moving, splits, fewest)


def _first_fit(start: LanePredictor, splits: list[Split], micro_batch: int) -> tuple[LanePredictor, Split]:
    """Return the fewest lanes that fit, and what predicts them.

    What moves is settled first, in bytes for each sample of a lane of the guessed size; then for the size that was
    found. Where no number of lanes fits, smaller tensors move, too.

    Raises:
        DoesNotFit: None fits.
    """
    found = start.moving(max(1, THRESHOLD_BYTES // micro_batch))
    split = fewest_lanes(found, splits)
    if split is None:
        found = start.moving(max(1, SMALL_BYTES // micro_batch))
        return found, _solved(found, splits)
    if not micro_batch / 2 <= split[0] <= 2 * micro_batch:
        other = start.moving(max(1, THRESHOLD_BYTES // split[0]))
        again = fewest_lanes(other, splits)
        if again is not None:
            return other, again
    return found, split


def fewest_lanes(predictor: LanePredictor, splits: list[Split]) -> Split | None:
    """Return the first split that fits; None where none does.

    By steps that double, then by bisection: more lanes need less, and take longer to predict. Near the capacity that
    isn't monotone; the split that is found fits, and the one before it doesn't.

    Args:
        predictor: Predicts them.
        splits: By ascending number of lanes.
    """
    low, high, step, last = 0, 0, 1, len(splits) - 1
    if not predictor.fits(splits[0]) and predictor.live_bytes(splits[last]) > predictor.plain.usable_bytes:
        return None
    while not predictor.fits(splits[high]):
        if high == last:
            return None
        low, high, step = high + 1, min(high + step, last), 2 * step
    return splits[_first(splits, low, predictor.fits, high)]


def _first(splits: list[Split], low: int, holds: Callable[[Split], bool], high: int) -> int:
    """Return the index of the first split that satisfies a condition.

    The one at `high` does.
    """
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(splits[middle]) else (middle + 1, high)
    return low


def _within_host(moving: LanePredictor, splits: list[Split], fewest: Split) -> tuple[LanePredictor, Split]:
    """Return a split that moves no more than the host may hold.

    The fewest lanes, if they don't. More lanes need less of the device for themselves, so that more can stay there.

    Raises:
        DoesNotFit: All that were tried move more.
    """
    kept = least_moved(moving, fewest)
    if kept.host_holds(fewest):
        return kept, fewest
    at = splits.index(fewest)
    for _ in range(MORE_LANES):
        wanted = MORE_FACTOR * len(splits[at])
        at = next((i for i in range(at + 1, len(splits)) if len(splits[i]) >= wanted), len(splits) - 1)
        more = least_moved(moving, splits[at]) if moving.fits(splits[at]) else moving
        if more.host_holds(splits[at]):
            return more, splits[at]
    raise _host_too_small(kept, fewest)


def least_moved(moving: LanePredictor, split: Split) -> LanePredictor:
    """Return a predictor of windows that move as little as fits.

    What the first parts of a lane save moves, what later ones save stays on the device. How many parts move is
    estimated by bytes that are alive, and searched around there; each number is recorded, and its window replayed.

    Args:
        moving: Of windows in which all parts move; its split fits.
        split: Samples in each lane.
    """
    program = moving.program_of(len(split))
    by_part = moved_by_part(program, split)
    parts = [part for part, moved in enumerate(by_part) if moved]
    ends = list(accumulate(by_part[part] for part in parts))  # what moves, up to each of them
    share = moving.live_bytes(split) / moving.worst_bytes(split)  # of what is reserved, where all parts move
    room = int(share * moving.plain.usable_bytes)  # for what is alive
    estimate = least_moved_parts(program, split, room - moving.held_bytes)
    low, high, best = -1, len(parts), moving  # the index of the first part that stays: too low, and high enough
    at = sum(part < estimate for part in parts)
    for _ in range(TRIES):
        if high - low <= 1:
            break
        at = min(max(at, low + 1), high - 1)
        found, live = _keeping(moving, split, parts[at])
        if found is not None:
            best, high = found, at
            at = (low + high) // 2
        else:
            low = at  # where live bytes would fit, what is reserved doesn't: by how much they say nothing of
            wanted = ends[at] + max(0, (live or 0) - room)
            at = max(bisect_left(ends, wanted), low + (high - low) // 3)
    return best


def _keeping(moving: LanePredictor, split: Split, parts: int) -> tuple[LanePredictor | None, int | None]:
    """Return a predictor of windows that move so many parts.

    Returns:
        The predictor, None where they don't fit; and the bytes that are alive at their peak, where that is known.
    """
    moving.plain.subject.progress(f"keeping on the device what lanes save after {parts} meetings")
    found = moving.moving(moving.bytes_per_sample, parts)
    try:
        if found.fits(split, with_retries=False):
            found.record_near(split)
        return found if found.fits(split, with_retries=False) else None, found.live_bytes(split)
    except NotRegular:
        return None, None


def _verified(moving: LanePredictor, splits: list[Split], split: Split) -> LanesSolved:
    """Run a window in which all parts move.

    Where it isn't as predicted, it is recorded, and the next one is run.

    Raises:
        NotRegular: It isn't, however often it is recorded.
        DoesNotFit: No other one fits.
    """
    failure = ""
    for _ in range(ATTEMPTS):
        measured, failure = _measured(moving, split)
        if measured is not None and not failure:
            return LanesSolved(moving, split, measured)
        if split[0] <= moving.largest(split):
            break
        moving.plain.subject.progress(f"a window of {len(split)} lanes {failure}: recording it")
        moving.add(split[0], min(len(split), FEW))  # no more lanes than fit
        split = _solved(moving, splits)
    raise NotRegular(f"a window of {len(split)} lanes of {split[0]} {failure}")


def _measured(predictor: LanePredictor, split: Split) -> tuple[CudaMeasurement | None, str]:
    """Run a split's first windows.

    Returns:
        What was measured, and how it contradicts the prediction.
    """
    plain = predictor.plain
    subject = plain.subject
    predictor.start_over()
    predictor.settle()
    subject.progress(f"verifying {len(split)} lanes of {split[0]}")
    with plain.limited():
        measured, failure = unless_out_of_memory(lambda: plain.device.measure(subject.train, [split] * 3))
    if measured is None:
        return None, failure or ""
    return measured, predictor.contradiction(split, measured) or ""


def _solved(predictor: LanePredictor, splits: list[Split]) -> Split:
    """Return the fewest lanes that fit.

    Raises:
        DoesNotFit: None fits.
    """
    split = fewest_lanes(predictor, splits)
    if split is not None:
        return split
    needed, budget = predictor.needed_bytes(splits[-1]), predictor.plain.budget
    raise DoesNotFit(
        f"Not even {len(splits[-1])} lanes of {splits[-1][0]} fit: their window needs {show_bytes(needed)}; the budget "
        f"is {show_bytes(budget.bytes)}.",
        "At each normalization its input is on the device for all lanes.",
        "What would help: a larger budget, a smaller target, or batchnorm='frozen', which is exact, too.",
        missing_bytes=max(1, needed - predictor.plain.usable_bytes),
    )


def _host_too_small(predictor: LanePredictor, split: Split) -> DoesNotFit:
    """Return the error for a window that moves too much."""
    host_bytes, limit_bytes = predictor.host_bytes(split), predictor.host_limit_bytes or 0
    return DoesNotFit(
        f"What a window in lanes saves for its backward needs more than {show_bytes(limit_bytes)} on the host: "
        f"{show_bytes(host_bytes)}, beside what fits the device.",
        "Saved tensors wait on the host; smaller micro-batches don't change their sum.",
        "Give it more (host_memory=, --host-memory), give the device more (budget=), lower the target, or use "
        "batchnorm='frozen', which is exact, too, and saves nothing there.",
        missing_bytes=host_bytes - limit_bytes,
    )
