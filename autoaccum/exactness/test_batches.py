"""Batches to test a loss on: the sample's rows, made harder.

One easy batch proves nothing: cross-entropy that ignores -100 looks like a mean where nothing is ignored, and a masked
mean where nothing is padded. So the hard batch has what real data has sooner or later: rows that differ, sorted
classes, unequal lengths, ignored targets, unequal weights. And one hard batch proves little: weights taken from the
batch's own class counts cancel out where each part has one class. So the same rows come in another mix, too.

Rows are moved, repeated and cut. A value that the sample doesn't have is made up only where `freedom` allows it, since
not every operator checks its indices. Knows names and shapes, nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..data import split as cutting
from ..data import tree
from ..workload import IGNORED, Batch, Workload
from .batch_leaves import (
    has_rows,
    is_binary,
    is_integer,
    is_mask,
    leaf_of,
    length_paths,
    mask_paths,
    target_paths,
    weight_paths,
)
from .value_uses import ANY, KEPT

MIN_ROWS, MAX_ROWS = 8, 16
MIN_ROWS_AT_ONCE = 2  # at once, where no more fit: as often as it takes to come to the least
NOISE_RATIO = 0.5  # of a leaf's own standard deviation, added to floating-point rows
IGNORED_FRACTION = 1 / 3
MIN_ROWS_TO_IGNORE = 3  # of two samples none can be ignored: a part of one would have nothing left

MIN_SEQUENCE_LENGTH = (
    16  # positions from which on a row of integers is a sequence, whose values may change places: not columns
)
ROWS_PER_REPLACEMENT = 4  # one row in so many gives way to another class's in the other mix

Freedom = Callable[[str], str]  # from a leaf's path to ANY, MOVED or KEPT

# From the hardest on: a loss may not take what another does.
SORTED, RAGGED, IGNORING = "sorted classes", "unequal lengths", "ignored targets"
HARDNESSES = ((SORTED, RAGGED, IGNORING), (RAGGED, IGNORING), (SORTED, RAGGED), (RAGGED,), ())
MIXED, WIDE = "another mix of the samples", "outputs that lie wide apart"


@dataclass(frozen=True, eq=False)
class TestBatch:
    """A batch to test on.

    Attributes:
        batch: The whole of it.
        sizes: The uneven parts that it is cut into where it has to be found out what is wrong.
        made_up: Rows that the sample didn't have.
        hardness: What was made hard about it, besides noise; None for the sample's own rows.
        ignored: Paths of the leaves of which a part is ignored.
        names: `shared` and `per_sample`, as `split` takes them.
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

    @property
    def pair(self) -> tuple[int, int]:
        """The same parts as two: enough to see whether something is wrong."""
        return sum(self.sizes[:-1]), self.sizes[-1]

    def pieces(self, sizes: Sequence[int] | None = None) -> list[Batch]:
        """Return the parts, or others."""
        return cutting.split(self.batch, sizes or self.sizes, **self.names)


def uneven(rows: int, least: int = 1) -> tuple[int, ...]:
    """Return parts of unequal sizes, since equal ones hide errors.

    Three of at least 2 (batch statistics need two), or two.

    Args:
        rows: Samples in all.
        least: Samples that a part needs at least; in two parts of four, both have two then.
    """
    if rows < MIN_ROWS:
        last = 2 if rows > 4 else min(least, rows // 2)
        return rows - last, last
    last, middle = max(2, rows // 5), max(2, rows // 3)
    return rows - middle - last, middle, last


def any_value(path: str) -> str:
    """Return the freedom where every reader of a leaf checks values."""
    return ANY


def plain(workload: Workload, most: int = MAX_ROWS, least: int = 1) -> TestBatch:
    """Return the sample's rows: those that fit, at least eight.

    Where it has fewer, they are repeated.

    Args:
        workload: What is trained.
        most: Samples that fit at once.
        least: Samples that a part needs at least.
    """
    names = {"shared": workload.shared, "per_sample": workload.per_sample}
    own = cutting.batch_size(workload.sample, **names)
    rows = min(max(own, MIN_ROWS), MAX_ROWS, max(most, MIN_ROWS))
    taken = _spread(workload.sample, own, rows) if own > rows else [row % own for row in range(rows)]
    batch = cutting.select(workload.sample, taken, **names)
    return TestBatch(batch, uneven(rows, least), max(0, rows - own), names=names)


def _spread(batch: Batch, own: int, rows: int) -> list[int]:
    """Select rows of as many classes as there are.

    A sorted batch begins with one of them only.
    """
    targets = target_paths(batch)
    order = torch.argsort(_key_of(batch, targets), stable=True).tolist() if targets else list(range(own))
    return sorted(order[(2 * number + 1) * own // (2 * rows)] for number in range(rows))


def easy(plain: TestBatch, freedom: Freedom = any_value) -> TestBatch:
    """Return the batch with varied rows where they were repeated."""
    if not plain.made_up:
        return plain
    generator = torch.Generator().manual_seed(1)
    batch = _vary(plain.batch, plain.rows - plain.made_up, generator, plain.names, freedom)
    return replace(plain, batch=batch)


def other_mix(trial: TestBatch, keys: torch.Tensor | None) -> TestBatch:
    """Reorder the rows, with other counts of each class.

    Some stand in for those of the first.

    Args:
        trial: A batch.
        keys: What to order the rows by, of shape (rows,); None for any order.
    """
    rows = trial.rows
    targets = target_paths(trial.batch)
    of_class = torch.arange(rows) if not targets else torch.argsort(_key_of(trial.batch, targets), stable=True)
    few = rows // ROWS_PER_REPLACEMENT
    instead = dict(zip(of_class[:few].tolist(), of_class[-few:].tolist(), strict=True)) if few else {}
    used = [instead.get(row, row) for row in range(rows)]
    if keys is None or len(keys) != rows:
        keys = torch.rand(rows, generator=torch.Generator().manual_seed(3))
    by = keys.detach().float().cpu()
    mixed = taken(trial, sorted(used, key=by.tolist().__getitem__))
    if mixed.rows < MIN_ROWS:
        return mixed
    last = mixed.rows // 3  # its outputs are the largest: many enough for a mean of theirs to be another one
    middle = max(2, (mixed.rows - last) // 3)
    return replace(mixed, sizes=(mixed.rows - last - middle, middle, last))


def groups(trial: TestBatch, most: int, least: int = 1) -> list[TestBatch]:
    """Group the batch into parts that fit, interleaving rows.

    So neighbours are in different parts.
    """
    number = -(-trial.rows // most)
    return [taken(trial, range(trial.rows)[first::number], least) for first in range(number)]


def taken(trial: TestBatch, rows: Sequence[int], least: int = 1) -> TestBatch:
    """Select some of a batch's rows."""
    batch = cutting.select(trial.batch, rows, **trial.names)
    return replace(trial, batch=batch, sizes=uneven(len(rows), least))


def all_alike(batch: Batch, names: dict[str, Collection[str]]) -> bool:
    """Whether all rows are equal: then any loss looks exact."""
    leaves = [leaf for path, leaf in tree.leaves(batch) if has_rows(leaf, path, names)]
    return all(bool((leaf == leaf[:1]).all()) for leaf in leaves)


def harder(
    easy: TestBatch, hardness: tuple[str, ...], ignorable: dict[str, int], freedom: Freedom = any_value, seed: int = 2
) -> TestBatch:
    """Make a batch harder.

    Args:
        easy: The easy one.
        hardness: What to make hard about it, out of `HARDNESSES`.
        ignorable: Paths of leaves with classes, and the class of each that its loss leaves out.
        freedom: What may be done with a leaf's values.
        seed: Of what is drawn for that.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = _noisy(easy.batch, generator, easy.names, freedom)
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
        free = {path: out for path, out in ignorable.items() if freedom(path) == ANY}
        if not ignorable:
            free = {path: IGNORED for path in target_paths(batch) if freedom(path) == ANY}
        batch, ignored = _ignoring(batch, easy, lengths, free, generator)
        done += [IGNORING] * bool(ignored)
    return replace(easy, batch=batch, hardness=tuple(done), ignored=ignored)


def _vary(
    batch: Batch, own: int, generator: torch.Generator, names: dict[str, Collection[str]], freedom: Freedom
) -> Batch:
    """Make repeated rows, from `own` on, differ from the originals."""

    def vary(path: str, leaf: Any) -> Any:
        if not has_rows(leaf, path, names) or freedom(path) == KEPT or is_mask(path, leaf):
            return leaf
        changed = leaf.clone()
        if is_binary(leaf):
            return leaf[torch.randperm(len(leaf), generator=generator).to(leaf.device)]
        if leaf.is_floating_point() and freedom(path) == ANY:
            changed[own:] = _with_noise(leaf, generator)[own:]
        else:
            changed[own:] = _exchanged(leaf, own, generator, any_place=freedom(path) == ANY)[own:]
        return changed

    return tree.map_leaves(batch, vary)


def _exchanged(leaf: torch.Tensor, own: int, generator: torch.Generator, *, any_place: bool) -> torch.Tensor:
    """Exchange the leaf's values between rows, else within a row."""
    if own > 1:
        picked = torch.randint(own, leaf.shape, generator=generator).to(leaf.device)
        other = leaf[:own].gather(0, picked)
    elif any_place:
        picked = torch.randint(leaf.numel(), leaf.shape, generator=generator).to(leaf.device)
        other = leaf.reshape(-1)[picked]
    elif leaf.dim() > 1 and leaf.shape[1] >= MIN_SEQUENCE_LENGTH:
        orders = [torch.randperm(leaf.shape[1], generator=generator) for _ in range(len(leaf))]
        other = torch.stack([row[order.to(leaf.device)] for row, order in zip(leaf, orders, strict=True)])
    else:
        return leaf
    return torch.where((leaf == IGNORED) | (other == IGNORED), leaf, other)


def _noisy(batch: Batch, generator: torch.Generator, names: dict[str, Collection[str]], freedom: Freedom) -> Batch:
    """Add noise to continuous leaves; make equal weights unequal."""
    weights = set(weight_paths(batch))

    def noisy(path: str, leaf: Any) -> Any:
        if not has_rows(leaf, path, names) or not leaf.is_floating_point() or is_mask(path, leaf):
            return leaf
        if freedom(path) != ANY:
            return leaf
        if path in weights and bool((leaf == leaf[0]).all()):
            factors = torch.linspace(0.2, 1.0, len(leaf), dtype=leaf.dtype)
            return leaf * factors.to(leaf.device)
        constant = bool((leaf == leaf.reshape(-1)[0]).all())
        return leaf if is_binary(leaf) and not constant else _with_noise(leaf, generator)

    return tree.map_leaves(batch, noisy)


def _with_noise(leaf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add noise to a leaf, inside its range.

    A picture stays between 0 and 1, and so do ones alone.
    """
    low, high, spread = leaf.min(), leaf.max(), leaf.std()
    noise = torch.randn(leaf.shape, generator=generator).to(leaf)
    if not bool(spread > 0):
        return noise.sigmoid() if is_binary(leaf) else leaf + noise
    return (leaf + NOISE_RATIO * spread * noise).clamp(low, high)


def _sorted(batch: Batch, targets: Sequence[str], names: dict[str, Collection[str]]) -> Batch:
    """Sort rows by their targets, so the parts have different classes."""
    return cutting.select(batch, torch.argsort(_key_of(batch, targets), stable=True).tolist(), **names)


def _key_of(batch: Batch, targets: Sequence[str]) -> torch.Tensor:
    """Return a number for each row, by its targets."""
    key: torch.Tensor = leaf_of(batch, targets[0])
    return key.reshape(len(key), -1).double().mean(1).cpu()


def _lengths(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return each row's length as a fraction of the longest.

    From 1 down to a quarter: longest first, as the Runner sorts.
    """
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
    batch: Batch, easy: TestBatch, lengths: torch.Tensor, chosen: dict[str, int], generator: torch.Generator
) -> tuple[Batch, tuple[str, ...]]:
    """Ignore a third of the targets, more in the first part.

    But never all of a part.
    """
    done = []

    def ignoring(path: str, leaf: Any) -> Any:
        if path not in chosen or not is_integer(leaf) or is_mask(path, leaf):
            return leaf
        changed = leaf.clone()
        if leaf.dim() == 1:
            number = min(max(1, round(IGNORED_FRACTION * len(leaf))), easy.sizes[0] - 1)
            changed[1 : 1 + number] = chosen[path]
            done.extend([path] * (number > 0))
            return changed
        done.append(path)
        drawn = torch.rand(leaf.shape, generator=generator) < IGNORED_FRACTION

        ignored = drawn.to(leaf.device) | (_behind(leaf, lengths) if leaf.dim() == 2 and leaf.shape[1] > 2 else False)
        if leaf.shape[1] > 1:
            ignored[:, 1] = False
        changed[ignored] = chosen[path]
        return changed

    return tree.map_leaves(batch, ignoring), tuple(done)
