"""Check loaders, distinguish their kinds, and count their windows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from ..errors import UsageError
from .split import batch_size

if TYPE_CHECKING:
    from ..workload import Batch


def check_loader(loader: Any, target: int) -> None:
    """Refuse what isn't a loader.

    Raises:
        UsageError: It is one batch, a dataset, or can't be iterated; or `target` is below 1.
    """
    if target < 1:
        raise UsageError(f"A window has {target} samples; it must have at least 1.", hint="Use a target of 1 or more.")
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


def is_map_style(loader: object) -> bool:
    """Return whether a loader can be batched anew by its indices.

    A subclass with its own iteration can't.
    """
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def loader_length(
    loader: Iterable[Batch],
    target: int,
    *,
    shared: Collection[str] = (),
    per_sample: Collection[str] = (),
    least: int = 1,
) -> int | None:
    """Return the windows of one epoch, the shorter last one included.

    It never iterates a loader, which would move its sampler's random state.

    Args:
        loader: As for `windows.windows`.
        target: Samples in each window on this rank.
        shared: As for `windows.windows`; only a list of batches needs it.
        per_sample: As for `windows.windows`; only a list of batches needs it.
        least: As for `windows.windows`.

    Returns:
        The number; None where the loader doesn't know its samples.

    Raises:
        UsageError: The loader isn't one.
    """
    check_loader(loader, target)
    if isinstance(loader, (list, tuple)):
        samples: int | None = sum(batch_size(batch, shared=shared, per_sample=per_sample) for batch in loader)
    else:
        samples = _samples(loader) if isinstance(loader, DataLoader) else None
    if samples is None:
        return None
    whole, rest = divmod(samples, target)
    return whole + (rest >= least or (rest > 0 and whole == 0))


def _samples(loader: DataLoader[Any]) -> int | None:
    """Return the samples of a DataLoader's epoch; None where unknown."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        return None
    if not isinstance(loader.dataset, IterableDataset):
        batches = loader.batch_sampler
        if type(batches) is not BatchSampler:  # any other may repeat or leave out what it likes
            return None
        return _in_whole_batches(_length(batches.sampler), batches.batch_size if batches.drop_last else 1)
    if loader.batch_size is None or (loader.drop_last and loader.num_workers > 1):  # each worker drops its own rest
        return None
    return _in_whole_batches(_length(loader.dataset), loader.batch_size if loader.drop_last else 1)


def _length(source: object) -> int | None:
    try:
        return len(source) if isinstance(source, Sized) else None
    except (NotImplementedError, TypeError):
        return None


def _in_whole_batches(samples: int | None, batch: int) -> int | None:
    return None if samples is None else samples - samples % batch
