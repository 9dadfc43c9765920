"""Make batches of any size by a loader's own collate function.

Not every batch is cut along dimension 0: lists of pictures with their boxes, graphs, packed sequences, concatenated
targets, sequences with time first. But their collate function makes a batch of any samples. `Collated` stands for such
a batch: `split.batch_size`, `split.select` and `split.split` take its samples, and `materialized` collates them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BatchError
from . import tree
from .groups import Grouped

if TYPE_CHECKING:
    from ..workload import Batch

COLLATED = "each sample, collated"  # the path of such a batch's form in a plan
_TRIED_SAMPLES = (1, 2, 3)


@dataclass(frozen=True, eq=False)
class Collated:
    """Samples of a dataset, and the function that collates them.

    Attributes:
        items: The samples, as the dataset returns them, the largest first.
        collate: `collate(samples)`, a batch.
        floats: What float64 arrays become; None to keep them.
    """

    items: tuple[Any, ...]
    collate: Callable[[list[Any]], Batch]
    floats: torch.dtype | None = None

    def batch(self) -> Batch:
        """Collate the samples."""
        return tree.as_tensors(self.collate(list(self.items)), self.floats)

    def taken(self, rows: Sequence[int]) -> Collated:
        """Return some of the samples, in any order, with repetition."""
        return Collated(tuple(self.items[row] for row in rows), self.collate, self.floats)

    def tiled(self, n: int) -> Batch:
        """Return a batch of n samples, of one size each, for recording.

        Where samples differ in size only the first, the largest, is repeated: memory then grows by a rule.
        """
        alike = len({elements(item) for item in self.items}) == 1
        return self.taken([row % len(self.items) if alike else 0 for row in range(n)]).batch()


def materialized(batch: Batch) -> Batch:
    """Return a batch itself, or what its samples are collated to."""
    if isinstance(batch, Grouped):
        return materialized(batch.rows)
    return batch.batch() if isinstance(batch, Collated) else batch


def elements(item: Any) -> int:
    """Return the numbers in a sample: its size, to find the largest."""
    found = 0
    for leaf in tree.tensors(tree.as_tensors(item)):
        found += leaf.numel()
    for _, leaf in tree.leaves(item):
        size = getattr(leaf, "size", None)
        if isinstance(size, tuple) and len(size) == 2:  # a PIL picture
            found += size[0] * size[1]
    return found


def is_cut_by_rows(
    items: Sequence[Any], collate: Callable[[list[Any]], Batch], rows_of: Callable[[Batch], int]
) -> bool:
    """Return whether n samples are collated to a batch of n rows.

    Args:
        items: At least one sample.
        collate: The collate function.
        rows_of: `rows_of(batch)`, its rows along dimension 0; raises BatchError where they aren't known.
    """
    try:
        return all(
            rows_of(tree.as_tensors(collate([items[row % len(items)] for row in range(n)]))) == n
            for n in _TRIED_SAMPLES
        )
    except BatchError:
        return False


def tensor_bytes(batch: Batch) -> int:
    """Return the bytes of a batch's tensors."""
    return sum(tensor.nbytes for tensor in tree.tensors(materialized(batch)))
