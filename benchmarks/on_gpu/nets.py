"""Make the parts of models that no installed library has: low-rank adapters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A frozen linear layer with a trained update of low rank.

    As in "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1: W x + (alpha / r) B A x, B = 0 at first.

    Args:
        linear: The layer, whose parameters are frozen.
        rank: r.
        alpha: Scale of the update.
    """

    def __init__(self, linear: nn.Linear, rank: int = 16, alpha: int = 32) -> None:
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        like = {"dtype": linear.weight.dtype}
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output and the update's."""
        return self.linear(x) + self.scale * ((x @ self.down.T) @ self.up.T)


def add_low_rank(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Freeze a model; adapt each linear layer of these names."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child))
    return model
