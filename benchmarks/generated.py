"""Models from a seeded generator: random depth, width and kinds of layers."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Block


class Scratch(torch.autograd.Function):
    """Allocate a workspace that grows in steps with its input's size.

    Forward and backward; it computes nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step_bytes: int) -> Tensor:
        """Asks in whole steps."""
        ctx.step_bytes = step_bytes
        _workspace(x, step_bytes)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Allocate the same again."""
        _workspace(gradients[0], ctx.step_bytes)
        return gradients[0], None


def _workspace(x: Tensor, step_bytes: int) -> None:
    """Allocate one tile for each step's worth of input, sixteen at most."""
    tiles = min(16, -(-x.nbytes // step_bytes))
    torch.empty(tiles * step_bytes, dtype=torch.uint8, device=x.device)


class Convolution(nn.Module):
    """Map (B, C, H, W) to the same shape: convolution and norm.

    With `step_bytes`, a workspace that grows in steps is allocated first.
    """

    def __init__(self, width: int, kernel: int, norm: str, step_bytes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(4, width)
        self.step_bytes = step_bytes

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        y = Scratch.apply(x, self.step_bytes) if self.step_bytes else x
        return F.relu(self.norm(self.convolution(y)))


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return x + self.inner(x)


class Gated(nn.Module):
    """Map (B, T, C) to the same shape by a gated recurrence.

    It is written as a loop with one iteration for each position.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates, self.state = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        h, found = x[:, 0], []
        for position in range(x.shape[1]):
            a, b, c = self.gates(x[:, position]).chunk(3, 1)
            d, e, f = self.state(h).chunk(3, 1)
            update, reset = torch.sigmoid(a + d), torch.sigmoid(b + e)
            h = update * h + (1 - update) * torch.tanh(c + reset * f)
            found.append(h)
        return torch.stack(found, 1)


class Generated(nn.Module):
    """Embeds, runs through what chance has put together, and pools to classes."""

    def __init__(self, layers: list[nn.Module], embed: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers, self.head = embed, nn.Sequential(*layers), head

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.layers(self.embed(x))
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x.mean(1))


def model(seed: int, *, stepping: bool) -> tuple[nn.Module, Any]:
    """Return a model and a batch of two samples for it.

    Args:
        seed: Chooses depth, width and layers.
        stepping: Whether convolutions come with a workspace that steps with size; such a model is of convolutions.
    """
    chance = random.Random(seed)
    depth, classes = chance.randint(1, 8), chance.choice([2, 10, 1000])
    if stepping or chance.random() < 0.4:
        return _of_images(chance, depth, classes, stepping=stepping)
    return _of_tokens(chance, depth, classes)


def _of_images(chance: random.Random, depth: int, classes: int, *, stepping: bool) -> tuple[nn.Module, Any]:
    width, side = chance.choice([16, 32, 48, 64, 96]), chance.choice([64, 96, 128, 224])
    layers: list[nn.Module] = []
    norm = chance.choice(["batch", "group"])
    for _ in range(depth):
        step_bytes = chance.choice([1, 3, 8, 20]) << 20 if stepping else 0
        layer: nn.Module = Convolution(width, chance.choice([1, 3, 5]), norm, step_bytes)
        layers.append(Residual(layer) if chance.random() < 0.4 else layer)
        if chance.random() < 0.4 and side >= 16:
            layers.append(chance.choice([nn.MaxPool2d, nn.AvgPool2d])(2))
            side //= 2
    size = side * 2 ** sum(isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)) for layer in layers)
    batch = torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.long)
    return Generated(layers, nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, classes)), batch


def _of_tokens(chance: random.Random, depth: int, classes: int) -> tuple[nn.Module, Any]:
    width, length = chance.choice([128, 192, 256, 384, 512]), chance.choice([64, 100, 128, 256, 512])
    kinds = ["block", "linear", "dropout", "norm"] + ["gated"] * (length <= 128)
    layers: list[nn.Module] = []
    for _ in range(depth):
        kind = chance.choice(kinds)
        if kind == "block":
            layers.append(Block(width, 4))
        elif kind == "gated":
            layers.append(Residual(Gated(width)))
            kinds.remove("gated")  # one of them makes thousands of events
        elif kind == "linear":
            wide = width * chance.choice([1, 2, 4])
            layers.append(Residual(nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))))
        else:
            layers.append(nn.Dropout(0.1) if kind == "dropout" else nn.LayerNorm(width))
    batch = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    return Generated(layers, nn.Embedding(chance.choice([1000, 30_000]), width), nn.Linear(width, classes)), batch
