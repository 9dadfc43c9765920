"""A loader into windows of micro-batches, each window of exactly the samples of one optimizer step.

Knows loaders, sizes and order; knows nothing of models or memory. No sample is lost, repeated or moved to another
window: the windows hold the loader's samples in the loader's order, or each its own longest first.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from ..errors import BatchError, UsageError
from .bad_batches import Surviving, of_samples
from .split import batch_size, join, joinable, split
from .tokens import longest_first

if TYPE_CHECKING:
    from ..workload import Batch

SizesOf = Callable[[int], tuple[int, ...]]
SizesOfLengths = Callable[[Sequence[int]], tuple[int, ...]]
PlanOf = Callable[[list[Any]], tuple[list[Any], tuple[int, ...]]]  # a window's indices: in their order, and the sizes
Part = tuple[Any, int]  # a batch and its samples
Names = Mapping[str, Collection[str]]
Planned = tuple[list[Any], tuple[int, ...]]  # the indices of a window in their order, and the sizes


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step, on the host.

    Attributes:
        pieces: The micro-batches, in the loader's order.
        sizes: Samples in each.
        samples: The index of each sample, piece after piece; empty where it isn't known.
        origin: What the indices count.
    """

    pieces: tuple[Batch, ...]
    sizes: tuple[int, ...]
    samples: Sequence[Any] = ()
    origin: str = ""

    def samples_of(self, index: int) -> Sequence[Any]:
        """The indices of one piece's samples."""
        start = sum(self.sizes[:index])
        return self.samples[start : start + self.sizes[index]]

    def only(self, indices: Sequence[int]) -> Window:
        """The window with these pieces only."""
        pieces, sizes = ([each[i] for i in indices] for each in (self.pieces, self.sizes))
        return Window(tuple(pieces), tuple(sizes), [s for i in indices for s in self.samples_of(i)], self.origin)


def windows(
    loader: Iterable[Batch],
    target: int,
    split_of: SizesOf,
    *,
    shared: Collection[str] = (),
    per_sample: Collection[str] = (),
    lengths: Sequence[int] | None = None,
    split_of_lengths: SizesOfLengths | None = None,
    least: int = 1,
) -> Iterator[Window]:
    """One epoch of a loader as windows of `target` samples; the last has what is left.

    The arguments are those of `windows_and_errors`.

    Raises:
        UsageError: The loader isn't one, or isn't map-style where `lengths` are given (at once); or it gave no batch
            at all (when the first window is asked for).
        BatchError: A batch can't be cut (when its window is asked for); the next window can be asked for all the same.
    """
    found = windows_and_errors(
        loader,
        target,
        split_of,
        shared=shared,
        per_sample=per_sample,
        lengths=lengths,
        split_of_lengths=split_of_lengths,
        least=least,
    )
    return Surviving(found)


def windows_and_errors(
    loader: Iterable[Batch],
    target: int,
    split_of: SizesOf,
    *,
    shared: Collection[str] = (),
    per_sample: Collection[str] = (),
    lengths: Sequence[int] | None = None,
    split_of_lengths: SizesOfLengths | None = None,
    least: int = 1,
) -> Iterator[Window | BatchError]:
    """One epoch of a loader as windows, and in the place of what can't be cut the error.

    A map-style DataLoader is batched anew at the level of its sampler's indices: one collate per micro-batch, so
    that it is padded to its own longest sample only. Of any other loader each batch is cut, and pieces of different
    batches are joined where their trailing shapes agree.

    Args:
        loader: A DataLoader, or an iterable of batches (any trees of tensors, samples in dimension 0).
        target: Samples in each window on this rank.
        split_of: `split_of(samples)`, the sizes of the micro-batches for so many samples; asked anew for each window
            when its samples are requested, a DataLoader's prefetching included.
        shared: Keys of what each micro-batch gets whole; see `split.batch_size`.
        per_sample: Keys of what has a row for each sample; see `split.batch_size`.
        lengths: The length of each sample of a map-style loader's data set: a window's samples then come longest
            first.
        split_of_lengths: `split_of_lengths(lengths)`, the sizes of the micro-batches for samples of these lengths,
            longest first; asked in place of `split_of` where `lengths` are given.
        least: The fewest samples that a micro-batch may have. Where an epoch's end has fewer, they join the window
            before it; for this the loader is read so many samples ahead.

    Raises:
        UsageError: As for `windows`.
    """
    _check(loader, target)

    def sizes_of(samples: int) -> tuple[int, ...]:
        return _sizes(samples, split_of)

    if lengths is not None and not _is_rebatched(loader):
        raise UsageError(
            f"lengths= were given, and the loader ({type(loader).__name__}) isn't a map-style DataLoader.",
            "Only there are samples known by their indices before they are padded.",
            "Give a DataLoader over a dataset with __getitem__ and __len__, or leave out lengths=.",
        )
    if _is_rebatched(loader):
        found: Iterator[Window | BatchError] = _from_indices(
            loader, target, _plan_of(sizes_of, lengths, split_of_lengths), least
        )
    else:
        found = _from_batches(loader, target, sizes_of, {"shared": shared, "per_sample": per_sample}, least)
    return _not_empty(found, loader)


def loader_length(
    loader: Iterable[Batch],
    target: int,
    *,
    shared: Collection[str] = (),
    per_sample: Collection[str] = (),
    least: int = 1,
) -> int | None:
    """The windows of one epoch, the shorter last one included; None where the loader doesn't tell its samples.

    It never iterates a loader, which would move its sampler's random state.

    Args:
        loader: As for `windows`.
        target: Samples in each window on this rank.
        shared: As for `windows`; only a list of batches needs it.
        per_sample: As for `windows`; only a list of batches needs it.
        least: As for `windows`.

    Raises:
        UsageError: The loader isn't one.
    """
    _check(loader, target)
    if isinstance(loader, (list, tuple)):
        samples: int | None = sum(batch_size(batch, shared=shared, per_sample=per_sample) for batch in loader)
    else:
        samples = _samples(loader) if isinstance(loader, DataLoader) else None
    if samples is None:
        return None
    whole, rest = divmod(samples, target)
    return whole + (rest >= least or (rest > 0 and whole == 0))


def _check(loader: Any, target: int) -> None:
    """Raises for what isn't a loader."""
    if target < 1:
        raise UsageError(f"A window of {target} samples can't be made.", hint="Ask for at least 1.")
    if isinstance(loader, (Mapping, str, bytes, torch.Tensor)):
        raise UsageError(
            f"The loader is a {type(loader).__name__}, which is one batch at most.",
            "Going through it would give its keys, letters or rows, not batches.",
            "To train on this one batch, give a list of it: [batch].",
        )
    if isinstance(loader, Dataset) and not hasattr(loader, "__iter__"):
        raise UsageError(
            f"The loader is a {type(loader).__name__}, a dataset, which gives samples and not batches.",
            hint="Give torch.utils.data.DataLoader(dataset, batch_size=..., shuffle=True); any batch size will do.",
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        hint = "Call it, and give what it returns." if callable(loader) else "Give a DataLoader or a list of batches."
        what = "None" if loader is None else f"of type {type(loader).__name__}"
        raise UsageError(f"The loader is {what}, which gives no batches.", hint=hint)


def _sizes(samples: int, split_of: SizesOf) -> tuple[int, ...]:
    """The micro-batches for so many samples, as `split_of` says."""
    sizes = tuple(split_of(samples))
    if sum(sizes) != samples or min(sizes, default=0) < 1:
        raise UsageError(
            f"split_of({samples}) gave {sizes}, which sum to {sum(sizes)}.",
            "Each sample must be in exactly one micro-batch.",
            f"Return sizes of at least 1 that sum to {samples}.",
        )
    return sizes


def _plan_of(sizes_of: SizesOf, lengths: Sequence[int] | None, of_lengths: SizesOfLengths | None) -> PlanOf:
    """How the indices of a window are put in order and cut."""

    def by_length(indices: list[Any]) -> tuple[list[Any], tuple[int, ...]]:
        assert lengths is not None
        ordered = longest_first(indices, lengths)
        return ordered, of_lengths([lengths[i] for i in ordered]) if of_lengths else sizes_of(len(ordered))

    return by_length if lengths is not None else lambda indices: (indices, sizes_of(len(indices)))


def _is_rebatched(loader: object) -> bool:
    """Whether a loader can be batched anew by its indices: not where a subclass iterates in its own way."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def _not_empty(found: Iterator[Window | BatchError], loader: object) -> Iterator[Window | BatchError]:
    first = next(found, None)
    if first is None:
        raise UsageError(
            f"The loader ({type(loader).__name__}) gave no batch at all.",
            "Its dataset is empty, drop_last dropped its only batch, or it is a generator that was used up before.",
            "Give a loader that starts anew for each epoch, such as a DataLoader or a list of batches.",
        )
    yield first
    del first  # its samples, which would be held all epoch
    yield from found


def _from_indices(loader: Any, target: int, plan_of: PlanOf, least: int) -> Iterator[Window]:
    """Windows of a map-style DataLoader, loaded by one DataLoader whose batches are the micro-batches."""
    rebatched = _rebatched(loader)
    requested = rebatched.batch_sampler.begin(target, plan_of, least)
    stream = iter(rebatched)
    for piece in stream:
        samples, sizes = requested.popleft()
        yield Window((piece, *islice(stream, len(sizes) - 1)), sizes, samples, "the dataset")


# Whose workers persist from epoch to epoch must be the same loader in each.
_kept: weakref.WeakKeyDictionary[Any, DataLoader[Any]] = weakref.WeakKeyDictionary()


def _rebatched(loader: Any) -> Any:
    """The DataLoader whose batches are the micro-batches; with persistent workers, the same one each time."""
    if loader in _kept:
        return _kept[loader]
    made: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_sampler=_MicroBatches(loader.batch_sampler),  # it has no length
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
    if loader.persistent_workers:
        _kept[loader] = made
    return made


class _MicroBatches:
    """A batch sampler that gives one list of indices for each micro-batch of the epoch that was begun last."""

    def __init__(self, batch_sampler: Iterable[Iterable[Any]]) -> None:
        self.batch_sampler = batch_sampler

    def begin(self, target: int, plan_of: PlanOf, least: int) -> deque[Planned]:
        """Sets what the next epoch is cut into; returns where the indices and sizes of its windows will be."""
        self.target, self.plan_of, self.least = target, plan_of, least
        # Loading runs ahead: each window's sizes wait here for its samples.
        self.requested = deque[Planned]()
        return self.requested

    def __iter__(self) -> Iterator[list[Any]]:
        indices = chain.from_iterable(self.batch_sampler)
        return _index_lists(_of_window(indices, self.target, self.least), self.plan_of, self.requested)


def _of_window(indices: Iterator[Any], target: int, least: int) -> Iterator[list[Any]]:
    """The indices of each window; fewer than `least` at the end join the last."""
    ahead: list[Any] = []
    while of_window := [*ahead, *islice(indices, target - len(ahead))]:
        ahead = list(islice(indices, least)) if least > 1 else []
        if len(ahead) < least:
            of_window, ahead = of_window + ahead, []
        yield of_window


def _index_lists(of_windows: Iterator[list[Any]], plan_of: PlanOf, requested: deque[Planned]) -> Iterator[list[Any]]:
    """One list of indices for each micro-batch; those of its window and their sizes are noted when that begins."""
    for of_window in of_windows:
        ordered, sizes = plan_of(of_window)
        requested.append((ordered, sizes))
        rest = iter(ordered)
        yield from (list(islice(rest, size)) for size in sizes)


def _from_batches(
    batches: Iterable[Batch], target: int, sizes_of: SizesOf, names: Names, least: int
) -> Iterator[Window | BatchError]:
    """Windows of whatever gives batches: rows taken in order, what a window doesn't need left for the next."""
    waiting: deque[Part] = deque()
    samples = given = 0  # those that wait, and those of the windows before
    enough = target + (least if least > 1 else 0)
    for number, batch in enumerate(batches):
        try:
            size = batch_size(batch, **names)
        except BatchError as error:
            yield of_samples(error, [number], "the loader's batches, counted from 0")
            continue
        waiting.append((batch, size))
        samples += size
        while samples >= enough:
            yield _window_or_error(waiting, range(given, given + target), sizes_of, names)
            samples, given = samples - target, given + target
    if waiting:
        yield _window_or_error(waiting, range(given, given + samples), sizes_of, names)


def _window_or_error(waiting: deque[Part], samples: range, sizes_of: SizesOf, names: Names) -> Window | BatchError:
    """The next window, off the front of what waits; where it can't be cut, that is gone and the error is given."""
    try:
        window = _window(_take(waiting, len(samples), names), sizes_of, names)
    except BatchError as error:
        return of_samples(error, samples, "the epoch, counted from 0")
    return Window(window.pieces, window.sizes, samples, "the epoch, counted from 0")


def _take(parts: deque[Part], samples: int, names: Names) -> list[Part]:
    """Takes so many samples off the front; the last part is cut where it has more."""
    taken: list[Part] = []
    while samples:
        batch, size = parts.popleft()
        if size > samples:
            batch, rest = split(batch, (samples, size - samples), **names)
            parts.appendleft((rest, size - samples))
            size = samples
        taken.append((batch, size))
        samples -= size
    return taken


def _window(parts: list[Part], sizes_of: SizesOf, names: Names) -> Window:
    """Micro-batches out of consecutive parts: each run of joinable ones is cut by itself."""
    pieces: list[Batch] = []
    sizes: list[int] = []
    for run in _runs(parts, names):
        for size in sizes_of(sum(samples for _, samples in run)):
            # Only what a micro-batch takes from several batches is copied; the rest are views.
            pieces.append(join([batch for batch, _ in _take(run, size, names)], **names))
            sizes.append(size)
    return Window(tuple(pieces), tuple(sizes))


def _runs(parts: list[Part], names: Names) -> Iterator[deque[Part]]:
    """The longest runs of consecutive parts that can be joined."""
    run: deque[Part] = deque()
    for part in parts:
        if run and not joinable(run[0][0], part[0], **names):
            yield run
            run = deque()
        run.append(part)
    yield run


def _samples(loader: DataLoader[Any]) -> int | None:
    """The samples of one epoch of a DataLoader, where it tells them."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        return None
    if not isinstance(loader.dataset, IterableDataset):
        batches = loader.batch_sampler
        if type(batches) is not BatchSampler:  # any other may repeat or leave out what it likes
            return None
        return _whole(_length(batches.sampler), batches.batch_size if batches.drop_last else 1)
    if loader.batch_size is None or (loader.drop_last and loader.num_workers > 1):  # each worker drops its own rest
        return None
    return _whole(_length(loader.dataset), loader.batch_size if loader.drop_last else 1)


def _length(source: object) -> int | None:
    try:
        return len(source) if isinstance(source, Sized) else None
    except (NotImplementedError, TypeError):
        return None


def _whole(samples: int | None, batch: int) -> int | None:
    """The samples in whole batches."""
    return None if samples is None else samples - samples % batch
