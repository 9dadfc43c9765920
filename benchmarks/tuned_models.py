"""Small models for `python -m benchmarks.tuning`.

Loaded by the file's path, as a user's file is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoaccum import Workload


class Residual(nn.Module):
    """Features (B, C) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map a step."""
        return x + self.narrow(F.gelu(self.widen(self.norm(x))))


class Attention(nn.Module):
    """Sequences (B, T, C) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.rest = heads, nn.LayerNorm(width), Residual(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Run a block."""
        b, t, c = x.shape
        q, k, v = self.attend(self.norm(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.rest(x + self.project(y.transpose(1, 2).reshape(b, t, c)))


class Convolutions(nn.Module):
    """Images (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run a block."""
        return x + self.two(F.relu(self.one(self.norm(x))))


def mlp() -> Workload:
    """Residual layers on 256 features."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*[Residual(256) for _ in range(4)]), nn.Linear(256, 10))
    return Workload(model, (torch.randn(8, 256), torch.randint(10, (8,))))


def cnn() -> Workload:
    """Residual convolutions on images of 16 x 16."""
    torch.manual_seed(0)
    body = nn.Sequential(*[Convolutions(16) for _ in range(3)])
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    return Workload(model, (torch.randn(8, 3, 16, 16), torch.randint(10, (8,))))


def gpt() -> Workload:
    """Three transformer blocks on 32 tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 64), nn.Sequential(*[Attention(64, 4) for _ in range(3)]), nn.Linear(64, 64))
    ids = torch.randint(64, (8, 33))
    return Workload(model, (ids[:, :-1], ids[:, 1:]))


class Tokens(nn.Module):
    """Map images (B, 3, 16, 16) to sequences (B, 16, C).

    One token for each patch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 4, stride=4), nn.Parameter(torch.zeros(16, width))

    def forward(self, x: Tensor) -> Tensor:
        """Embeds the patches."""
        return self.patches(x).flatten(2).transpose(1, 2) + self.places


class Mean(nn.Module):
    """Sequences (B, T, C) to features (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over tokens."""
        return x.mean(1)


def vit() -> Workload:
    """Four transformer blocks on the patches of 16 x 16 images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Tokens(128), nn.Sequential(*[Attention(128, 4) for _ in range(4)]), Mean(), nn.Linear(128, 10)
    )
    return Workload(model, (torch.randn(8, 3, 16, 16), torch.randint(10, (8,))))
