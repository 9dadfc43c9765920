"""Compare the gradient of a window of parts with the whole's.

Both come from `step.train_window` itself (functional_copy.py), so that what is compared is what the Runner trains: its
weights, its count, its loss. Least squares then tells which weights the parts should have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..workload import Batch
from .determinism import RandomOps
from .functional_copy import FunctionalCopy, MakeParts, Passes
from .row_trace import rows_differ

SMALL_TENSOR_RATIO = (
    1e-3  # part of the whole gradient's norm below which a tensor is too small to be judged by its own norm
)

WORST_TENSOR_FACTOR = 10  # times as far may the worst single tensor be off


@dataclass(frozen=True, eq=False)
class Gradients:
    """A window's gradients, in parts and as a whole.

    Vectors are float64 on the host.

    Attributes:
        whole: The gradient of the whole batch, of shape (entries,).
        window: That of the window of parts, as its optimizer step got it, of shape (entries,).
        columns: What each micro-batch added to it, of shape (parts, entries).
        sizes: Samples in each part.
        places: Name and number of entries of each parameter, in order.
        draws: What was drawn and called on the way.
        is_random: Whether something was drawn.
        is_pair: Whether the loss returns a sum and its count.
        one: The whole batch's pass.
        depends: Whether something in the loss was another for the same samples in the whole batch.
    """

    whole: torch.Tensor
    window: torch.Tensor
    columns: torch.Tensor
    sizes: tuple[int, ...]
    places: tuple[tuple[str, int], ...]
    draws: RandomOps
    is_random: bool
    is_pair: bool
    one: Passes
    depends: bool = False

    @property
    def finite(self) -> bool:
        """Whether there is a gradient to compare with: finite, and not zero."""
        return bool(self.whole.isfinite().all() and self.whole.norm() > 0)

    def error(self) -> float:
        """Return the window's relative L2 distance from the whole batch.

        Infinite where a gradient isn't finite.
        """
        return _number((self.window - self.whole).norm() / self.whole.norm())

    def worst(self) -> tuple[str, float]:
        """Return the parameter whose gradient differs most, and by how much.

        Relative to itself.

        One whose gradient is less than a thousandth of the whole is judged as if it had that: what cancels out in it
        (an attention's key bias) leaves its rounding only.
        """
        floor = SMALL_TENSOR_RATIO * self.whole.norm()
        sizes = [entries for _, entries in self.places]
        off_by, whole = (torch.split(v, sizes) for v in (self.window - self.whole, self.whole))
        pairs = zip(off_by, whole, strict=True)
        errors = [_number(off.norm() / torch.maximum(own.norm(), floor)) for off, own in pairs]
        largest = max(range(len(errors)), key=errors.__getitem__)
        return self.places[largest][0], errors[largest]

    def agrees(self, tolerance: float) -> bool:
        """Whether they differ by rounding only, also in the worst tensor."""
        return self.error() <= tolerance and self.worst()[1] <= WORST_TENSOR_FACTOR * tolerance

    def fit(self) -> tuple[list[float], float]:
        """Fit the whole by the parts: least-squares weights and residual.

        Returns:
            A factor for each part, on top of the weight that it had; and the relative residual.
        """
        return fit(self.columns, self.whole)


def compare(
    model_copy: FunctionalCopy,
    make_parts: MakeParts,
    whole: Batch,
    pieces: Sequence[Batch],
    sizes: tuple[int, ...],
    one: Passes | None = None,
) -> Gradients:
    """Return the gradients of a window of pieces and the whole.

    One pass more than there are pieces.

    Where the whole batch's is not finite, or zero, that is all there is.

    Args:
        model_copy: What stands in for the model.
        make_parts: Makes what is trained.
        whole: The whole batch.
        pieces: Its parts.
        sizes: Samples in each.
        one: The whole batch's pass, where there has been one.
    """
    one = one or model_copy.window(make_parts, [whole], [sum(sizes)], first=sizes[0])
    if not (one.gradient.isfinite().all() and one.gradient.norm() > 0):  # there is nothing to compare with
        return Gradients(
            one.gradient, one.gradient, one.cumulative, sizes, model_copy.places, one.draws, True, one.is_pair, one
        )
    many = model_copy.window(make_parts, pieces, sizes, first=sizes[0])
    before = torch.cat([torch.zeros_like(many.cumulative[:1]), many.cumulative[:-1]])
    columns = many.cumulative - before
    is_random = one.is_random or many.is_random
    one.draws.replaced |= many.draws.replaced
    one.draws.kept |= many.draws.kept
    depends = rows_differ(one.trace, many.trace)
    return Gradients(
        one.gradient, many.gradient, columns, sizes, model_copy.places, one.draws, is_random, one.is_pair, one, depends
    )


def fit(columns: torch.Tensor, target: torch.Tensor) -> tuple[list[float], float]:
    """Fit a vector by others with least squares; return the residual.

    Their factors, and the relative residual.
    """
    scale = columns.norm(dim=1).clamp(min=torch.finfo(columns.dtype).tiny)
    scaled = (columns / scale[:, None]).T
    orthogonal, triangle = torch.linalg.qr(scaled)  # millions of rows, three columns: a singular value solver is slow
    factors = torch.linalg.pinv(triangle) @ (orthogonal.T @ target)
    residual = _number((scaled @ factors - target).norm() / target.norm())
    return (factors / scale).tolist(), residual


def _number(value: torch.Tensor) -> float:
    number = float(value)
    return number if number == number else float("inf")
