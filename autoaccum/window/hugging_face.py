"""Find the denominator of a Hugging Face model's own loss.

By forward passes, not by guessing from its class.

Their losses are means over the labels that aren't ignored, some of them after a shift by one; some models take the
window's count as `num_items_in_batch`, others take any keyword and leave it unused. Each of these guesses has been a
bug in some trainer (transformers#34191, #46204, #46903; trl#2175). So the model is asked, once, on the first
micro-batch: what is the loss, and what is it with a given count of 1 and of 2?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..workload import IGNORED, Batch

_AGREES_WITHIN = 1e-3  # of the loss: both are computed from the same logits, in fp32 or in half precision
_COUNTS_WITHIN = 0.45  # a count is an integer


@dataclass(frozen=True)
class Denominator:
    """How to get a model's loss over a whole window.

    Attributes:
        shifted: The first label of each sequence is nobody's target.
        passed: The model divides by `num_items_in_batch` where it is given one.
    """

    shifted: bool
    passed: bool

    def count(self, batch: Batch) -> torch.Tensor:
        """Labels that the model's loss averages over."""
        labels = batch["labels"]
        counted: torch.Tensor = ((labels[..., 1:] if self.shifted else labels) != IGNORED).sum()
        return counted


def has_labels(batch: Batch) -> bool:
    """Whether a batch has labels of which some may be ignored."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, torch.Tensor) and labels.dim() > 0 and not labels.is_floating_point()


def can_tell(batch: Batch) -> bool:
    """Whether a batch has labels that count, which finding needs."""
    return all(count for _, count in _candidates(batch))


def _candidates(batch: Batch) -> list[tuple[bool, int]]:
    """Each way to count, shifted or not, and its count."""
    labels = batch["labels"]
    ways = (False, True) if labels.dim() > 1 and labels.shape[-1] > 1 else (False,)
    return [(shifted, int(Denominator(shifted, passed=False).count(batch))) for shifted in ways]


def find_denominator(ask: Callable[[dict[str, Any]], Any], batch: Batch) -> Denominator | None:
    """Asks a model what its loss averages over.

    Args:
        ask: `ask(more)`, the model's output for this batch and these keywords more, without gradients and each time
            from the same random state.
        batch: A micro-batch that `can_tell`.

    Returns:
        The answer; None where the loss is something else.
    """
    candidates = _candidates(batch)
    out = ask({})
    mean = _loss_of(out)
    by_one, by_two = (_loss_of(_asked(ask, {"num_items_in_batch": torch.tensor(items)})) for items in (1, 2))
    if mean is None:
        return None
    if by_one is not None and by_two is not None and by_one != by_two:
        total, added = 2 * (by_one - by_two), 2 * by_two - by_one  # by_n = total / n + added
        counted = total / (mean - added) if mean != added else 0.0
        near = min(candidates, key=lambda pair: abs(pair[1] - counted))
        return Denominator(near[0], passed=True) if abs(near[1] - counted) < _COUNTS_WITHIN else None
    return _by_logits(out, batch["labels"], mean, [shifted for shifted, _ in candidates])


def _by_logits(out: Any, labels: torch.Tensor, mean: float, shifts: list[bool]) -> Denominator | None:
    """Which cross-entropy of its logits a model's loss is; None for neither."""
    logits = _field(out, "logits")
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != labels.shape:
        return None
    labels = labels.to(logits.device)
    errors = []
    for shifted in shifts:
        scores, targets = (logits[..., :-1, :], labels[..., 1:]) if shifted else (logits, labels)
        own = float(F.cross_entropy(scores.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED))
        errors.append((abs(own - mean), shifted))
    error, shifted = min(errors)
    return Denominator(shifted, passed=False) if error <= _AGREES_WITHIN * abs(mean) else None


def _asked(ask: Callable[[dict[str, Any]], Any], more: dict[str, Any]) -> Any:
    try:
        return ask(more)
    except TypeError:  # a forward that takes no such keyword
        return None


def _loss_of(out: Any) -> float | None:
    loss = _field(out, "loss")
    return float(loss) if isinstance(loss, torch.Tensor) else None


def _field(out: Any, name: str) -> Any:
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
