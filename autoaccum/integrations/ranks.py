"""Agree on a window's totals over ranks, and add up its gradients.

A rank's window may have another number of micro-batches, or none at the end of an epoch. So the ranks exchange three
numbers before each window, and by these all decide alike how its gradients are added up: by DistributedDataParallel in
the last backward, or, where some rank's last micro-batch counts nothing, by one reduction before the optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..ranks.group import ranks_here


@dataclass(frozen=True)
class Totals:
    """A window over all ranks.

    Attributes:
        samples: Its samples.
        count: What its loss averages over.
        ranks: Number of ranks.
        last_counts: Whether the last micro-batch of every rank counts something.
    """

    samples: int
    count: float
    ranks: int
    last_counts: bool


def agree(sizes: Sequence[int], counts: Sequence[float], device: torch.device) -> Totals:
    """Exchange a window's numbers with all ranks.

    Args:
        sizes: Samples in each micro-batch of this rank; empty where its data has ended.
        counts: What each counts.
        device: Where the process group's tensors are.
    """
    last = counts[-1] if counts else 0.0
    ranks = ranks_here()
    if ranks == 1:
        return Totals(sum(sizes), sum(counts), 1, bool(last))
    own = torch.tensor([sum(sizes), sum(counts), float(bool(last))], dtype=torch.float64, device=device)
    found = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(found, own)
    table = torch.stack(found).cpu()
    return Totals(int(table[:, 0].sum()), float(table[:, 1].sum()), ranks, bool(table[:, 2].all()))


def sum_over_ranks(figure: torch.Tensor) -> torch.Tensor:
    """Return a scalar's sum over ranks, whatever dtype each has."""
    if ranks_here() == 1:
        return figure
    total = figure.double()
    dist.all_reduce(total)
    return total.to(figure.dtype)


def add_up_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Replace gradients by their sum over ranks.

    A missing one counts as 0. A parameter without a gradient on every rank gets none, as an optimizer passes over such.
    """
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(has)
    for parameter, anywhere in zip(parameters, has.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
