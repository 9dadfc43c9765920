"""Six workloads of different kinds, against which predictions are checked."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoaccum import Workload


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        b, t, c = x.shape
        q, k, v = self.attend(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.project(y.transpose(1, 2).reshape(b, t, c))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class ViT(nn.Module):
    """Map images (B, 3, 64, 64) to classes, by patches."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(4)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Recurrent(nn.Module):
    """Map tokens (B, T) to a class each, by LSTM or GRU."""

    def __init__(self, kind: type[nn.RNNBase], both_ways: bool, classes: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        self.cells = kind(256, 512, 2, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(512 * (1 + both_ways), classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.cells(self.embed(ids))[0])


def _mlp() -> Workload:
    layers = [nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 10)]
    return Workload(nn.Sequential(*layers), (torch.randn(8, 1024), torch.randint(10, (8,))))


def _cnn() -> Workload:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(128 * 64, 10)]
    return Workload(nn.Sequential(*layers), (torch.randn(8, 3, 64, 64), torch.randint(10, (8,))))


def _chargpt() -> Workload:
    from autoaccum.processes.examples.chargpt import workload

    return workload()


def _vit() -> Workload:
    return Workload(ViT(), (torch.randn(8, 3, 64, 64), torch.randint(10, (8,))))


def _tagger(kind: type[nn.RNNBase], both_ways: bool, length: int) -> Workload:
    ids = torch.randint(1000, (8, length))
    return Workload(Recurrent(kind, both_ways), (ids, ids % 50))


MODELS: dict[str, Callable[[], Workload]] = {
    "MLP": _mlp,
    "CNN with BatchNorm": _cnn,
    "char-GPT": _chargpt,
    "LSTM": functools.partial(_tagger, nn.LSTM, False, 64),
    "ViT": _vit,
    "GRU tagger": functools.partial(_tagger, nn.GRU, True, 48),
}


def make(name: str) -> Workload:
    """Make a model by name, always with the same parameters."""
    torch.manual_seed(0)
    return MODELS[name]()
