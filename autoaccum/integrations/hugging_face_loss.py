"""Find what a Trainer's loss averages over, by asking it.

The loss of a window is the mean of its micro-batches' losses, each computed as the Trainer computes a batch of that
size, weighted by what each counts. What counts is asked, not guessed from the model's class: two parts and their union
must agree, `loss(a + b) * count(a + b) = loss(a) * count(a) + loss(b) * count(b)`, for samples, for labels that aren't
ignored, shifted by one or not, or for tokens; or without a count, where it is a sum (CTC's in speech models). Where
the loss divides by the count that it is given, it is given the window's, as in the Trainer's own accumulation. A loss
for which no count does (contrastive losses, which compare a sample with all others of its batch) isn't a mean, and its
window must not be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..data import split as cutting
from ..state.rng import put_rng, take_rng
from ..workload import IGNORED
from .hugging_face_window import Batch, trimmed

_AGREES_WITHIN = 1e-3  # of the loss; in half precision the larger one
_AGREES_WITHIN_HALF = 2e-2
_ROUNDING = 1e-2  # of that
_PART_ROWS = 2
_NOT_ASKED = (
    "The loss could not be computed on a few samples, so that what it averages over isn't known. Micro-batches are "
    "weighted by their samples."
)
_ADDED = (
    "The model adds a term to its loss that isn't divided by the labels, as a mixture of experts does. It becomes the "
    "mean of the micro-batches' terms, weighted by their labels, which isn't the whole batch's term."
)

LossOf = Callable[[Batch, Any], float]  # of a batch and of what is passed as num_items_in_batch
CountOf = Callable[[Batch], Any]
NOTHING = "nothing that micro-batches could be weighted by"


@dataclass(frozen=True)
class Average:
    """What a loss averages over.

    Attributes:
        words: What is counted.
        count: What a micro-batch counts, on the host; None for its samples.
        passes: Whether the loss is a sum over `num_items_in_batch`, with nothing added: given the window's count, the
            micro-batches' losses need no weights.
        adds_up: Whether the loss is a sum over the batch, so that micro-batches' losses need no weights.
        can_be_cut: False where no count makes a window's loss the mean of its micro-batches'.
        trims: Whether cutting off padding leaves the loss as it is.
        error: Relative error of the identity.
        remark: What a person should know; empty for nothing.
    """

    words: str
    count: CountOf | None = None
    passes: bool = False
    adds_up: bool = False
    can_be_cut: bool = True
    trims: bool = True
    error: float = 0.0
    remark: str = ""


def find_average(loss_of: LossOf, num_items: CountOf, batches: Iterable[Sequence[Batch]], *, half: bool) -> Average:
    """Ask a loss what it averages over.

    Args:
        loss_of: The Trainer's loss of a batch and a count; without dropout and gradients.
        num_items: The Trainer's own count of a batch; None where it counts nothing.
        batches: Batches to ask with, the hardest first: each a whole and its two parts, on the host.
        half: Whether it is computed in half precision.
    """
    within = _AGREES_WITHIN_HALF if half else _AGREES_WITHIN
    for whole, *parts in batches:
        try:
            losses = [loss_of(batch, num_items(batch)) for batch in (whole, *parts)]
        except (RuntimeError, ValueError, LookupError, TypeError):
            continue  # a loss that takes no ignored labels: asked again without
        if not all(map(_is_finite, losses)):
            continue
        found = _of_passed_count(loss_of, num_items, [whole, *parts], losses, within)
        found = found or _sum(losses, within) or _best(_ways(whole, num_items), [whole, *parts], losses, within)
        if found.error > within:
            return Average(NOTHING, can_be_cut=False, error=found.error)
        return replace(found, trims=_may_trim(loss_of, num_items, parts[-1], losses[-1], within))
    return Average("its samples, as it could not be asked", samples_of, trims=False, remark=_NOT_ASKED)


def hard_batches(sample: Batch) -> Iterator[list[Batch]]:
    """Yield batches of which two parts count differently, and a plain one.

    Args:
        sample: A batch of at least one row.
    """
    rows = max(cutting.batch_size(sample), _PART_ROWS + 3)
    batch = cutting.tile(sample, rows)
    hard, changed = dict(batch), False
    for name, leaf in batch.items():
        if "label" in name and _is_classes(leaf):
            hard[name], changed = leaf.clone(), True
            if leaf.dim() == 1:
                hard[name][1] = IGNORED
            else:  # most of the first part, its first position too; none of the second part's
                hard[name][: rows - _PART_ROWS, 0] = IGNORED
                hard[name][0, : (3 * leaf.shape[1]) // 4] = IGNORED
    for each in (hard, batch) if changed else (batch,):
        yield [each, *cutting.split(each, (rows - _PART_ROWS, _PART_ROWS))]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Switch dropout and gradients off; yield what puts random states back."""
    rng, training = take_rng(), [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield lambda: put_rng(rng)
    finally:
        for module in training:
            module.training = True
        put_rng(rng)


def _of_passed_count(
    loss_of: LossOf, num_items: CountOf, batches: Sequence[Batch], losses: Sequence[float], within: float
) -> Average | None:
    """Return the Trainer's own count if the loss divides by it.

    With n, a loss is total / n + added, where a mixture of experts adds a term of its own.
    """
    counts = [num_items(batch) for batch in batches]
    if any(count is None for count in counts):
        return None
    halves = [loss_of(batch, 2 * count) for batch, count in zip(batches, counts, strict=True)]
    if any(abs(loss - half) <= within * abs(loss) for loss, half in zip(losses, halves, strict=True)):
        return None
    totals = [2 * (loss - half) * int(n) for loss, half, n in zip(losses, halves, counts, strict=True)]
    passes = all(abs(2 * half - loss) <= within * abs(loss) for loss, half in zip(losses, halves, strict=True))
    error = abs(totals[0] - sum(totals[1:])) / max(abs(totals[0]), 1e-30)
    remark = "" if passes else _ADDED
    return Average("the labels that num_items_in_batch counts", num_items, passes, error=error, remark=remark)


def _sum(losses: Sequence[float], within: float) -> Average | None:
    """Return the average of a loss that is a sum."""
    error = abs(losses[0] - sum(losses[1:])) / max(abs(losses[0]), 1e-30)
    return Average("nothing: it is a sum over the batch", adds_up=True, error=error) if error <= within else None


def _may_trim(loss_of: LossOf, num_items: CountOf, part: Batch, loss: float, within: float) -> bool:
    """Whether the padding of a part can be cut off."""
    cut = trimmed(part)
    if all(cut[name] is part[name] for name in part):
        return True
    return abs(loss_of(cut, num_items(part)) - loss) <= within * abs(loss)


def _best(ways: Mapping[str, CountOf], batches: Sequence[Batch], losses: Sequence[float], within: float) -> Average:
    """Return the first way of counting that fits the losses.

    Where all samples have the same loss, as in preference optimization at its beginning, all ways fit; what then
    distinguishes them is rounding, and the first one stays.
    """
    best: Average | None = None
    for words, count in ways.items():
        counts = [int(count(batch)) for batch in batches]
        error = _error(counts, losses) if all(counts) else float("inf")
        if best is None or (error < best.error / 2 and best.error > _ROUNDING * within):
            best = Average(words, count, error=error)
    assert best is not None
    return best


def _error(counts: Sequence[int], losses: Sequence[float]) -> float:
    expected = sum(loss * count for loss, count in zip(losses[1:], counts[1:], strict=True)) / counts[0]
    return abs(expected - losses[0]) / max(abs(losses[0]), 1e-30)


def _ways(batch: Batch, num_items: CountOf) -> dict[str, CountOf]:
    """Return the ways to count a batch, the Trainer's own first."""
    ways: dict[str, CountOf] = {}
    if num_items(batch) is not None:
        ways["the labels that num_items_in_batch counts"] = num_items
    ways["its samples"] = samples_of
    for name, leaf in batch.items():
        if "label" in name and _is_classes(leaf):
            ways[f"{name} that aren't ignored"] = partial(_labels, name, 0)
            if leaf.dim() > 1 and leaf.shape[1] > 1:
                ways[f"{name} that aren't ignored, shifted by one"] = partial(_labels, name, 1)
        if name.endswith("attention_mask") and isinstance(leaf, torch.Tensor) and leaf.dim() == 2:
            ways[f"the tokens of {name}"] = partial(_tokens, name)
    return ways


def samples_of(batch: Batch) -> int:
    """Return the samples of a batch.

    These are its rows, or as many as were collated.
    """
    collated_from = getattr(batch, "samples", None)
    return collated_from if isinstance(collated_from, int) else cutting.batch_size(batch)


def _labels(name: str, first: int, batch: Batch) -> torch.Tensor:
    labels: torch.Tensor = batch[name]
    return ((labels[:, first:] if first else labels) != IGNORED).sum()


def _tokens(name: str, batch: Batch) -> torch.Tensor:
    tokens: torch.Tensor = batch[name].sum()
    return tokens


def _is_classes(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() >= 1 and leaf.dtype == torch.int64


def _is_finite(loss: float) -> bool:
    return loss == loss and abs(loss) != float("inf")
