"""Count a window's samples as loaded, and cut it again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import accumulate

import torch

from ..errors import BatchError, OutOfMemory
from ..torch_compat import write_count
from ..workload import Batch
from . import split as cutting
from . import tree
from .window import Window

BatchKeys = Mapping[str, Collection[str]]
Sizes = tuple[int, ...]


def counted(window: Window, batch_keys: BatchKeys) -> Window:
    """Leave out micro-batches that a collate function emptied.

    The sizes become those that were loaded.

    Args:
        window: As it was loaded.
        batch_keys: `shared` and `per_sample`, as for `split.batch_size`.

    Raises:
        BatchError: There is no sample left.
    """
    found = [
        (piece, _rows(piece, size, batch_keys, collated=window.load is not None))
        for piece, size in zip(window.pieces, window.sizes, strict=True)
    ]
    there = [(piece, size) for piece, size in found if size]
    if not found:  # a rank without samples, at the end of an epoch
        return window
    if not there:
        raise BatchError(
            f"A window of {sum(window.sizes)} samples has no sample left after its collate function.",
            hint="Leave out samples in the sampler or in the dataset, where the window is filled up by others.",
        )
    if window.load is not None:
        return window if len(there) == len(found) else window.only([i for i, (_, size) in enumerate(found) if size])
    return Window(tuple(piece for piece, _ in there), tuple(size for _, size in there), digest=window.digest)


def _rows(piece: Batch, planned: int, batch_keys: BatchKeys, *, collated: bool) -> int:
    try:
        if not collated:  # else dimension 0 may be anything
            return cutting.batch_size(piece, **batch_keys)
    except BatchError:
        pass
    tensors = [leaf for leaf in tree.tensors(piece) if leaf.dim()]
    if tensors and not any(map(len, tensors)):
        return 0  # emptied: as a mean it would be 0 / 0
    return planned  # packed by its collate function: it can be trained, only not counted or cut


def recut(
    window: Window, split_of: Callable[[int], Sizes], micro_batch: int, batch_keys: BatchKeys, *, joins: bool
) -> Window:
    """Cut a window's samples into smaller pieces.

    The pieces are all that is left of the batch, so they are cut again.

    A packed piece stays, as cutting it is impossible.

    Args:
        window: The window.
        split_of: Sizes of the pieces of so many samples.
        micro_batch: The largest wanted.
        batch_keys: As for `counted`.
        joins: Whether to join the pieces first where one can't be cut small enough separately, at the price of a copy
            of the window: batch statistics keep a piece of three samples from being cut.
    """
    smaller = window
    for index in reversed(range(len(window.pieces))):
        smaller = cut_one(smaller, index, split_of(window.sizes[index]), batch_keys)
    if joins and window.load is None and max(smaller.sizes) > micro_batch:
        return _recut_joined(window, split_of, batch_keys) or smaller
    return smaller


def cut_one(window: Window, index: int, sizes: Sizes, batch_keys: BatchKeys) -> Window:
    """Cut one piece of a window; return it unchanged where impossible.

    Where pieces can't be cut, its samples are loaded again.
    """
    samples = window.samples_of(index)
    try:
        if window.load is not None:
            ends = list(accumulate(sizes))
            pieces = [window.load(samples[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
        else:
            pieces = cutting.split(window.pieces[index], sizes, **batch_keys)
    except BatchError:
        return window
    return Window(
        (*window.pieces[:index], *pieces, *window.pieces[index + 1 :]),
        (*window.sizes[:index], *sizes, *window.sizes[index + 1 :]),
        window.samples,
        window.origin,
        window.load,
        window.digest,
    )


def _recut_joined(window: Window, split_of: Callable[[int], Sizes], batch_keys: BatchKeys) -> Window | None:
    sizes = split_of(sum(window.sizes))
    try:
        joined = cutting.join(window.pieces, **batch_keys)
        if joined is None:
            return None
        return Window(tuple(cutting.split(joined, sizes, **batch_keys)), sizes, digest=window.digest)
    except BatchError:
        return None


def versions(window: Window) -> list[int]:
    """Return how often each tensor of a window was written to.

    Autograd counts writes in place.
    """
    return [
        write_count(leaf)
        for piece in window.pieces
        for _, leaf in tree.leaves(piece)
        if isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    ]


def refuse_changed(window: Window, before: list[int], failure: str) -> None:
    """Refuse to repeat a window whose loss wrote into its batch."""
    if versions(window) != before:
        raise OutOfMemory(
            f"Out of memory in a window whose loss changes its batch in place ({failure}).",
            "The samples aren't what they were, so the window can't be repeated; nothing was trained by it.",
            "Let the loss work on copies: batch = batch.clone()",
        )
