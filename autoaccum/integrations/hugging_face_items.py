"""Choose the samples of a Trainer's dataset that planning collates: its longest."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import IterableDataset

log = logging.getLogger("autoaccum")

_SEARCH_SECONDS = 10.0
_STREAMED = 256  # samples of a stream that are looked at
_FEWEST = 5  # enough for two parts that differ


def longest_items(dataset: Any) -> list[Any]:
    """Return the samples that are longest, the longest first.

    One for each of a sample's fields: in a translation the longest source and the longest target may be in two samples.
    A few others follow, so that there are at least five where the dataset has as many.

    Args:
        dataset: A map-style or an iterable dataset. Its columns are measured where it is a table of `datasets`; else
            its samples are read, for ten seconds at most.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        items = list(itertools.islice(iter(dataset), _STREAMED))
        log.warning("The dataset is a stream: planning looked at its first %d samples for the longest.", len(items))
        return _chosen(items, _longest_of(enumerate(map(_lengths, items))), len(items))
    found = _longest_in_table(dataset)
    if found is None:
        found = _longest_read(dataset)
    return _chosen(dataset, found, len(dataset))


def _chosen(items: Any, longest: list[int], total: int) -> list[Any]:
    others = [number for number in range(min(total, 2 * _FEWEST)) if number not in longest]
    return [items[number] for number in [*longest, *others[: max(0, _FEWEST - len(longest))]]]


def _longest_read(dataset: Any) -> list[int]:
    """Read samples, spread over the dataset, until time is up."""
    total, began, measured = len(dataset), time.monotonic(), []
    for number in _spread(total):
        measured.append((number, _lengths(dataset[number])))
        if time.monotonic() - began > _SEARCH_SECONDS:
            log.warning(
                "Planning read %d of the %d samples in %.0f s to find the longest. A longer one is trained as far as "
                "memory goes, and in smaller micro-batches where it runs out.",
                len(measured), total, _SEARCH_SECONDS,
            )  # fmt: skip
            break
    return _longest_of(measured)


def _spread(total: int) -> Iterable[int]:
    """Return all numbers below a total, each further stretch finer spread."""
    stride = 1 << max(0, total.bit_length() - 1)
    seen = range(0)
    while stride:
        for number in range(0, total, stride):
            if number % (2 * stride) or not seen:
                yield number
        seen, stride = range(1), stride // 2


def _lengths(item: Any) -> dict[str, int]:
    """Return the length of each field of a sample that has one."""
    fields = (
        item.items() if isinstance(item, Mapping) else enumerate(item if isinstance(item, (tuple, list)) else [item])
    )
    return {str(name): _length(value) for name, value in fields if _length(value)}


def _length(value: Any) -> int:
    if hasattr(value, "numel"):
        return int(value.numel()) if value.dim() else 0
    if hasattr(value, "size") and hasattr(value, "ndim"):
        return int(value.size) if value.ndim else 0
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _longest_of(measured: Iterable[tuple[int, dict[str, int]]]) -> list[int]:
    best: dict[str, tuple[int, int]] = {}
    for number, lengths in measured:
        for name, length in lengths.items():
            if length > best.get(name, (0, 0))[0]:
                best[name] = length, number
    ordered = sorted(best.values(), key=lambda pair: -pair[0])
    return list(dict.fromkeys(number for _, number in ordered))


def _longest_in_table(dataset: Any) -> list[int] | None:
    """Measure the columns of a table; None for other datasets."""
    if not type(dataset).__module__.startswith("datasets.") or getattr(dataset, "_format_type", "arrow") == "custom":
        return None
    import pyarrow as pa
    import pyarrow.compute as pc

    table = dataset.with_format("arrow")[:]
    best = []
    for name in table.column_names:
        column, kind = table.column(name), table.schema.field(name).type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            lengths = pc.list_value_length(column)
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            lengths = pc.binary_length(column)
        else:
            continue
        numbers = lengths.to_numpy(zero_copy_only=False)
        best.append((int(numbers.max()), int(numbers.argmax())))
    return list(dict.fromkeys(number for _, number in sorted(best, key=lambda pair: -pair[0])))
