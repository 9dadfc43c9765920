"""Detect whether a loss's values for some samples depend on others.

Though the gradient doesn't show it.

A margin taken from the batch's mean changes no gradient while every sample is on one side of it. What is computed for
the samples on the way shows it all the same: the first part's rows are others in the whole batch than by themselves.
That alone is no fault (a maximum that is taken off before an exponential cancels out), but a reason to look harder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..torch_compat import TorchDispatchMode

DOUBLE_TOLERANCE = {torch.float64: 1e-9}  # relative to the sum of what is compared
SINGLE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class _Step:
    """What one operator gave for the first rows.

    Attributes:
        name: The operator's.
        per_row: How many of the result's rows belong to a sample.
        sums: The sum, and that of absolute values.
        tolerance: How far sums may differ for rounding, relative to the latter.
    """

    name: str
    per_row: int
    sums: torch.Tensor
    tolerance: float


class RowTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what operators give for the first rows of a batch.

    Args:
        rows: Samples in the batch.
        first: How many of them are looked at.
    """

    def __init__(self, rows: int, first: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.first = rows, first
        self.steps: list[_Step | None] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append(self._seen(func, out))
        return out

    def _seen(self, func: Any, out: Any) -> _Step | None:
        if not isinstance(out, torch.Tensor) or not out.is_floating_point() or out.layout is not torch.strided:
            return None
        if not out.dim() or not out.numel() or len(out) % self.rows:
            return None
        per_row = len(out) // self.rows
        head = out.detach()[: self.first * per_row]
        sums = torch.stack([head.sum(dtype=torch.float64), head.abs().sum(dtype=torch.float64)])
        return _Step(func.overloadpacket.__name__, per_row, sums, DOUBLE_TOLERANCE.get(out.dtype, SINGLE_TOLERANCE))


def rows_differ(whole: RowTrace | None, part: RowTrace | None) -> bool:
    """Whether the first rows differ in the whole batch.

    From those in a part alone.
    """
    if whole is None or part is None or len(whole.steps) != len(part.steps):
        return False
    pairs = (
        (one, two) for one, two in zip(whole.steps, part.steps, strict=True) if one is not None and two is not None
    )
    alike = [(one, two) for one, two in pairs if one.name == two.name and one.per_row == two.per_row]
    return any(bool(((one.sums - two.sums).abs() > one.tolerance * one.sums[1]).any()) for one, two in alike)
