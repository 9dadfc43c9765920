"""Compare windows with one whole batch: in lanes, and by plain accumulation."""

from __future__ import annotations

import copy
import statistics
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
SEEDS = 3  # of the comparison in single precision, where one activation that rounds to the other side of 0 decides


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
    """One whole batch and a window in lanes, in one precision.

    Attributes:
        whole: One whole batch's gradient.
        lanes: The gradient of a window in lanes.
        statistics_error: Relative L2 distance of the running statistics in lanes.
        loss_error: Relative distance of the loss in lanes.
    """

    whole: torch.Tensor
    lanes: torch.Tensor
    statistics_error: float
    loss_error: float


def compare(name: str, dtype: torch.dtype, seed: int = 0) -> Found:
    """Train one whole batch, and a window in lanes."""
    model, batch = made(name, dtype, sum(SIZES), seed)
    lanes = copy.deepcopy(model)
    loss = default_loss(model, batch)
    loss.backward()
    gradient, lanes_loss = window(lanes, batch, "exact")
    value = float(loss.detach())
    return Found(
        flat(p.grad for p in model.parameters()),
        gradient,
        apart(flat(lanes.buffers()), flat(model.buffers())),
        abs(lanes_loss - value) / abs(value),
    )


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative L2 distance."""
    return float((one - other).norm() / other.norm())


def run(names: Sequence[str] | None = None) -> list[Row]:
    """Return a row for each model."""
    rows: list[Row] = []
    for name in names or MODELS:
        double = [compare(name, torch.float64, seed) for seed in range(SEEDS)]
        single = [compare(name, torch.float32, seed) for seed in range(SEEDS)]
        pairs = list(zip(single, double, strict=True))
        plain, _ = window(*made(name, torch.float64, sum(SIZES)), "per_micro_batch")
        rows.append(
            {
                "model": name,
                "gradient, fp64": f"{max(apart(each.lanes, each.whole) for each in double):.1e}",
                "running statistics, fp64": f"{max(each.statistics_error for each in double):.1e}",
                "loss, fp64": f"{max(each.loss_error for each in double):.1e}",
                "lanes in fp32": f"{statistics.median(apart(low.lanes, high.whole) for low, high in pairs):.1e}",
                "one batch in fp32": f"{statistics.median(apart(low.whole, high.whole) for low, high in pairs):.1e}",
                "plain accumulation": f"{apart(plain, double[0].whole):.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows
