"""Compare windows with one whole batch: in lanes, and by plain accumulation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoaccum import Workload
from autoaccum.window.step import open_context, train_window
from autoaccum.workload import default_loss

from ..tables import Row
from .models import MODELS, made

SIZES = (5, 4, 2)


class Keep(torch.optim.Optimizer):
    """Keep each gradient, and change nothing."""

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        super().__init__(params, {})
        self.seen: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the window's gradient."""
        grads = (p.grad for group in self.param_groups for p in group["params"])
        self.seen = [grad.clone() for grad in grads if grad is not None]


def flat(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Return all entries as one vector in double precision."""
    return torch.cat([tensor.double().flatten() for tensor in tensors if tensor is not None])


def window(model: nn.Module, batch: Any, how: str | None, sizes: Sequence[int] = SIZES) -> tuple[torch.Tensor, float]:
    """Return a window's gradient and loss."""
    context = open_context(Workload(model, batch, optimizer=Keep, batchnorm=how))
    pieces = list(zip(*(leaf.split(tuple(sizes)) for leaf in batch), strict=True))
    loss = float(train_window(context, pieces, tuple(sizes)).loss)
    assert isinstance(context.optimizer, Keep)
    return flat(context.optimizer.seen), loss


@dataclass(frozen=True)
class Found:
    """One precision's gradients, running statistics and loss.

    Attributes:
        whole: One whole batch's gradient.
        lanes: The gradient of a window in lanes.
        statistics_error: Relative L2 distance of the running statistics in lanes.
        loss_error: Relative distance of the loss in lanes.
        model: The model as it was before.
        batch: The batch.
    """

    whole: torch.Tensor
    lanes: torch.Tensor
    statistics_error: float
    loss_error: float
    model: nn.Module
    batch: Any


def compare(name: str, dtype: torch.dtype) -> Found:
    """Train one whole batch, and a window in lanes."""
    before, batch = made(name, dtype, sum(SIZES))
    model, lanes = copy.deepcopy(before), copy.deepcopy(before)
    loss = default_loss(model, batch)
    loss.backward()
    gradient, lanes_loss = window(lanes, batch, "exact")
    statistics = flat(model.buffers())
    value = float(loss.detach())
    return Found(
        flat(p.grad for p in model.parameters()),
        gradient,
        apart(flat(lanes.buffers()), statistics),
        abs(lanes_loss - value) / abs(value),
        before,
        batch,
    )


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative L2 distance."""
    return float((one - other).norm() / other.norm())


def run(names: Sequence[str] | None = None) -> list[Row]:
    """Return a row for each model."""
    rows = []
    for name in names or MODELS:
        double, single = compare(name, torch.float64), compare(name, torch.float32)
        plain, _ = window(double.model, double.batch, "per_micro_batch")
        rows.append(
            {
                "model": name,
                "gradient, fp64": f"{apart(double.lanes, double.whole):.1e}",
                "running statistics, fp64": f"{double.statistics_error:.1e}",
                "loss, fp64": f"{double.loss_error:.1e}",
                "gradient, fp32": f"{apart(single.lanes, single.whole):.1e}",
                "one batch's own rounding, fp32": f"{apart(single.whole, double.whole):.1e}",
                "plain accumulation": f"{apart(plain, double.whole):.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows
