"""Count what micro-batches weigh in a loop whose loss is the user's.

The loop computes a mean per micro-batch, and only its author knows of what. A plan that was made with the same loss
knows too (`EvidenceSection.loss_average`); `count=` says it; and where neither does, samples are counted, and labels
that look ignored are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import tree
from ..data.window import Window
from ..errors import BatchError, UsageError
from ..plan import Plan
from ..window.hugging_face import Denominator
from ..window.loss_form import AVERAGES, LossKind
from ..workload import IGNORED, Batch, class_count, is_pair

SAMPLES = "samples"

Count = Callable[[Batch], Any]

_SHIFTED_HINT = (
    "Give what your loss averages over: count=lambda batch: (batch['labels'] != -100).sum(), with [:, 1:] after "
    "['labels'] for a causal language model; or count='samples' where nothing is ignored."
)


@dataclass(frozen=True)
class Counter:
    """Counts a micro-batch in what the loss averages over.

    Attributes:
        count: The count of a batch; None to count samples.
        chosen: Whether the user or the plan says so; otherwise labels that look ignored are refused.
    """

    count: Count | None
    chosen: bool

    def counts(self, window: Window) -> tuple[float, ...]:
        """Return the count of each micro-batch of a window.

        Raises:
            UsageError: Samples are counted, and micro-batches ignore different parts of their labels.
        """
        if self.count is None:
            if not self.chosen:
                _refuse_ignored(window)
            return tuple(map(float, window.sizes))
        return tuple(_number(self.count(piece)) for piece in window.pieces)


def counter_for(plan: Plan, count: Count | str | None) -> Counter:
    """Return how a loop's micro-batches are counted.

    Args:
        plan: The plan, made with the same loss.
        count: `count(batch)`, what the loss averages over; "samples"; None for what the plan's loss averages over.

    Raises:
        UsageError: The plan's loss averages over something that only its own function knows.
    """
    if callable(count):
        return Counter(count, chosen=True)
    if count is not None and count != SAMPLES:
        raise UsageError(
            f"count is {count!r}.", hint="Give a function of a batch, count=lambda batch: ..., or 'samples'."
        )
    if count == SAMPLES:
        return Counter(None, chosen=True)
    average = plan.evidence.loss_average
    if average == AVERAGES[LossKind.REPRESENTATIONS]:
        raise UsageError(
            "The plan's loss compares the samples of the whole window (encode=).",
            "No weights of micro-batches give its gradient; a loop over micro-batches can't compute it.",
            "Train with autoaccum.Runner(workload, plan).",
        )
    if average in (AVERAGES[LossKind.SUM], AVERAGES[LossKind.COUNTED]):
        raise UsageError(
            f"The plan's loss averages over what its own function counts ({average}).",
            "The count of a window is needed before its first backward, and the loop's loss comes after.",
            "Give the same function here: autoaccum.windows(loader, plan, count=lambda batch: ...).",
        )
    if average in ("labels", "shifted labels"):
        denominator = Denominator(shifted=average.startswith("shifted"), passed=False)
        return Counter(denominator.count, chosen=True)
    return Counter(_classes, chosen=True) if average == "classes" else Counter(None, chosen=False)


def _classes(batch: Batch) -> torch.Tensor:
    if not is_pair(batch):
        raise BatchError(
            f"The batch is a {type(batch).__name__}, and the plan's was an (input, class) pair.",
            "The plan's loss averages over the classes that aren't ignored, which are counted in the pair.",
            "Give count=lambda batch: ...",
        )
    return class_count(batch)


def _number(count: Any) -> float:
    value = float(count)
    if not 0 <= value < float("inf"):
        raise UsageError(
            f"count= gave {value}.",
            "A micro-batch's weight is its count divided by the window's, so each is 0 or more.",
            "Return a number of tokens, boxes or samples, or a sum of weights.",
        )
    return value


def _refuse_ignored(window: Window) -> None:
    kept = [_kept_share(piece) for piece in window.pieces]
    if len(set(kept)) < 2:
        return
    shown = " and ".join(f"{share:.0%}" for share in (max(kept), min(kept)))
    raise UsageError(
        f"The window's micro-batches have labels of {IGNORED}, in different parts: {shown} are others.",
        "Micro-batches would be weighted by their samples; a mean that leaves out ignored labels needs their number.",
        _SHIFTED_HINT,
    )


def _kept_share(piece: Batch) -> float:
    """Return which part of a micro-batch's integers isn't -100."""
    leaves: Sequence[torch.Tensor] = [
        leaf for _, leaf in tree.leaves(piece) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int64
    ]
    ignored = sum(int((leaf == IGNORED).sum()) for leaf in leaves)
    return 1 - ignored / max(1, sum(leaf.numel() for leaf in leaves)) if ignored else 1.0
