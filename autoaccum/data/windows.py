"""Turn a loader into windows, one for each optimizer step.

Knows loaders, sizes and order; knows nothing of models or memory. No sample is lost, repeated or moved to another
window: the windows hold the loader's samples in the loader's order, or each its own longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import BatchError, UsageError
from .bad_batches import Surviving
from .groups import check_groups
from .indexed_loader import PlanOf, windows_of_indices
from .loaders import check_loader, is_map_style
from .part import Part
from .stream import windows_of_batches
from .tokens import longest_first
from .window import Window

if TYPE_CHECKING:
    from ..workload import Batch

SizesOf = Callable[[int], tuple[int, ...]]
SizesOfLengths = Callable[[Sequence[int]], tuple[int, ...]]


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
    floats: Any = None,
    collates: bool = False,
    group: int = 1,
    part: Part | None = None,
) -> Surviving[Window]:
    """Return one epoch of a loader as windows.

    Each has `target` samples; the last has what is left.

    A map-style DataLoader is batched anew at the level of its sampler's indices: one collate per micro-batch, padded to
    its own longest sample. Of any other loader each batch is cut, and pieces of different batches are joined where
    their trailing shapes agree.

    Args:
        loader: A DataLoader, or an iterable of batches (any trees of tensors, samples in dimension 0).
        target: Samples in each window, on all ranks.
        split_of: `split_of(samples)`, the sizes of the micro-batches for so many samples; called for each window
            when its samples are requested, a DataLoader's prefetching included.
        shared: Keys of what each micro-batch gets whole; see `split.batch_size`.
        per_sample: Keys of what has a row for each sample; see `split.batch_size`.
        lengths: The length of each sample of a map-style loader's data set: a window's samples then come longest
            first.
        split_of_lengths: `split_of_lengths(lengths)`, the sizes of the micro-batches for samples of these lengths,
            longest first; called in place of `split_of` where `lengths` are given.
        least: The fewest samples that a micro-batch may have. Where an epoch's end has fewer, they join the window
            before it; for this the loader is read so many samples ahead.
        floats: The torch.dtype that numpy's float64 becomes, the model's; None to keep it.
        collates: Whether batches are made by the loader's collate function alone, and can't be cut.
        group: Consecutive samples that are never cut apart.
        part: Which of each window's samples are this rank's; None for all. A window may have none.

    Returns:
        An iterator that raises a `BatchError` in the place of a window that can't be cut, and then goes on with the
        next one; its `items` are the windows and these errors.

    Raises:
        UsageError: The loader isn't one, or isn't map-style where `lengths` are given (when called); or it gave no
            batch at all (when the first window is asked for).
    """
    check_loader(loader, target)
    check_groups(group, loader, has_lengths=lengths is not None)
    sizes_of = partial(_checked_sizes, split_of)
    if is_map_style(loader):
        plan_of = _plan_of(sizes_of, lengths, split_of_lengths)
        found: Iterator[Any] = windows_of_indices(loader, target, plan_of, least, floats, collates=collates, part=part)
    else:
        _refuse_unindexed(loader, has_lengths=lengths is not None, collates=collates)
        keys = {"shared": shared, "per_sample": per_sample}
        found = windows_of_batches(loader, target, sizes_of, keys, least, floats, group, part)
    return Surviving(_not_empty(found, loader))


def _refuse_unindexed(loader: object, *, has_lengths: bool, collates: bool) -> None:
    """Refuse a loader whose samples must be known by their indices."""
    if collates:
        raise UsageError(
            f"The plan's batches are made by a loader's collate function, and {type(loader).__name__} isn't map-style.",
            "Its batches are of other sizes, and they can't be cut.",
            "Give a DataLoader over a dataset with __getitem__ and __len__, as for planning.",
        )
    if has_lengths:
        raise UsageError(
            f"lengths= were given, and the loader ({type(loader).__name__}) isn't a map-style DataLoader.",
            "Only there are samples known by their indices before they are padded.",
            "Give a DataLoader over a dataset with __getitem__ and __len__, or leave out lengths=.",
        )


def _checked_sizes(split_of: SizesOf, samples: int) -> tuple[int, ...]:
    """Return the micro-batches for so many samples, as `split_of` has them."""
    if not samples:  # a rank has none of an epoch's end
        return ()
    sizes = tuple(split_of(samples))
    if sum(sizes) != samples or min(sizes, default=0) < 1:
        raise UsageError(
            f"split_of({samples}) gave {sizes}, which sum to {sum(sizes)}.",
            "Each sample must be in exactly one micro-batch.",
            f"Return sizes of at least 1 that sum to {samples}.",
        )
    return sizes


def _plan_of(sizes_of: SizesOf, lengths: Sequence[int] | None, of_lengths: SizesOfLengths | None) -> PlanOf:
    """Return how a window's indices are ordered and cut."""
    if lengths is None:
        return lambda indices: (indices, sizes_of(len(indices)))

    def by_length(indices: list[int]) -> tuple[list[int], tuple[int, ...]]:
        ordered = longest_first(indices, lengths)
        return ordered, of_lengths([lengths[i] for i in ordered]) if of_lengths else sizes_of(len(ordered))

    return by_length


def _not_empty(found: Iterator[Window | BatchError], loader: object) -> Iterator[Window | BatchError]:
    first = next(found, None)
    if first is None:
        raise UsageError(
            f"The loader ({type(loader).__name__}) gave no batch at all.",
            "Its dataset is empty, drop_last dropped its only batch, or it is a generator that was used up before.",
            "Give a loader that starts again for each epoch, such as a DataLoader or a list of batches.",
        )
    yield first
    del first  # its samples, which would be held all epoch
    yield from found
