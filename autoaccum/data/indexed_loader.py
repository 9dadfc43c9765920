"""Load windows from a map-style DataLoader, by its indices.

These are put into micro-batches before they are collated.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any

from torch.utils.data import DataLoader

from .part import Part, digest_of_indices
from .tree import as_tensors
from .window import Window

_END = object()

PlanOf = Callable[[list[Any]], tuple[list[Any], tuple[int, ...]]]  # a window's indices: in their order, and the sizes
Planned = tuple[list[Any], tuple[int, ...], int]  # the indices of a window in their order, the sizes, the digest


def windows_of_indices(
    loader: Any,
    target: int,
    plan_of: PlanOf,
    least: int,
    floats: Any = None,
    *,
    collates: bool = False,
    part: Part | None = None,
) -> Iterator[Window]:
    """Yield windows, loaded by one DataLoader whose batches are the micro-batches.

    Args:
        loader: The user's DataLoader.
        target: Samples in each window.
        plan_of: Puts a window's indices in order, and gives the sizes of its micro-batches.
        least: The fewest samples that a micro-batch may have; fewer at the epoch's end join the last window.
        floats: What float64 arrays become; None to keep them.
        collates: Whether batches can't be cut, so that their samples are loaded again for smaller ones.
        part: Which of a window's samples are this rank's; None for all.
    """

    def loaded(indices: Sequence[Any]) -> Any:
        return as_tensors(loader.collate_fn([loader.dataset[index] for index in indices]), floats)

    load = loaded if collates else None
    rebatched = _rebatched(loader)
    requested = rebatched.batch_sampler.begin(target, plan_of, least, part)
    with part.drawing() if part is not None else nullcontext():
        stream = iter(rebatched)
    for piece in chain(stream, [_END]):
        while requested and (piece is _END or not requested[0][1]):  # windows of which this rank has no sample
            yield Window((), (), digest=requested.popleft()[2])
        if piece is _END:
            return
        samples, sizes, digest = requested.popleft()
        pieces = (piece, *islice(stream, len(sizes) - 1))
        yield Window(tuple(as_tensors(each, floats) for each in pieces), sizes, samples, "the dataset", load, digest)


# A loader whose workers persist from epoch to epoch must be the same in each.
_kept: weakref.WeakKeyDictionary[Any, DataLoader[Any]] = weakref.WeakKeyDictionary()


def _rebatched(loader: Any) -> Any:
    """Return the DataLoader whose batches are the micro-batches.

    With persistent workers it is the same one each time.
    """
    if loader in _kept:
        return _kept[loader]
    made = with_batches(loader, _MicroBatches(loader.batch_sampler))  # it has no length
    if loader.persistent_workers:
        _kept[loader] = made
    return made


def with_batches(loader: Any, batch_sampler: Any) -> DataLoader[Any]:
    """Return a map-style DataLoader with other batches, and all else its own.

    Args:
        loader: The user's DataLoader.
        batch_sampler: Yields the indices of each batch.
    """
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class _MicroBatches:
    """A batch sampler that yields the indices of each micro-batch."""

    def __init__(self, batch_sampler: Iterable[Iterable[Any]]) -> None:
        self.batch_sampler = batch_sampler

    def begin(self, target: int, plan_of: PlanOf, least: int, part: Part | None = None) -> deque[Planned]:
        """Begin an epoch; return where its windows' indices and sizes appear."""
        self.target, self.plan_of, self.least, self.part = target, plan_of, least, part
        # Loading runs ahead: each window's sizes wait here for its samples.
        self.requested = deque[Planned]()
        return self.requested

    def __iter__(self) -> Iterator[list[Any]]:
        indices = chain.from_iterable(self.batch_sampler)
        of_windows = indices_of_windows(indices, self.target, self.least)
        return _index_lists(of_windows, self.plan_of, self.requested, self.part)


def indices_of_windows(indices: Iterator[Any], target: int, least: int) -> Iterator[list[Any]]:
    """Yield the indices of each window.

    Fewer than `least` at the end join the last one.
    """
    ahead: list[Any] = []
    while of_window := [*ahead, *islice(indices, target - len(ahead))]:
        ahead = list(islice(indices, least)) if least > 1 else []
        if len(ahead) < least:
            of_window, ahead = of_window + ahead, []
        yield of_window


def _index_lists(
    of_windows: Iterator[list[Any]], plan_of: PlanOf, requested: deque[Planned], part: Part | None
) -> Iterator[list[Any]]:
    """Yield the indices of each micro-batch.

    Those of its window, and the sizes, are noted when it begins.
    """
    while True:
        with part.drawing() if part is not None else nullcontext():
            of_window = next(of_windows, None)
        if of_window is None:
            return
        digest = 0
        if part is not None:
            digest, of_window = digest_of_indices(of_window), of_window[part.of(len(of_window))]
        ordered, sizes = plan_of(of_window)
        requested.append((ordered, sizes, digest))
        rest = iter(ordered)
        yield from (list(islice(rest, size)) for size in sizes)
