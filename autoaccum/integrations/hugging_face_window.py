"""Keep a Trainer's window on the host, and cut it there.

The data loader collates the whole window, as a plain Trainer's would at that batch size, so that what a collator draws
or pads is the same. The batch stays on the host: only its micro-batches come to the device, one at a time. Where it
has no row for each sample (packed sequences, pairs in halves), its samples are collated anew for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..data import split as cutting
from ..data.window import Window
from ..errors import BatchError, UsageError
from ..runner.sizing import Sizing
from ..workload import IGNORED

Batch = dict[str, Any]
Collate = Callable[[list[Any]], Any]

_MASK, _IDS, _LABELS, _DECODER = "attention_mask", "input_ids", "labels", "decoder_"
_ALIGNMENT = 8  # columns that padding was rounded up to, which kernels like


class HostWindow(dict[str, Any]):
    """The collated batch of one optimizer step, on the host.

    Args:
        batch: The whole batch.
        samples: Its samples.
        rows: The samples as the dataset gave them, where the batch can't be cut; None where it can.
        collate: Collates some of them.
        trims: Whether columns that are padding in a whole micro-batch are cut off.

    Raises:
        UsageError: It was made without its samples, by a Trainer that takes it for a batch.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        samples: int | None = None,
        rows: Sequence[Any] | None = None,
        collate: Collate | None = None,
        *,
        trims: bool = True,
    ) -> None:
        if samples is None:  # Trainer._prepare_input makes another of its type: a batch for the device
            raise UsageError(
                "A training_step of your own was given a whole window as one batch.",
                "It takes the place of the one that cuts a window into micro-batches.",
                "Write ExactTrainerMixin before the class that has it, which then gets each micro-batch: "
                "class Mine(ExactTrainerMixin, YourTrainer).",
            )
        super().__init__(batch)
        self.samples, self.rows, self.collate, self.trims = samples, rows, collate, trims

    def to(self, *_: Any, **__: Any) -> HostWindow:
        """Stay on the host, where accelerate would move it."""
        return self

    def cut(self, sizes: Sequence[int]) -> Window:
        """Cut the window into micro-batches of these sizes.

        Where samples are padded, longer ones come first, so that each micro-batch is padded little.
        """
        if len(sizes) == 1:
            return CutWindow((dict(self),), tuple(sizes), of=self)
        if self.rows is not None:
            assert self.collate is not None
            ends = torch.tensor(sizes).cumsum(0).tolist()
            parts = [self.rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]
            return CutWindow(tuple(collated(self.collate, part) for part in parts), tuple(sizes), of=self)
        whole: Batch = dict(self)
        lengths = _lengths(whole) if self.trims else None
        if lengths is not None and len(set(lengths)) > 1:
            order = sorted(range(self.samples), key=lambda row: -lengths[row])
            whole = cutting.select(whole, order)
        pieces = cutting.split(whole, sizes)
        return CutWindow(tuple(trimmed(piece) if self.trims else piece for piece in pieces), tuple(sizes), of=self)


class CutWindow(Window):
    """A window that remembers what it was cut from."""

    def __init__(self, pieces: tuple[Any, ...], sizes: tuple[int, ...], *, of: HostWindow) -> None:
        super().__init__(pieces, sizes)
        object.__setattr__(self, "of", of)


class HostSizing(Sizing):
    """Sizes of micro-batches; cuts windows again from the host's batch."""

    def _cut_again(self, window: Window) -> Window:
        assert isinstance(window, CutWindow)
        host: HostWindow = vars(window)["of"]
        return host.cut(self.sizes(host.samples))


class WindowCollator:
    """Collate the samples of a window, and keep it on the host.

    Args:
        collate: The Trainer's own.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate
        self.trims = True

    def __call__(self, rows: list[Any]) -> HostWindow:
        """Collate a window; keep samples where it can't be cut."""
        kept = [_copied(row) for row in rows]
        batch = collated(self.collate, rows)
        if can_be_cut(batch, len(kept)):
            return HostWindow(batch, len(kept), trims=self.trims)
        return HostWindow(batch, len(kept), kept, self.collate, trims=False)


def collated(collate: Collate, rows: Sequence[Any]) -> Batch:
    """Collate copies of samples: some collators change what they are given.

    Raises:
        UsageError: The collator returns something else than a mapping.
    """
    batch = collate([_copied(row) for row in rows])
    if not isinstance(batch, Mapping):
        raise UsageError(
            f"The data collator returned a {type(batch).__name__}, not a mapping.",
            "A Trainer gives its model the batch as keywords.",
            "Return a dict of tensors: {'input_ids': ..., 'labels': ...}.",
        )
    return dict(batch)


def can_be_cut(batch: Batch, samples: int) -> bool:
    """Return whether a batch has one row for each of its samples."""
    try:
        return cutting.batch_size(batch) == samples
    except BatchError:
        return False


def trimmed(batch: Batch) -> Batch:
    """Cut off the columns that are padding in all rows.

    Only on the right, where positions don't move; and of labels only what is ignored.

    Args:
        batch: Tensors of shape (samples, length, ...), with masks whose names end in `attention_mask`.
    """
    found = dict(batch)
    for name, mask in batch.items():
        if name.endswith(_MASK) and not name.endswith(_DECODER + _MASK) and _is_mask(mask):
            _trim_source(found, name[: -len(_MASK)], mask)
    if _is_targets(found.get(_LABELS)):
        _trim_targets(found)
    return found


def _trim_source(batch: Batch, prefix: str, mask: torch.Tensor) -> None:
    longest = mask.shape[1]
    named = {name: leaf for name, leaf in batch.items() if name.startswith(prefix) and isinstance(leaf, torch.Tensor)}
    has_decoder = any(name.startswith(prefix + _DECODER) for name in named)
    members = [
        name
        for name, leaf in named.items()
        if leaf.dim() >= 2 and leaf.shape[1] == longest and not name.startswith(prefix + _DECODER)
        and not (has_decoder and name == prefix + _LABELS)
    ]  # fmt: skip
    if prefix + _IDS not in members or any(longest in leaf.shape[2:] for leaf in named.values()):
        return  # padded sound changes its neighbours; a mask of pairs has the length twice
    width = _used(mask != 0)
    if prefix + _LABELS in members:
        width = max(width, _used(batch[prefix + _LABELS] != IGNORED))
    _cut_off(batch, members, _aligned(width, longest))


def _trim_targets(batch: Batch) -> None:
    labels = batch[_LABELS]
    longest = labels.shape[1]
    members = [
        name
        for name, leaf in batch.items()
        if name.startswith(_DECODER) and isinstance(leaf, torch.Tensor) and leaf.dim() >= 2
    ]
    if (_IDS in batch and batch[_IDS].shape[1] == longest) or any(batch[n].shape[1] != longest for n in members):
        return
    width = _used(labels != IGNORED)
    if _is_mask(batch.get(_DECODER + _MASK)):
        width = max(width, _used(batch[_DECODER + _MASK] != 0))
    _cut_off(batch, (_LABELS, *members), _aligned(width, longest))


def _cut_off(batch: Batch, names: Sequence[str], width: int) -> None:
    for name in names:
        if batch[name].shape[1] > width:
            batch[name] = batch[name][:, :width].contiguous()  # models view their labels


def _used(used: torch.Tensor) -> int:
    """Return the columns up to the last one that any row uses."""
    columns = used.any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1


def _aligned(width: int, longest: int) -> int:
    return min(longest, -(-width // _ALIGNMENT) * _ALIGNMENT) if longest % _ALIGNMENT == 0 else width


def _lengths(batch: Batch) -> list[int] | None:
    """Return the tokens of each row; None without a mask."""
    masks = [leaf for name, leaf in batch.items() if name.endswith(_MASK) and _is_mask(leaf)]
    if not masks:
        return None
    total: list[int] = sum((mask != 0).sum(1) for mask in masks).tolist()
    return total


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() == 2 and not leaf.is_floating_point()


def _is_targets(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() == 2 and leaf.dtype == torch.int64


def _copied(row: Any) -> Any:
    return dict(row) if isinstance(row, Mapping) else row
