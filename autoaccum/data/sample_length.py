"""A sample of any length: as long as the longest there is, which the first batch rarely has, and as short as others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ..errors import UsageError
from ..workload import Batch, Workload
from . import tree


def positions(batch: Batch) -> int | None:
    """The length that a batch's sequences are padded to: what dimension 1 of most of its tensors has.

    Args:
        batch: A tree of tensors of shape (samples, length, ...). Integers, which tokens are, settle it where there are
            some; pictures and features don't.

    Returns:
        The length; None where it has no sequences, or of several lengths.
    """
    leaves = [leaf for _, leaf in tree.leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2]
    integers = [leaf for leaf in leaves if not leaf.is_floating_point() and not leaf.is_complex()]
    found = Counter(leaf.shape[1] for leaf in integers or leaves)
    return next(iter(found)) if len(found) == 1 else None


def at_longest(workload: Workload) -> tuple[Batch, str]:
    """The sample, made as long as the longest of `lengths=` by repeating its own positions.

    Returns:
        The sample, and what was done in words; empty where it is long enough as it is, or there are no lengths.

    Raises:
        UsageError: It is shorter, and it isn't plain which of its dimensions are the length.
    """
    sample, longest = workload.sample, max(workload.lengths or [0], default=0)
    known = positions(sample)
    if longest <= (known or _largest(sample)):
        return sample, ""
    doubtful = [path for path, leaf in tree.leaves(sample) if known is not None and _is_doubtful(leaf, known)]
    if known is None or doubtful:
        where = f"{doubtful[0]} has that length twice" if doubtful else "its tensors have several lengths"
        raise UsageError(
            f"The longest sample has {longest} positions by lengths=, the sample has {known or _largest(sample)}, and "
            f"{where}.",
            "Memory follows the length, so it has to be planned at the longest.",
            f"Give a sample with {longest} positions: Workload(model, sample=..., lengths=...).",
        )
    told = f"The sample has {known} positions, the longest by lengths= has {longest}: planned at {longest}"
    return tree.map_leaves(sample, lambda _, leaf: _lengthened(leaf, known, longest)), f"{told}."


def shortened(sample: Batch, length: int) -> Batch:
    """The first positions of a sample."""
    known = positions(sample)
    return tree.map_leaves(sample, lambda _, leaf: leaf[:, :length] if _has(leaf, known) else leaf)


def _largest(batch: Batch) -> int:
    """The largest of all dimensions but the first."""
    shapes = [leaf.shape[1:] for _, leaf in tree.leaves(batch) if isinstance(leaf, torch.Tensor)]
    return max((size for shape in shapes for size in shape), default=0)


def _is_doubtful(leaf: Any, length: int) -> bool:
    """Whether a leaf might have its length in two places: a mask of pairs, or features of the same number."""
    return isinstance(leaf, torch.Tensor) and list(leaf.shape[1:]).count(length) > 1


def _lengthened(leaf: Any, length: int, longest: int) -> Any:
    return leaf[:, torch.arange(longest, device=leaf.device) % length] if _has(leaf, length) else leaf


def _has(leaf: Any, length: int | None) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() >= 2 and leaf.shape[1] == length
