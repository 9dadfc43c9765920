"""The models of `truth.py` at realistic sizes, and their combinations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .models import Block, Recurrent

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW loop": lambda p: torch.optim.AdamW(p, foreach=False),
}
Made = tuple[nn.Module, Any]


class Mlp(nn.Module):
    """(B, 32, 1024) to classes: rows of features, pooled."""

    def __init__(self, width: int = 4096) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1024, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1024)
        )
        self.head = nn.Linear(1024, 100)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.layers(x).mean(1))


class UNet(nn.Module):
    """Map (B, 3, H, W) to classes, by three levels with skips.

    One class for each pixel of a quarter.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(4)]
        self.down = nn.ModuleList(self._block(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(widths))
        self.join = nn.ModuleList(self._block(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(width, 4, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Module:
        layers = [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        skips = []
        for block in self.down[:-1]:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.down[-1](x)
        for level in reversed(range(len(skips))):
            x = self.join[level](torch.cat([skips[level], self.up[level](x)], 1))
        return self.head(x).mean((2, 3))


class Checkpointed(nn.Module):
    """Map tokens (B, T) to tokens; blocks are recomputed in backward."""

    def __init__(self, width: int = 512, depth: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8000, width), nn.Linear(width, 8000)
        self.blocks = nn.ModuleList(Block(width, 8) for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def _images(side: int = 224) -> Any:
    return torch.zeros(2, 3, side, side), torch.zeros(2, dtype=torch.long)


def _tokens(length: int) -> Any:
    ids = torch.zeros(2, length, dtype=torch.long)
    return ids, ids


def _labelled(length: int) -> Any:
    ids = torch.zeros(2, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def _vision(name: str, **how: Any) -> Made:
    import torchvision

    return getattr(torchvision.models, name)(**how), _images()


def _vit() -> Made:
    import torchvision

    sizes = {"num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536}
    return torchvision.models.VisionTransformer(image_size=224, patch_size=16, **sizes), _images()


def _gpt(layers: int, width: int, length: int) -> Made:
    import transformers

    heads = width // 64
    config = transformers.GPT2Config(vocab_size=16_000, n_positions=length, n_embd=width, n_layer=layers, n_head=heads)
    return transformers.GPT2LMHeadModel(config), _labelled(length)


def _bert(layers: int, width: int, length: int) -> Made:
    import transformers

    config = transformers.BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    return transformers.BertForMaskedLM(config), _labelled(length)


def _lstm() -> Made:
    torch.backends.cudnn.enabled = False  # the virtual GPU has none of cuDNN's: torch's own cells run
    return Recurrent(nn.LSTM, False), _tokens(128)


MODELS: dict[str, Callable[[], Made]] = {
    "MLP": lambda: (Mlp(), (torch.zeros(2, 32, 1024), torch.zeros(2, dtype=torch.long))),
    "ResNet-18": lambda: _vision("resnet18"),
    "ResNet-50": lambda: _vision("resnet50"),
    "DenseNet-121": lambda: _vision("densenet121"),
    "ViT-S": _vit,
    "GPT": lambda: _gpt(6, 512, 512),
    "GPT-2": lambda: _gpt(12, 768, 1024),
    "BERT": lambda: _bert(4, 512, 256),
    "BERT-base": lambda: _bert(12, 768, 512),
    "LSTM": _lstm,
    "U-Net": lambda: (UNet(), _images(256)),
    "checkpointed": lambda: (Checkpointed(), _tokens(512)),
}

# model, optimizer, precision, capacity in GiB, target / largest micro-batch, convolutions' workspace
COMBINATIONS: list[tuple[str, str, str, float, float, str | None]] = [
    ("MLP", "SGD", "fp32", 4, 4.3, None),
    ("MLP", "AdamW foreach", "bf16", 8, 2.5, None),
    ("MLP", "AdamW loop", "fp16", 4, 3.4, None),
    ("ResNet-18", "AdamW foreach", "fp32", 4, 3.3, None),
    ("ResNet-18", "SGD", "bf16", 12, 1.6, None),
    ("ResNet-18", "AdamW fused", "fp16", 6, 4.6, "0.5x"),
    ("ResNet-50", "SGD", "bf16", 16, 2.2, None),
    ("ResNet-50", "AdamW foreach", "fp32", 24, 3.1, "64MiB"),
    ("ResNet-50", "AdamW fused", "fp32", 80, 1.4, None),
    ("ViT-S", "AdamW foreach", "fp32", 6, 3.7, None),
    ("ViT-S", "AdamW fused", "bf16", 16, 2.4, None),
    ("ViT-S", "SGD", "fp16", 8, 5.5, None),
    ("GPT", "AdamW foreach", "bf16", 8, 4.2, None),
    ("GPT", "AdamW loop", "fp32", 16, 1.0, None),
    ("GPT-2", "AdamW fused", "bf16", 40, 3.6, None),
    ("GPT-2", "AdamW foreach", "fp32", 24, 7.3, None),
    ("BERT", "AdamW foreach", "fp32", 6, 2.7, None),
    ("BERT", "AdamW loop", "fp16", 10, 4.4, None),
    ("BERT-base", "AdamW fused", "bf16", 24, 3.9, None),
    ("BERT-base", "AdamW foreach", "fp32", 80, 2.6, None),
    ("LSTM", "AdamW foreach", "fp32", 4, 2.3, None),
    ("LSTM", "SGD", "bf16", 6, 1.7, None),
    ("U-Net", "SGD", "fp32", 16, 4.8, None),
    ("U-Net", "AdamW foreach", "bf16", 24, 2.9, "0.5x"),
    ("U-Net", "AdamW fused", "fp16", 8, 3.5, None),
    ("checkpointed", "AdamW foreach", "fp32", 8, 3.2, None),
    ("checkpointed", "SGD", "bf16", 12, 2.1, None),
    ("checkpointed", "AdamW fused", "fp16", 6, 5.2, None),
]
