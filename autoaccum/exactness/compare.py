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

SMALL_TENSOR_RATIO = 1e-3  # of the whole gradient's norm; smaller tensors are judged by that


WORST_TENSOR_FACTOR = 10  # of the tolerance, for the worst single tensor


@dataclass(frozen=True, eq=False)
class Gradients:
    """Hold the gradients of one window, in parts and whole.

    Attributes:
        whole: The gradient of the whole batch, of shape (entries,).
        window: The gradient of the window of parts, as its optimizer step got it, of shape (entries,).
        columns: What each micro-batch added to it, of shape (parts, entries).
        sizes: Samples in each part.
        places: Name and number of entries of each parameter, in order.
        draws: Random operators and class losses of the passes.
        is_random: Whether anything was drawn at random.
        is_pair: Whether the loss returns a sum and its count.
        one: The whole batch's pass.
        depends: Whether values within the loss changed for the same samples in the whole batch.
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
        """Whether the whole gradient is finite and not zero."""
        return bool(self.whole.isfinite().all() and self.whole.norm() > 0)

    def error(self) -> float:
        """Return the window's relative L2 distance; infinite if not finite."""
        return _number((self.window - self.whole).norm() / self.whole.norm())

    def worst(self) -> tuple[str, float]:
        """Return the parameter with the largest relative error, and the error.

        A gradient below a thousandth of the whole is judged as if it had that norm: where values cancel out (an
        attention's key bias), only rounding is left.
        """
        floor = SMALL_TENSOR_RATIO * self.whole.norm()
        sizes = [entries for _, entries in self.places]
        off_by, whole = (torch.split(v, sizes) for v in (self.window - self.whole, self.whole))
        pairs = zip(off_by, whole, strict=True)
        errors = [_number(off.norm() / torch.maximum(own.norm(), floor)) for off, own in pairs]
        largest = max(range(len(errors)), key=errors.__getitem__)
        return self.places[largest][0], errors[largest]

    def agrees(self, tolerance: float) -> bool:
        """Return whether gradients differ by rounding only, also by tensor."""
        return self.error() <= tolerance and self.worst()[1] <= WORST_TENSOR_FACTOR * tolerance

    def fit(self) -> tuple[list[float], float]:
        """Fit the parts to the whole by least squares.

        Returns:
            A factor for each part, on top of its weight in the window; and the relative residual.
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
    """Compare the gradient of a window of pieces with the whole batch's.

    If the whole batch's gradient is not finite, or zero, nothing else is run.

    Args:
        model_copy: The model on copied parameters.
        make_parts: Makes the training context.
        whole: The whole batch.
        pieces: Its parts.
        sizes: Samples in each part.
        one: An earlier pass of the whole batch.
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
    """Fit a vector by others: least-squares factors and relative residual."""
    scale = columns.norm(dim=1).clamp(min=torch.finfo(columns.dtype).tiny)
    scaled = (columns / scale[:, None]).T
    orthogonal, triangle = torch.linalg.qr(scaled)  # millions of rows, three columns: an SVD is slow
    factors = torch.linalg.pinv(triangle) @ (orthogonal.T @ target)
    residual = _number((scaled @ factors - target).norm() / target.norm())
    return (factors / scale).tolist(), residual


def _number(value: torch.Tensor) -> float:
    number = float(value)
    return number if number == number else float("inf")
