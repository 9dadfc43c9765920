"""Traverse and rebuild a batch as a tree.

Mappings, lists, tuples and dataclasses hold other nodes; everything else is a leaf.

Knows how to list the leaves with readable paths and how to rebuild the same tree around other leaves; knows nothing
of samples or of what can be cut (see `split`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from ..errors import BatchError

if TYPE_CHECKING:
    from ..workload import Batch

IsLeaf = Callable[[str, Any], bool]


def leaves(batch: Batch, *, is_leaf: IsLeaf | None = None) -> list[tuple[str, Any]]:
    """Return the leaves of a batch in order, with their paths.

    A path reads `batch['image'][0]` or `batch.ids`.

    Args:
        batch: Any tree of mappings, lists, tuples, namedtuples and dataclass instances.
        is_leaf: `is_leaf(path, node)`, true for a container that is to be taken as one leaf.
    """
    found: list[tuple[str, Any]] = []
    _collect("batch", batch, is_leaf, found)
    return found


def map_leaves(batch: Batch, function: Callable[[str, Any], Any], *, is_leaf: IsLeaf | None = None) -> Batch:
    """Return the same tree around `function(path, leaf)` in place of each leaf.

    Containers are made anew, of their own types and with their keys in order; the batch itself is not changed.

    Args:
        batch: Any tree, as for `leaves`.
        function: Called once for each leaf, in the order of `leaves`.
        is_leaf: `is_leaf(path, node)`, true for a container that is to be taken as one leaf.

    Raises:
        BatchError: A mapping or a dataclass can't be made anew from its items.
    """
    return _map("batch", batch, function, is_leaf)


def as_tensors(batch: Batch, floats: torch.dtype | None = None) -> Batch:
    """Return a batch whose numpy arrays are tensors.

    Where there are none, it is the batch itself. Arrays of strings or objects become lists.

    Args:
        batch: Any tree, as for `leaves`.
        floats: What numpy's default, float64, becomes: the model's type. None to keep it.
    """
    if not any(isinstance(leaf, np.ndarray) for _, leaf in leaves(batch)):
        return batch

    def as_tensor(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return leaf
        if leaf.dtype.kind not in "biufc":
            return leaf.tolist()
        tensor = torch.from_numpy(leaf if leaf.flags.writeable else leaf.copy())
        return tensor.to(floats) if floats is not None and tensor.dtype is torch.float64 else tensor

    return map_leaves(batch, as_tensor)


def same(first: Any, second: Any) -> bool:
    """Return whether two shared values are equal; what can't be compared isn't."""
    if first is second:
        return True
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return (first.dtype, first.device) == (second.dtype, second.device) and torch.equal(first, second)
    ones, others = leaves(first), leaves(second)
    if len(ones) > 1 or ones[0][1] is not first:
        paths = [path for path, _ in ones] == [path for path, _ in others]
        return paths and all(same(one, other) for (_, one), (_, other) in zip(ones, others, strict=True))
    try:
        return type(first) is type(second) and bool(first == second)
    except (RuntimeError, TypeError, ValueError):
        return False


def tensors(batch: Batch) -> list[torch.Tensor]:
    """Return all tensors of a batch, those in graphs too."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, keep)
    return found


def map_tensors(batch: Batch, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """Return the same tree around `function(tensor)` for each tensor.

    Packed sequences and graphs are made anew around theirs; the sizes in a packed sequence stay on the host.

    Args:
        batch: Any tree, as for `leaves`.
        function: Called once for each tensor.
    """

    def mapped(_: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        if isinstance(leaf, PackedSequence):
            indices = [
                None if each is None else function(each) for each in (leaf.sorted_indices, leaf.unsorted_indices)
            ]
            return PackedSequence(function(leaf.data), leaf.batch_sizes, *indices)
        if callable(getattr(leaf, "apply", None)) and callable(getattr(leaf, "to", None)):  # torch_geometric's data
            return copy.copy(leaf).apply(function)
        return leaf

    return map_leaves(batch, mapped)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move a batch's tensors to a device, in new containers.

    The containers are new even where no tensor moves: a loss may pop keys, and the window's piece has to stay whole
    for a repetition. Pinned tensors are copied without waiting for the copy, which the device's stream orders before
    their use.
    """

    def move(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.to(device, non_blocking=leaf.device.type == "cpu" and leaf.is_pinned())

    return map_tensors(batch, move)


def _collect(path: str, node: Any, is_leaf: IsLeaf | None, found: list[tuple[str, Any]]) -> None:
    children = None if is_leaf and is_leaf(path, node) else _children(path, node)
    if children is None:
        found.append((path, node))
        return
    for child_path, child in children:
        _collect(child_path, child, is_leaf, found)


def _map(path: str, node: Any, function: Callable[[str, Any], Any], is_leaf: IsLeaf | None) -> Any:
    children = None if is_leaf and is_leaf(path, node) else _children(path, node)
    if children is None:
        return function(path, node)
    values = [_map(child_path, child, function, is_leaf) for child_path, child in children]
    try:
        return _rebuild(node, values)
    except (TypeError, ValueError) as error:
        raise BatchError(
            f"{path} is a {type(node).__name__}, which could not be made anew around other tensors: {error}",
            "Each micro-batch needs a separate container.",
            "Give that part of the batch as a dict, a tuple or a plain dataclass.",
        ) from error


def _children(path: str, node: Any) -> list[tuple[str, Any]] | None:
    """Return the child nodes with their paths; None for a leaf."""
    if isinstance(
        node, (torch.Tensor, str, PackedSequence)
    ):  # most nodes: answered first, since this runs for each micro-batch
        return None
    if isinstance(node, Mapping):
        return [(f"{path}[{key!r}]", child) for key, child in node.items()]
    if isinstance(node, (list, tuple)):
        if hasattr(node, "_fields"):
            return [(f"{path}.{name}", child) for name, child in zip(node._fields, node, strict=True)]
        return [(f"{path}[{index}]", child) for index, child in enumerate(node)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f"{path}.{name}", getattr(node, name)) for name in _fields(node)]
    return None


def _rebuild(node: Any, values: list[Any]) -> Any:
    """Rebuild a container around other values.

    They come in the order of its children.
    """
    if type(node) in (list, tuple):
        return type(node)(values)
    if isinstance(node, Mapping):
        items = dict(zip(node, values, strict=True))
        if type(node) is dict:
            return items
        if not isinstance(node, dict):  # UserDict, BatchEncoding: a shallow copy could share the dict inside
            return type(node)(items)  # type: ignore[call-arg]
        fresh = copy.copy(node)  # OrderedDict, defaultdict: what else they hold comes along
        for key, value in items.items():
            fresh[key] = value
        return fresh
    if isinstance(node, (list, tuple)):
        return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
    return dataclasses.replace(node, **dict(zip(_fields(node), values, strict=True)))


def _fields(node: Any) -> list[str]:
    """Return the fields that a dataclass is created from.

    What its `__post_init__` derives from them is derived anew.
    """
    return [field.name for field in dataclasses.fields(node) if field.init]
