"""Test the first real window whose micro-batches count differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data import split as cutting
from ..data import tree
from ..devices.oom import drop_frames
from ..devices.registry import get_device
from ..errors import AutoaccumError
from ..ranks.sharded import sharded_modules
from ..window.isolated import as_it_trains
from ..window.step import TrainingContext
from ..workload import IGNORED, Batch
from . import batch_leaves, compare
from .functional_copy import FunctionalCopy

MAX_ENTRIES = 1 << 16  # of the gradient that are compared: half a MiB in double precision; of small models fewer

BatchKeys = dict[str, Any]


def counts_differ(pieces: Sequence[Batch], sizes: Sequence[int]) -> bool:
    """Return whether a window's micro-batches count differently per sample.

    Counted are labels, lengths and padding. Cheap; decides when to `recheck`.
    """
    return len(pieces) > 1 and len({_counts(piece, size) for piece, size in zip(pieces, sizes, strict=True)}) > 1


def _counts(piece: Batch, size: int) -> tuple[Any, ...]:
    """Return per-sample counts: ignored labels, ones of masks, shapes."""
    found: list[Any] = []
    masks = set(batch_leaves.mask_paths(piece))
    for path, leaf in tree.leaves(piece):
        if not isinstance(leaf, torch.Tensor):
            continue
        found.append(tuple(leaf.shape[1:]))
        if path in masks:
            found.append(round(float(leaf.sum()) / size, 6))
        elif not leaf.is_floating_point() and leaf.dtype is not torch.bool:
            found.append(round(float((leaf == IGNORED).sum()) / size, 6))
    return tuple(found)


def recheck(
    context: TrainingContext, pieces: Sequence[Batch], sizes: Sequence[int], batch_keys: BatchKeys | None = None
) -> str | None:
    """Test a few rows of a real window for exactness.

    For the first window whose `counts_differ`. Needs no more memory than the window, since it runs during training:
    half as many samples as the largest micro-batch (two of two or three), on views of the parameters, in their
    precision. In half precision only errors of percents are detected. The model, its gradients and random states stay
    as they were.

    Args:
        context: The training context, between two windows.
        pieces: The window's micro-batches.
        sizes: Samples in each.
        batch_keys: `shared` and `per_sample`, as `split` takes them.

    Returns:
        A warning; None if the gradients agree, or the window can't be tested.
    """
    if not get_device(context.device).computes or sharded_modules(context.model):
        return None  # copies in the place of shards would break FSDP2's own bookkeeping
    rows = _few_rows(
        pieces, sizes, _most_rows(max(sizes), autocasts=context.autocast_dtype is not None), batch_keys or {}
    )
    if rows is None:
        return None
    whole, parted, counts = rows
    alone = replace(context, exchange=None)  # other ranks need not test now
    with as_it_trains(context.model, context.held):
        try:
            entries = min(MAX_ENTRIES, sum(p.numel() for p in context.model.parameters()) // 128)
            model_copy = FunctionalCopy(context.model, context.loss, alias=True, widens=False, entries=entries)
            found = compare.compare(model_copy, lambda: alone, whole, parted, counts)
        except (RuntimeError, MemoryError, ValueError, TypeError, LookupError, AutoaccumError) as error:
            drop_frames(error)
            return None
    if not found.finite or found.agrees(model_copy.tolerance):
        return None
    name, worst = found.worst()
    return (
        f"The gradient of this window's micro-batches is not that of one batch: off by {found.error():.2g} "
        f"on {sum(counts)} of its samples ({name}: {worst:.2g}). Its micro-batches count differently, and "
        "the sample didn't show it. Return (sum, count) from the loss, or give count=: autoaccum check explains more."
    )


def _most_rows(micro_batch: int, *, autocasts: bool) -> int:
    """Return the samples that fit in a micro-batch's memory."""
    if autocasts or micro_batch > 3:
        return micro_batch // 2
    return min(micro_batch, 2)


def _few_rows(
    pieces: Sequence[Batch], sizes: Sequence[int], most: int, batch_keys: BatchKeys
) -> tuple[Batch, list[Batch], tuple[int, ...]] | None:
    """Return a few rows of two unlike micro-batches, whole and parted."""
    counts = [_counts(piece, size) for piece, size in zip(pieces, sizes, strict=True)]
    other = next((index for index, count in enumerate(counts) if count != counts[0]), None)
    if other is None or most < 2:
        return None
    second = max(1, most // 3)
    wanted = (most - second, second)
    taken = tuple(min(number, sizes[index]) for number, index in zip(wanted, (0, other), strict=True))
    try:
        parted = [
            cutting.split(pieces[index], [number, sizes[index] - number], **batch_keys)[0]
            if number < sizes[index]
            else pieces[index]
            for number, index in zip(taken, (0, other), strict=True)
        ]
        whole = cutting.join(parted, **batch_keys)
    except AutoaccumError:
        return None
    return None if whole is None else (whole, parted, taken)
