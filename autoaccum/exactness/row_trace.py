"""Detect values within a loss that depend on other samples.

A margin derived from the batch's mean changes no gradient while every sample is on one side of it. Intermediate values
show it nevertheless: the first part's rows differ between the whole batch and the part. That alone isn't an error (a
maximum subtracted before an exponential cancels out), but a reason for further tests.
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
    """Hold one operator's result for the first rows.

    Attributes:
        name: The operator's name.
        per_row: Rows of the result for each sample.
        sums: The sum, and the sum of absolute values.
        tolerance: Difference of sums that rounding may cause, relative to the latter.
    """

    name: str
    per_row: int
    sums: torch.Tensor
    tolerance: float


class RowTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record operators' results for the first rows of a batch.

    Args:
        rows: Samples in the batch.
        first: Number of rows to record.
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
    """Return whether the first rows differ between whole batch and part."""
    if whole is None or part is None or len(whole.steps) != len(part.steps):
        return False
    pairs = (
        (one, two) for one, two in zip(whole.steps, part.steps, strict=True) if one is not None and two is not None
    )
    alike = [(one, two) for one, two in pairs if one.name == two.name and one.per_row == two.per_row]
    return any(bool(((one.sums - two.sums).abs() > one.tolerance * one.sums[1]).any()) for one, two in alike)
