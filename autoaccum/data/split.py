"""Cut one batch into micro-batches, or raise with the key's name.

What can't be cut for certain raises.

Knows which leaves have a row for each sample and which are shared by all micro-batches; knows nothing of loaders,
memory or models. Samples lie in dimension 0. A name in `shared` or `per_sample` is a key (or field), or a whole path
such as `batch[1]`; it settles what the shapes leave open.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BatchError
from . import tree
from .collated import Collated
from .groups import Grouped
from .uncollated import refuse_samples

if TYPE_CHECKING:
    from ..workload import Batch

_PLAIN = (str, bytes, int, float, type(None), Number)

# One value per class or one per sample? `class_weight`, `pos_weight`, `priors`; but `sample_weight` says it itself.
_LIKE_CLASS_WEIGHTS = re.compile(r"(weights?|priors?)$|^class_", re.IGNORECASE)
_SAYS_PER_SAMPLE = re.compile(r"sample|example|instance|row", re.IGNORECASE)
# Positions in something packed: cutting them gives wrong attention or an illegal access (torchtitan#4098).
_LIKE_POSITIONS = re.compile(r"cu_?seq_?len|offsets|indptr|row_splits|batch_sizes|edge_index|^ptr$", re.IGNORECASE)


@dataclass(frozen=True)
class _Survey:
    """A batch's number of samples, its leaves, and which are cut."""

    rows: int
    leaves: list[tuple[str, Any]]
    cut: frozenset[str]
    is_leaf: tree.IsLeaf


def batch_size(batch: Batch, *, shared: Collection[str] = (), per_sample: Collection[str] = ()) -> int:
    """Return the number of samples in a batch.

    All that has a row for each sample must agree on it.

    Args:
        batch: A tree whose tensors of one dimension or more have the shape (samples, ...). Lists and tuples of
            strings or numbers have one for each sample. Tensors of no dimension, numbers, strings and None are
            shared by all micro-batches.
        shared: Keys of what each micro-batch gets whole, whatever it is.
        per_sample: Keys of what has a row for each sample: a tensor under a doubtful name, or a list (of tensors,
            of dicts) with one element for each sample.

    Raises:
        BatchError: Leaves disagree, none has rows, one can't be cut, or one could be either.
    """
    if isinstance(batch, Collated):
        return len(batch.items)
    if isinstance(batch, Grouped):
        return batch_size(batch.rows, shared=shared, per_sample=per_sample) // batch.size
    return _survey(batch, shared, per_sample).rows


def split(
    batch: Batch, sizes: Sequence[int], *, shared: Collection[str] = (), per_sample: Collection[str] = ()
) -> list[Batch]:
    """Cut a batch into consecutive pieces; concatenated they are the batch again.

    Args:
        batch: As for `batch_size`.
        sizes: Samples in each piece, at least 1 each; their sum is the batch size.
        shared: As for `batch_size`.
        per_sample: As for `batch_size`.

    Returns:
        The pieces, in order. Their tensors are views of the batch's, of shape (size, ...).

    Raises:
        BatchError: The sizes don't sum to the batch size, or the batch can't be cut.
    """
    if isinstance(batch, Grouped):
        rows = [batch.size * size for size in sizes]
        return [Grouped(piece, batch.size) for piece in split(batch.rows, rows, shared=shared, per_sample=per_sample)]
    if isinstance(batch, Collated):
        return [batch.taken(range(end - size, end)) for end, size in zip(accumulate(sizes), sizes, strict=True)]
    survey = _survey(batch, shared, per_sample)
    if sum(sizes) != survey.rows or min(sizes, default=0) < 1:
        raise BatchError(
            f"A batch of {survey.rows} samples can't be cut into micro-batches of {', '.join(map(str, sizes))}.",
            f"They sum to {sum(sizes)}, and each sample must be in exactly one of them.",
            f"Give sizes of at least 1 that sum to {survey.rows}.",
        )
    return [_piece(batch, survey, end - size, size) for end, size in zip(accumulate(sizes), sizes, strict=True)]


def tile(batch: Batch, n: int, *, shared: Collection[str] = (), per_sample: Collection[str] = ()) -> Batch:
    """Repeat a batch's samples in order, up to n.

    Args:
        batch: As for `batch_size`; a batch of s samples.
        n: Samples wanted, at least 1; fewer than s will do.
        shared: As for `batch_size`.
        per_sample: As for `batch_size`.

    Returns:
        A batch whose row i is row i % s, in new storage. What is shared is the same object.

    Raises:
        BatchError: n is below 1, or the batch can't be cut.
    """
    if n < 1:
        raise BatchError(f"A batch of {n} samples can't be made.", hint="Ask for at least 1.")
    if isinstance(batch, Collated):
        return batch.tiled(n)
    if isinstance(batch, Grouped):
        return tile(batch.rows, n * batch.size, shared=shared, per_sample=per_sample)
    own = batch_size(batch, shared=shared, per_sample=per_sample)
    return select(batch, [row % own for row in range(n)], shared=shared, per_sample=per_sample)


def select(
    batch: Batch, rows: Sequence[int], *, shared: Collection[str] = (), per_sample: Collection[str] = ()
) -> Batch:
    """Select samples of a batch, in any order, with repetition.

    Args:
        batch: As for `batch_size`.
        rows: Which sample each row is to be, counted from 0.
        shared: As for `batch_size`.
        per_sample: As for `batch_size`.

    Returns:
        A batch in new storage. What is shared is the same object.
    """
    if isinstance(batch, Collated):
        return batch.taken(rows)
    if isinstance(batch, Grouped):
        return Grouped(select(batch.rows, batch.indices(rows), shared=shared, per_sample=per_sample), batch.size)
    survey = _survey(batch, shared, per_sample)
    index = torch.tensor(rows, device="cpu")

    def chosen(path: str, leaf: Any) -> Any:
        if path not in survey.cut:
            return leaf
        if isinstance(leaf, torch.Tensor):
            return _select(leaf, index)
        return type(leaf)(leaf[row] for row in rows)

    return tree.map_leaves(batch, chosen, is_leaf=survey.is_leaf)


def joinable(first: Batch, second: Batch, *, shared: Collection[str] = (), per_sample: Collection[str] = ()) -> bool:
    """Return whether two batches differ in their samples only.

    Structure, trailing shapes, dtypes and shared values must be the same.

    Raises:
        BatchError: One of them can't be cut.
    """
    return _agree(_survey(first, shared, per_sample), _survey(second, shared, per_sample))


def join(batches: Sequence[Batch], *, shared: Collection[str] = (), per_sample: Collection[str] = ()) -> Batch | None:
    """Concatenate batches, in order.

    Args:
        batches: At least one batch, each as for `batch_size`.
        shared: As for `batch_size`.
        per_sample: As for `batch_size`.

    Returns:
        A batch with the samples of all, each tensor of shape (sum of samples, ...); None where they aren't
        `joinable`. A single batch is returned as it is.

    Raises:
        BatchError: There is none to join, or one of them can't be cut.
    """
    if not batches:
        raise BatchError("There is no batch to join.", hint="Give at least one.")
    if len(batches) == 1:
        return batches[0]
    first, *others = (_survey(batch, shared, per_sample) for batch in batches)
    if not all(_agree(first, other) for other in others):
        return None
    columns = zip(first.leaves, *(other.leaves for other in others), strict=True)
    joined = {
        path: _concatenate([leaf, *(other for _, other in rest)])
        for (path, leaf), *rest in columns
        if path in first.cut
    }
    return tree.map_leaves(batches[0], lambda path, leaf: joined.get(path, leaf), is_leaf=first.is_leaf)


def _survey(batch: Batch, shared: Collection[str], per_sample: Collection[str]) -> _Survey:
    """List the leaves and finds which are cut, or raises."""
    whole, rowwise = _names(shared), _names(per_sample)

    def is_leaf(path: str, node: Any) -> bool:
        if _named(path, whole):
            return True
        if type(node) not in (list, tuple):
            return False
        return _named(path, rowwise) or (len(node) > 0 and all(isinstance(value, _PLAIN) for value in node))

    if not _named("batch", whole | rowwise):
        refuse_samples(batch)
    found = tree.leaves(batch, is_leaf=is_leaf)
    settled = frozenset(path for path, _ in found if _named(path, rowwise))
    lengths = {}
    for path, leaf in found:
        length = None if _named(path, whole) else _length(path, leaf, settled=path in settled)
        if length is not None:
            lengths[path] = length
    rows = _agreed(dict(found), lengths, settled)
    for path, leaf in found:
        if path in lengths and path not in settled:
            _refuse_class_weights(path, leaf, rows)
    return _Survey(rows, found, frozenset(lengths), is_leaf)


def _names(names: Collection[str]) -> frozenset[str]:
    """Return the names as a set.

    A single string is one name, not the set of its letters.
    """
    return frozenset((names,) if isinstance(names, str) else names)


def _named(path: str, names: frozenset[str]) -> bool:
    return bool(names) and (path in names or _key(path) in names)


@lru_cache(maxsize=4096)
def _key(path: str) -> str:
    """Return the last key or field of a path.

    List positions are left out; without a key it is the path itself.
    """
    match = re.search(r"(?:\['([^']+)'\]|\.(\w+))(?:\[\d+\])*$", path)
    return (match[1] or match[2]) if match else path


def _length(path: str, leaf: Any, *, settled: bool) -> int | None:
    """Return the rows of a leaf; None where it is shared."""
    if isinstance(leaf, torch.Tensor):
        if leaf.is_nested or leaf.layout is not torch.strided:
            raise _cannot_cut(path, "a nested tensor" if leaf.is_nested else f"a tensor in layout {leaf.layout}")
        if leaf.dim() and not settled and _LIKE_POSITIONS.search(_key(path)) and _is_integer(leaf):
            why = "By its name it holds positions in packed sequences, which move when the batch is cut."
            how = "A map-style DataLoader isn't cut: there its collate_fn packs each micro-batch anew. "
            raise _ambiguous(path, leaf, why, how)
        return leaf.shape[0] if leaf.dim() else None
    if type(leaf) in (list, tuple):
        return len(leaf)
    if isinstance(leaf, _PLAIN):
        return None
    raise _cannot_cut(path, f"a {type(leaf).__module__}.{type(leaf).__qualname__}")


def _is_integer(leaf: torch.Tensor) -> bool:
    return not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype is torch.bool)


def _agreed(leaves: Mapping[str, Any], lengths: Mapping[str, int], settled: Collection[str]) -> int:
    """Return the number of rows that all leaves with rows have."""
    if not lengths:
        listed = ", ".join(f"{path} ({_describe(leaf)})" for path, leaf in list(leaves.items())[:5]) or "no leaf at all"
        raise BatchError(
            f"The batch has nothing with a row for each sample: {listed}.",
            "Micro-batches are cut along dimension 0 of its tensors.",
            "Give tensors of shape (samples, ...); a single sample is a batch of 1: tensor[None].",
        )
    if len(set(lengths.values())) > 1:
        raise _disagreement(leaves, lengths, settled)
    path, rows = next(iter(lengths.items()))
    if rows == 0:
        raise BatchError(
            f"The batch has 0 samples: {path} is {_describe(leaves[path])}.",
            hint="Leave empty batches out of the loader.",
        )
    return rows


def _disagreement(leaves: Mapping[str, Any], lengths: Mapping[str, int], settled: Collection[str]) -> BatchError:
    """Name the leaf that the others contradict.

    Lists are named too, as their elements may be the samples.
    """
    votes: Counter[int] = Counter()
    for path, length in lengths.items():  # a tensor of many dimensions is data, a vector may be anything
        leaf = leaves[path]
        votes[length] += 10**6 if path in settled else leaf.dim() if isinstance(leaf, torch.Tensor) else 0
    usual = votes.most_common(1)[0][0]
    odd = next(path for path, length in lengths.items() if length != usual)
    like = [path for path, length in lengths.items() if length == usual]
    others = f" and {len(like) - 1} more" if len(like) > 1 else ""
    hint = f"If each micro-batch is to get {odd} whole, say shared={{{_key(odd)!r}}}."
    in_lists = dict.fromkeys(match[1] for path in lengths if (match := re.match(r"(batch.+?)\[\d+\]", path)))
    for name in list(in_lists)[:2]:
        hint += f" If the list {name} has one element for each sample, say per_sample={{{_key(name)!r}}}."
    return BatchError(
        f"{odd} ({_describe(leaves[odd])}) has {lengths[odd]} rows, "
        f"while {like[0]} ({_describe(leaves[like[0]])}){others} has {usual}.",
        "Micro-batches are cut along dimension 0, so all must have one row for each sample there.",
        hint,
    )


def _refuse_class_weights(path: str, leaf: Any, rows: int) -> None:
    """Refuse a vector that may have a value for each class.

    By chance it has as many values as there are samples.
    """
    if not isinstance(leaf, torch.Tensor) or leaf.dim() != 1 or not leaf.is_floating_point():
        return
    if _LIKE_CLASS_WEIGHTS.search(_key(path)) and not _SAYS_PER_SAMPLE.search(_key(path)):
        raise _ambiguous(
            path, leaf, f"By its name it may have a value for each class, and the batch has {rows} samples, too."
        )


def _ambiguous(path: str, leaf: Any, why: str, how: str = "") -> BatchError:
    key = _key(path)
    return BatchError(
        f"{path} ({_describe(leaf)}) may or may not have a row for each sample.",
        why,
        f"{how}If each micro-batch is to get it whole, say shared={{{key!r}}}; if it is to be cut with the samples, "
        f"say per_sample={{{key!r}}}.",
    )


def _cannot_cut(path: str, what: str) -> BatchError:
    return BatchError(
        f"{path} is {what}, which can't be cut into micro-batches.",
        "Known are dense tensors, strings, numbers and None, in mappings, lists, tuples and dataclasses.",
        f"If each micro-batch is to get it whole, say shared={{{_key(path)!r}}}; else give it as a tensor with the "
        "samples in dimension 0, or give the Workload loader=, a DataLoader whose collate_fn makes each micro-batch.",
    )


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"shape {tuple(leaf.shape)}"
    return f"{type(leaf).__name__} of {len(leaf)}" if type(leaf) in (list, tuple) else type(leaf).__name__


def _piece(batch: Batch, survey: _Survey, start: int, size: int) -> Batch:
    def take(path: str, leaf: Any) -> Any:
        if path not in survey.cut:
            return leaf
        return leaf.narrow(0, start, size) if isinstance(leaf, torch.Tensor) else leaf[start : start + size]

    return tree.map_leaves(batch, take, is_leaf=survey.is_leaf)


def _select(leaf: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copy rows of a tensor, in its own memory format.

    The sample's format is the one whose memory is recorded.
    """
    chosen = leaf.detach().index_select(0, rows.to(leaf.device))
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if leaf.dim() == dims and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=memory_format):
            chosen = chosen.contiguous(memory_format=memory_format)
    return chosen.requires_grad_(leaf.requires_grad)


def _concatenate(parts: list[Any]) -> Any:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return type(parts[0])(value for part in parts for value in part)


def _agree(first: _Survey, second: _Survey) -> bool:
    """Return whether two batches agree, up to the rows that are cut."""
    if first.cut != second.cut or [path for path, _ in first.leaves] != [path for path, _ in second.leaves]:
        return False
    pairs = zip(first.leaves, second.leaves, strict=True)
    return all(_alike(one, other) if path in first.cut else tree.same(one, other) for (path, one), (_, other) in pairs)


def _alike(first: Any, second: Any) -> bool:
    """Return whether rows of the one can follow rows of the other."""
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return type(first) is type(second)
    return (first.shape[1:], first.dtype, first.device) == (second.shape[1:], second.dtype, second.device)
