"""Models with batch normalization, from torchvision and of three other kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

CLASSES = 10
TORCHVISION = (
    "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small",
    "shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf", "googlenet", "vgg11_bn",
)  # fmt: skip


class UNet(nn.Module):
    """Two levels with skip connections; a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.block(3, 8), self.block(8, 16), self.block(16, 32)])
        self.up = nn.ModuleList([self.block(32 + 16, 16), self.block(16 + 8, 8)])
        self.head = nn.Conv2d(8, CLASSES, 1)

    @staticmethod
    def block(inner: int, outer: int) -> nn.Module:
        """Return two convolutions with their normalizations."""
        return nn.Sequential(
            nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (samples, classes, height, width)."""
        kept = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for level, block in enumerate(self.up):
            x = nn.functional.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, kept[1 - level]], 1))
        return self.head(x).mean((2, 3))


class PointNet(nn.Module):
    """Shared layers over points, and the largest of each feature."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 32, 64, 128)
        layers = [
            nn.Sequential(nn.Conv1d(a, b, 1, bias=False), nn.BatchNorm1d(b), nn.ReLU())
            for a, b in itertools.pairwise(sizes)
        ]
        self.points = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of clouds of shape (samples, 3, points)."""
        return self.head(self.points(x).amax(-1))


def volumes() -> nn.Module:
    """Make a net of volumes."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, bias=False), nn.BatchNorm3d(8), nn.ReLU(),
        nn.Conv3d(8, 16, 3, stride=2, bias=False), nn.BatchNorm3d(16), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def vision(name: str) -> Callable[[], nn.Module]:
    """Return a function that makes a model of torchvision without weights."""
    more: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **more)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (vision(name), (3, 64, 64)) for name in TORCHVISION},
    "U-Net": (UNet, (3, 32, 32)),
    "PointNet": (PointNet, (3, 128)),
    "volumes": (volumes, (1, 12, 12, 12)),
}


def made(
    name: str, dtype: torch.dtype, samples: int, seed: int = 0
) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Make a model that draws nothing in its forward, and a batch.

    Weights and inputs are numbers of single precision, so they are the same in double.
    """
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = make().to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model, (torch.randn(samples, *shape).to(dtype), torch.arange(samples) % CLASSES)
