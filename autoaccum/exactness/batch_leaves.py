"""Recognize targets, masks, lengths and weights among a batch's leaves."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch

from ..data import split as cutting
from ..data import tree
from ..workload import Batch

_TARGETS = re.compile(r"label|target|^y$|class|answer", re.IGNORECASE)
_MASKS = re.compile(r"mask", re.IGNORECASE)
_LENGTHS = re.compile(r"len", re.IGNORECASE)
_OF_TARGETS = re.compile(r"(^|_)len(gth)?s?$", re.IGNORECASE)


def leaf_of(batch: Batch, path: str) -> Any:
    """Return the leaf at a path."""
    return dict(tree.leaves(batch))[path]


def target_paths(batch: Batch) -> list[str]:
    """Return leaves that hold targets: by name, or second of pairs.

    Their lengths don't count.
    """
    found = [(path, leaf) for path, leaf in tree.leaves(batch) if not _OF_TARGETS.search(cutting._key(path))]
    named = [path for path, leaf in found if _TARGETS.search(cutting._key(path)) and is_batched(leaf)]
    if not named and isinstance(batch, (tuple, list)) and len(batch) == 2:
        named = [path for path, leaf in found if path == "batch[1]" and is_batched(leaf)]
    return named


def mask_paths(batch: Batch) -> list[str]:
    """Return leaves of zeros and ones with a mask's name."""
    return [
        path
        for path, leaf in tree.leaves(batch)
        if _MASKS.search(cutting._key(path)) and is_batched(leaf) and leaf.dim() >= 2 and is_binary(leaf)
    ]


def length_paths(batch: Batch) -> list[str]:
    """Return leaves of lengths: by name, with one integer for each sample."""
    return [
        path
        for path, leaf in tree.leaves(batch)
        if _LENGTHS.search(cutting._key(path)) and is_batched(leaf) and leaf.dim() == 1 and is_integer(leaf)
    ]


def weight_paths(batch: Batch) -> list[str]:
    """Return leaves that may weight samples: one non-negative float for each."""
    return [
        path
        for path, leaf in tree.leaves(batch)
        if is_batched(leaf) and leaf.dim() == 1 and leaf.is_floating_point() and bool((leaf >= 0).all())
    ]


def has_rows(leaf: Any, path: str, batch_keys: dict[str, Collection[str]]) -> bool:
    """Return whether a leaf has a row for each sample."""
    shared = cutting._names(batch_keys.get("shared", ()))
    return is_batched(leaf) and not cutting._named(path, shared)


def is_batched(leaf: Any) -> bool:
    """Whether a leaf is a real, non-empty tensor with a batch dimension."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.numel() > 0 and not leaf.is_complex()


def is_integer(leaf: Any) -> bool:
    """Whether a leaf is a tensor of integers, bool excluded."""
    return (
        isinstance(leaf, torch.Tensor)
        and not leaf.is_floating_point()
        and not leaf.is_complex()
        and leaf.dtype is not torch.bool
    )


def is_binary(leaf: torch.Tensor) -> bool:
    """Return whether a tensor holds zeros and ones alone."""
    return leaf.dtype is torch.bool or bool(((leaf == 0) | (leaf == 1)).all())


def is_mask(path: str, leaf: torch.Tensor) -> bool:
    """Return whether a leaf of zeros and ones has a mask's name."""
    return _MASKS.search(cutting._key(path)) is not None and is_binary(leaf)
