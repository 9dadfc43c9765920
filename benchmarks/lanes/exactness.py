"""Compare windows with one whole batch: in lanes, and by plain accumulation.

In double precision as the models are. In single precision their smooth twins are compared: an activation that rounds to
the other side of a kink changes the gradient by a step, as it does for one batch whose input is moved by one rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from autoaccum import Workload
from autoaccum.window.step import open_context, train_window
from autoaccum.workload import default_loss

from ..tables import Row
from .models import MODELS, made

SIZES = (5, 4, 2)
SEEDS = 2


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
    """Return a window's gradient and loss.

    Under hooks of saved tensors, as lanes on a GPU are: so they normalize by the arithmetic that they use there,
    and not all together by one kernel.
    """
    context = open_context(Workload(model, batch, optimizer=Keep, batchnorm=how))
    pieces = list(zip(*(leaf.split(tuple(sizes)) for leaf in batch), strict=True))
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
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


@contextmanager
def smooth() -> Iterator[None]:
    """Let activations and pooling have no kinks.

    SiLU, sigmoid and the mean are in their places.
    """
    silu, sigmoid, mean_pool = F.silu, torch.sigmoid, F.avg_pool2d

    def pool(x: torch.Tensor, size: Any, stride: Any = None, padding: Any = 0, *_: Any, **others: Any) -> torch.Tensor:
        return mean_pool(x, size, stride, padding, ceil_mode=others.get("ceil_mode", False))

    twins: dict[str, Any] = {name: lambda x, inplace=False: silu(x) for name in ("relu", "relu6", "hardswish")}
    twins |= {"hardtanh": lambda x, *limits, **others: silu(x)}  # what torch.nn.ReLU6 calls
    twins |= {"hardsigmoid": lambda x, inplace=False: sigmoid(x), "max_pool2d": pool}
    with ExitStack() as stack:
        for name, twin in twins.items():
            stack.enter_context(mock.patch.object(F, name, twin))
        stack.enter_context(mock.patch.object(torch.Tensor, "amax", torch.Tensor.mean))
        yield


def rounding(name: str, seed: int) -> tuple[float, float]:
    """Return how far fp32 is from one batch in fp64.

    Of a smooth twin, in lanes and in one batch.
    """
    with smooth():
        found = compare(name, torch.float32, seed)
        model, batch = made(name, torch.float64, sum(SIZES), seed)
        default_loss(model, batch).backward()
    exact = flat(p.grad for p in model.parameters())
    return apart(found.lanes, exact), apart(found.whole, exact)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative L2 distance."""
    return float((one - other).norm() / other.norm())


def run(names: Sequence[str] | None = None) -> list[Row]:
    """Return a row for each model."""
    rows: list[Row] = []
    for name in names or MODELS:
        double = [compare(name, torch.float64, seed) for seed in range(SEEDS)]
        single = [rounding(name, seed) for seed in range(SEEDS)]
        plain, _ = window(*made(name, torch.float64, sum(SIZES)), "per_micro_batch")
        rows.append(
            {
                "model": name,
                "gradient, fp64": f"{max(apart(each.lanes, each.whole) for each in double):.1e}",
                "running statistics, fp64": f"{max(each.statistics_error for each in double):.1e}",
                "loss, fp64": f"{max(each.loss_error for each in double):.1e}",
                "smooth twin, lanes in fp32": f"{max(lanes for lanes, _ in single):.1e}",
                "smooth twin, one batch in fp32": f"{max(whole for _, whole in single):.1e}",
                "plain accumulation": f"{apart(plain, double[0].whole):.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows
