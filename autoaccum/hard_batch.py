"""Batches to test a loss on: the sample's own rows, and the same made hard.

One easy batch proves nothing: cross-entropy that ignores -100 looks like a mean where nothing is ignored, and a masked
mean where nothing is padded. So the hard batch has what real data has sooner or later: rows that differ, sorted
classes, unequal lengths, ignored targets, unequal weights. Knows names and shapes, nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import split as cutting
from . import tree
from .workload import IGNORED, Batch, Workload

LEAST_ROWS, MOST_ROWS = 8, 16
FEWEST_ROWS = 3  # where no more fit
NOISE = 0.5  # of a leaf's own standard deviation, added to floating-point rows
IGNORED_PART = 1 / 3

_TARGETS = re.compile(r"label|target|^y$|class|answer", re.IGNORECASE)
_MASKS = re.compile(r"mask", re.IGNORECASE)
_LENGTHS = re.compile(r"len", re.IGNORECASE)

# From the hardest on: a loss may not take what another does.
SORTED, RAGGED, IGNORING = "sorted classes", "unequal lengths", "ignored targets"
HARDNESSES = ((SORTED, RAGGED, IGNORING), (RAGGED, IGNORING), (SORTED, RAGGED), (RAGGED,), ())


@dataclass(frozen=True, eq=False)
class Trial:
    """A batch to test on.

    Attributes:
        batch: The whole of it.
        sizes: The uneven parts that it is cut into.
        made_up: Rows that the sample didn't have.
        hardness: What was made hard about it, besides noise; None for the sample's own rows.
        ignored: Paths of the leaves of which a part is ignored.
    """

    batch: Batch
    sizes: tuple[int, ...]
    made_up: int
    hardness: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()
    names: dict[str, Collection[str]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Samples in it."""
        return sum(self.sizes)

    def pieces(self) -> list[Batch]:
        """The parts."""
        return cutting.split(self.batch, self.sizes, **self.names)


def uneven(rows: int) -> tuple[int, ...]:
    """Parts of unlike sizes, since even ones hide errors: three of at least 2 (batch statistics need two), or two."""
    if rows < LEAST_ROWS:
        last = 2 if rows > 4 else 1
        return rows - last, last
    last, middle = max(2, rows // 5), max(2, rows // 3)
    return rows - middle - last, middle, last


def easy(workload: Workload, most: int = MOST_ROWS) -> Trial:
    """The sample's own rows, at most `most`; where it has fewer than eight, more are made of them."""
    names = {"shared": workload.shared, "per_sample": workload.per_sample}
    own = cutting.batch_size(workload.sample, **names)
    rows = min(max(own, LEAST_ROWS), MOST_ROWS, most)
    batch = cutting.tile(workload.sample, rows, **names)
    if rows > own:
        batch = _vary(batch, own, torch.Generator().manual_seed(1), names)
    return Trial(batch, uneven(rows), max(0, rows - own), names=names)


def harder(easy: Trial, hardness: tuple[str, ...], ignorable: dict[str, int]) -> Trial:
    """The same batch, made hard.

    Args:
        easy: The easy one.
        hardness: What to make hard about it, out of `HARDNESSES`.
        ignorable: Paths of leaves with classes, and the class of each that its loss leaves out.
    """
    generator = torch.Generator().manual_seed(2)
    batch = _noisy(easy.batch, generator, easy.names)
    done, ignored = [], tuple[str, ...]()
    targets = list(ignorable) or target_paths(batch)
    if SORTED in hardness and targets:
        batch = _sorted(batch, targets, easy.names)
        done.append(SORTED)
    lengths = _lengths(easy.rows, generator)
    if RAGGED in hardness and (mask_paths(batch) or length_paths(batch)):
        batch = _ragged(batch, lengths, easy.names)
        done.append(RAGGED)
    if IGNORING in hardness:
        batch, ignored = _ignoring(batch, easy, lengths, ignorable, generator)
        done += [IGNORING] * bool(ignored)
    return Trial(batch, easy.sizes, easy.made_up, tuple(done), ignored, easy.names)


def target_paths(batch: Batch) -> list[str]:
    """Leaves that hold targets, by their names; or the second of a pair."""
    found = tree.leaves(batch)
    named = [path for path, leaf in found if _TARGETS.search(cutting._key(path)) and _rows_of(leaf)]
    if not named and isinstance(batch, (tuple, list)) and len(batch) == 2:
        named = [path for path, leaf in found if path == "batch[1]" and _rows_of(leaf)]
    return named


def mask_paths(batch: Batch) -> list[str]:
    """Leaves of ones and zeros under the name of a mask."""
    return [
        path
        for path, leaf in tree.leaves(batch)
        if _MASKS.search(cutting._key(path)) and _rows_of(leaf) and leaf.dim() >= 2 and _is_binary(leaf)
    ]


def length_paths(batch: Batch) -> list[str]:
    """Leaves of lengths: one positive integer for each sample, by their names."""
    return [
        path
        for path, leaf in tree.leaves(batch)
        if _LENGTHS.search(cutting._key(path)) and _rows_of(leaf) and leaf.dim() == 1 and _is_integer(leaf)
    ]


def weight_paths(batch: Batch) -> list[str]:
    """Leaves that may weigh samples: a floating-point number for each, none negative."""
    return [
        path
        for path, leaf in tree.leaves(batch)
        if _rows_of(leaf) and leaf.dim() == 1 and leaf.is_floating_point() and bool((leaf >= 0).all())
    ]


def _vary(batch: Batch, own: int, generator: torch.Generator, names: dict[str, Collection[str]]) -> Batch:
    """Makes the rows from `own` on differ from those that they repeat."""

    def vary(path: str, leaf: Any) -> Any:
        if not _cut(leaf, path, names):
            return leaf
        changed = leaf.clone()
        if leaf.is_floating_point() and not _is_binary(leaf):
            changed[own:] = _with_noise(leaf, generator)[own:]
        elif _is_integer(leaf) and not _is_mask(path, leaf):
            flat = leaf.reshape(-1)
            picked = torch.randint(len(flat), leaf.shape, generator=generator)
            other = flat[picked.to(leaf.device)]
            new = torch.where((leaf == IGNORED) | (other == IGNORED), leaf, other)
            changed[own:] = new[own:]
        elif _is_binary(leaf) and not _is_mask(path, leaf):
            order = torch.randperm(len(leaf), generator=generator).to(leaf.device)
            changed = leaf[order]
        return changed

    return tree.map_leaves(batch, vary)


def _noisy(batch: Batch, generator: torch.Generator, names: dict[str, Collection[str]]) -> Batch:
    """Noise on what is continuous; weights that were all alike no longer are."""
    weights = set(weight_paths(batch))

    def noisy(path: str, leaf: Any) -> Any:
        if not _cut(leaf, path, names) or not leaf.is_floating_point() or _is_mask(path, leaf):
            return leaf
        if path in weights and bool((leaf == leaf[0]).all()):
            factors = torch.linspace(0.2, 1.0, len(leaf), dtype=leaf.dtype)
            return leaf * factors.to(leaf.device)
        constant = bool((leaf == leaf.reshape(-1)[0]).all())
        return leaf if _is_binary(leaf) and not constant else _with_noise(leaf, generator)

    return tree.map_leaves(batch, noisy)


def _with_noise(leaf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The leaf with noise, inside the range that it had: a picture stays between 0 and 1, and so do ones alone."""
    low, high, spread = leaf.min(), leaf.max(), leaf.std()
    noise = torch.randn(leaf.shape, generator=generator).to(leaf)
    if not bool(spread > 0):
        return noise.sigmoid() if _is_binary(leaf) else leaf + noise
    return (leaf + NOISE * spread * noise).clamp(low, high)


def _sorted(batch: Batch, targets: Sequence[str], names: dict[str, Collection[str]]) -> Batch:
    """The rows in the order of their targets, so that the parts have other classes."""
    found = dict(tree.leaves(batch))
    keys = [found[path] for path in targets if path in found]
    if not keys:
        return batch
    key = keys[0].reshape(len(keys[0]), -1).double().mean(1)
    order = torch.argsort(key, stable=True)

    def ordered(path: str, leaf: Any) -> Any:
        return leaf[order.to(leaf.device)] if _cut(leaf, path, names) else leaf

    return tree.map_leaves(batch, ordered)


def _lengths(rows: int, generator: torch.Generator) -> torch.Tensor:
    """A length for each row as a part of the longest, from 1 down to a quarter: longest first, as the Runner sorts."""
    return torch.linspace(1, 0.25, rows) * (1 - 0.1 * torch.rand(rows, generator=generator))


def _ragged(batch: Batch, lengths: torch.Tensor, names: dict[str, Collection[str]]) -> Batch:
    masks, scaled = set(mask_paths(batch)), set(length_paths(batch))

    def ragged(path: str, leaf: Any) -> Any:
        if path in scaled:
            return (leaf * lengths.to(leaf.device)).ceil().clamp(min=1).to(leaf.dtype).minimum(leaf)
        if path not in masks:
            return leaf
        padding = 0 if bool(leaf.any()) else 1  # all zeros: it marks what is padded
        changed = leaf.clone()
        changed[_behind(leaf, lengths)] = padding
        return changed

    return tree.map_leaves(batch, ragged)


def _behind(leaf: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Which positions of (rows, longest, ...) lie behind each row's length."""
    longest = leaf.shape[1]
    ends = (lengths * longest).ceil().clamp(min=1)
    behind = torch.arange(longest)[None, :] >= ends[:, None]
    return behind.reshape(*behind.shape, *[1] * (leaf.dim() - 2)).expand(leaf.shape).to(leaf.device)


def _ignoring(
    batch: Batch, easy: Trial, lengths: torch.Tensor, ignorable: dict[str, int], generator: torch.Generator
) -> tuple[Batch, tuple[str, ...]]:
    """Ignores a third of the targets, more of them in the first part, but never all of a part."""
    chosen = ignorable or {path: IGNORED for path in target_paths(batch)}
    done = []

    def ignoring(path: str, leaf: Any) -> Any:
        if path not in chosen or not _is_integer(leaf) or _is_mask(path, leaf):
            return leaf
        done.append(path)
        changed = leaf.clone()
        if leaf.dim() == 1:
            number = min(max(1, round(IGNORED_PART * len(leaf))), easy.sizes[0] - 1)
            changed[1 : 1 + number] = chosen[path]
            return changed
        drawn = torch.rand(leaf.shape, generator=generator) < IGNORED_PART

        ignored = drawn.to(leaf.device) | (_behind(leaf, lengths) if leaf.dim() == 2 and leaf.shape[1] > 2 else False)
        if leaf.shape[1] > 1:
            ignored[:, 1] = False
        changed[ignored] = chosen[path]
        return changed

    return tree.map_leaves(batch, ignoring), tuple(done)


def _cut(leaf: Any, path: str, names: dict[str, Collection[str]]) -> bool:
    """Whether a leaf has a row for each sample."""
    shared = cutting._names(names.get("shared", ()))
    return _rows_of(leaf) and not cutting._named(path, shared)


def _rows_of(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.numel() > 0 and not leaf.is_complex()


def _is_integer(leaf: Any) -> bool:
    return (
        isinstance(leaf, torch.Tensor)
        and not leaf.is_floating_point()
        and not leaf.is_complex()
        and leaf.dtype is not torch.bool
    )


def _is_binary(leaf: torch.Tensor) -> bool:
    return leaf.dtype is torch.bool or bool(((leaf == 0) | (leaf == 1)).all())


def _is_mask(path: str, leaf: torch.Tensor) -> bool:
    return _MASKS.search(cutting._key(path)) is not None and _is_binary(leaf)
