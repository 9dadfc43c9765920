"""Take one rank's part of every window of a shared loader."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import tree

if TYPE_CHECKING:
    from ..workload import Batch

_DIGEST_BYTES = 256  # of each tensor: enough to tell one sample from another


@dataclass(frozen=True)
class Part:
    """Which samples of a window are this rank's.

    Attributes:
        of: `of(samples)`, their place in a window of so many samples.
        drawing: Entered while the loader draws its order, so that all ranks read the same.
    """

    of: Callable[[int], slice]
    drawing: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def digest_of_indices(indices: Sequence[Any]) -> int:
    """Return a number that other samples of a dataset would hardly have."""
    return zlib.crc32(repr(list(indices)).encode())


def digest_of_batch(batch: Batch, samples: int) -> int:
    """Return a number that another batch would hardly have."""
    found = zlib.crc32(str(samples).encode())
    for leaf in tree.tensors(batch):
        first = leaf[:1] if leaf.dim() else leaf
        row = first.reshape(-1)[:_DIGEST_BYTES].detach().cpu().contiguous()
        found = zlib.crc32(repr(row.tolist()).encode(), found)
    return found
