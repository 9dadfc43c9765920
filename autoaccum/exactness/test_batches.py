"""Make batches to test a loss on, plain and hard.

An easy batch hides errors: cross-entropy that ignores -100 looks like a mean while nothing is ignored, and so does a
masked mean without padding. So the hard batch has what real data has: rows that differ, sorted classes, unequal
lengths, ignored targets, unequal weights. One hard batch is not enough: weights computed from the batch's own class
counts cancel out if each part has one class. So the same rows are mixed in another way too.

Rows are moved, repeated and cut. Values that the sample lacks are invented only if `freedom` allows it, since not every
operator checks its indices. This file uses names and shapes, no models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..data import split as cutting
from ..data import tree
from ..data.collated import Collated, materialized
from ..data.groups import Grouped
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
MIN_ROWS_AT_ONCE = 2  # in groups, if no more fit
NOISE_RATIO = 0.5  # of a leaf's own standard deviation, added to floating-point rows
IGNORED_FRACTION = 1 / 3
MIN_ROWS_TO_IGNORE = 3  # of two samples none can be ignored: a part would be empty

MIN_SEQUENCE_LENGTH = 16  # positions of a row of integers that is a sequence, not columns: its values may be permuted
ROWS_PER_REPLACEMENT = 4  # in the other mix, one row of that many is replaced by another class's

Freedom = Callable[[str], str]  # from a leaf's path to ANY, MOVED or KEPT

# The hardest first: a loss may refuse what another accepts.
SORTED, RAGGED, IGNORING = "sorted classes", "unequal lengths", "ignored targets"
HARDNESSES = ((SORTED, RAGGED, IGNORING), (RAGGED, IGNORING), (SORTED, RAGGED), (RAGGED,), ())
MIXED, WIDE = "another mix of the samples", "outputs that lie wide apart"


@dataclass(frozen=True, eq=False)
class TestBatch:
    """Hold a batch to test on.

    Attributes:
        batch: The whole of it.
        sizes: The uneven parts that it is split into to explain an error.
        made_up: Number of rows that the sample didn't have.
        hardness: What was made hard, besides noise; None for the sample's own rows.
        ignored: Paths of the leaves with ignored targets.
        batch_keys: `shared` and `per_sample`, as `split` takes them.
    """

    batch: Batch
    sizes: tuple[int, ...]
    made_up: int
    hardness: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()
    batch_keys: dict[str, Collection[str]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    @property
    def pair(self) -> tuple[int, int]:
        """The same parts as two, enough to detect an error."""
        return sum(self.sizes[:-1]), self.sizes[-1]

    def pieces(self, sizes: Sequence[int] | None = None) -> list[Batch]:
        """Split the batch into its parts, or into others."""
        return cutting.split(self.batch, sizes or self.sizes, **self.batch_keys)


def uneven(rows: int, least: int = 1) -> tuple[int, ...]:
    """Return part sizes that differ, since even ones hide errors.

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
    """Allow every value; for leaves whose readers check them."""
    return ANY


def plain(workload: Workload, most: int = MAX_ROWS, least: int = 1) -> TestBatch:
    """Return the sample's own rows, repeated up to eight.

    Args:
        workload: What is trained.
        most: Samples that fit at once.
        least: Samples that a part needs at least.
    """
    batch_keys = {"shared": workload.shared, "per_sample": workload.per_sample}
    own = cutting.batch_size(workload.sample, **batch_keys)
    rows = min(max(own, MIN_ROWS), MAX_ROWS, max(most, MIN_ROWS))
    taken = _spread(workload.sample, own, rows) if own > rows else [row % own for row in range(rows)]
    batch = cutting.select(workload.sample, taken, **batch_keys)
    return TestBatch(batch, uneven(rows, least), max(0, rows - own), batch_keys=batch_keys)


def _spread(batch: Batch, own: int, rows: int) -> list[int]:
    """Return rows spread over all classes; a sorted batch starts with one."""
    targets = target_paths(batch)
    order = torch.argsort(_key_of(batch, targets), stable=True).tolist() if targets else list(range(own))
    return sorted(order[(2 * number + 1) * own // (2 * rows)] for number in range(rows))


def easy(plain: TestBatch, freedom: Freedom = any_value) -> TestBatch:
    """Vary the rows that were repeated."""
    if not plain.made_up or isinstance(plain.batch, (Collated, Grouped)):
        return plain
    generator = torch.Generator().manual_seed(1)
    batch = _vary(plain.batch, plain.rows - plain.made_up, generator, plain.batch_keys, freedom)
    return replace(plain, batch=batch)


def other_mix(trial: TestBatch, keys: torch.Tensor | None) -> TestBatch:
    """Reorder the rows and change the number of each class.

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
    """Divide the batch into groups that fit at once, rows interleaved."""
    number = -(-trial.rows // most)
    return [taken(trial, range(trial.rows)[first::number], least) for first in range(number)]


def taken(trial: TestBatch, rows: Sequence[int], least: int = 1) -> TestBatch:
    """Return some of a batch's rows."""
    batch = cutting.select(trial.batch, rows, **trial.batch_keys)
    return replace(trial, batch=batch, sizes=uneven(len(rows), least))


def all_alike(batch: Batch, batch_keys: dict[str, Collection[str]]) -> bool:
    """Return whether all rows are equal, so that any loss looks exact."""
    if isinstance(batch, Grouped):
        pieces = [tree.leaves(materialized(p)) for p in cutting.split(batch, [1] * cutting.batch_size(batch))]
        return all(
            torch.equal(leaf, other)
            for piece in pieces[1:]
            for (_, leaf), (_, other) in zip(pieces[0], piece, strict=True)
            if isinstance(leaf, torch.Tensor)
        )
    if isinstance(batch, Collated):
        return len({id(item) for item in batch.items}) == 1
    leaves = [leaf for path, leaf in tree.leaves(batch) if has_rows(leaf, path, batch_keys)]
    return all(bool((leaf == leaf[:1]).all()) for leaf in leaves)


def harder(
    easy: TestBatch, hardness: tuple[str, ...], ignorable: dict[str, int], freedom: Freedom = any_value, seed: int = 2
) -> TestBatch:
    """Make a batch hard.

    Args:
        easy: The easy one.
        hardness: What to make hard about it, out of `HARDNESSES`.
        ignorable: Paths of leaves with classes, and the class of each that its loss leaves out.
        freedom: What may be done with a leaf's values.
        seed: Of what is drawn for that.
    """
    if isinstance(easy.batch, (Collated, Grouped)):  # its samples are what they are
        return replace(easy, hardness=())
    generator = torch.Generator().manual_seed(seed)
    batch = _noisy(easy.batch, generator, easy.batch_keys, freedom)
    done, ignored = [], tuple[str, ...]()
    targets = list(ignorable) or target_paths(batch)
    if SORTED in hardness and targets:
        batch = _sorted(batch, targets, easy.batch_keys)
        done.append(SORTED)
    lengths = _lengths(easy.rows, generator)
    if RAGGED in hardness and (mask_paths(batch) or length_paths(batch)):
        batch = _ragged(batch, lengths, easy.batch_keys)
        done.append(RAGGED)
    if IGNORING in hardness:
        free = {path: out for path, out in ignorable.items() if freedom(path) == ANY}
        if not ignorable:
            free = {path: IGNORED for path in target_paths(batch) if freedom(path) == ANY}
        batch, ignored = _ignoring(batch, easy, lengths, free, generator)
        done += [IGNORING] * bool(ignored)
    return replace(easy, batch=batch, hardness=tuple(done), ignored=ignored)


def _vary(
    batch: Batch, own: int, generator: torch.Generator, batch_keys: dict[str, Collection[str]], freedom: Freedom
) -> Batch:
    """Vary the rows from `own` on, which repeat others."""

    def vary(path: str, leaf: Any) -> Any:
        if not has_rows(leaf, path, batch_keys) or freedom(path) == KEPT or is_mask(path, leaf):
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
    """Return values exchanged between rows, or within a row."""
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


def _noisy(batch: Batch, generator: torch.Generator, batch_keys: dict[str, Collection[str]], freedom: Freedom) -> Batch:
    """Add noise to continuous leaves; make equal weights differ."""
    weights = set(weight_paths(batch))

    def noisy(path: str, leaf: Any) -> Any:
        if not has_rows(leaf, path, batch_keys) or not leaf.is_floating_point() or is_mask(path, leaf):
            return leaf
        if freedom(path) != ANY or leaf.dtype.itemsize < 2:  # nothing is computed in 8 bits
            return leaf
        if path in weights and bool((leaf == leaf[0]).all()):
            factors = torch.linspace(0.2, 1.0, len(leaf), dtype=leaf.dtype)
            return leaf * factors.to(leaf.device)
        constant = bool((leaf == leaf.reshape(-1)[0]).all())
        return leaf if is_binary(leaf) and not constant else _with_noise(leaf, generator)

    return tree.map_leaves(batch, noisy)


def _with_noise(leaf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add noise within the leaf's range: a picture stays in [0, 1]."""
    low, high, spread = leaf.min(), leaf.max(), leaf.std()
    noise = torch.randn(leaf.shape, generator=generator).to(leaf)
    if not bool(spread > 0):
        return noise.sigmoid() if is_binary(leaf) else leaf + noise
    return (leaf + NOISE_RATIO * spread * noise).clamp(low, high)


def _sorted(batch: Batch, targets: Sequence[str], batch_keys: dict[str, Collection[str]]) -> Batch:
    """Sort the rows by target, so that parts have different classes."""
    return cutting.select(batch, torch.argsort(_key_of(batch, targets), stable=True).tolist(), **batch_keys)


def _key_of(batch: Batch, targets: Sequence[str]) -> torch.Tensor:
    """Return a number for each row, by its targets."""
    key: torch.Tensor = leaf_of(batch, targets[0])
    return key.reshape(len(key), -1).double().mean(1).cpu()


def _lengths(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return relative lengths from 1 down to a quarter, longest first."""
    return torch.linspace(1, 0.25, rows) * (1 - 0.1 * torch.rand(rows, generator=generator))


def _ragged(batch: Batch, lengths: torch.Tensor, batch_keys: dict[str, Collection[str]]) -> Batch:
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
    """Mark the positions of (rows, longest, ...) beyond each row's length."""
    longest = leaf.shape[1]
    ends = (lengths * longest).ceil().clamp(min=1)
    behind = torch.arange(longest)[None, :] >= ends[:, None]
    return behind.reshape(*behind.shape, *[1] * (leaf.dim() - 2)).expand(leaf.shape).to(leaf.device)


def _ignoring(
    batch: Batch, easy: TestBatch, lengths: torch.Tensor, chosen: dict[str, int], generator: torch.Generator
) -> tuple[Batch, tuple[str, ...]]:
    """Ignore a third of the targets, never all of a part."""
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
