"""What is searched: a model, its data and its optimizer, on a virtual GPU of some size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoaccum import Workload
from autoaccum.virtual import VirtualGpu

from ..models import Block

GiB = 2**30
LENGTH = 512


class Gpt(nn.Module):
    """Tokens (B, T) to logits for each, by six causal blocks."""

    def __init__(self, vocab: int = 8192, width: int = 512, depth: int = 6) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(vocab, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*[Block(width, 8) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.norm(self.blocks(self.embed(ids) + self.places.weight[: ids.shape[1]])))


@dataclass(frozen=True)
class Case:
    """One column of comparisons.

    Attributes:
        make: Makes the model, on the current default device.
        sample_shape: Of one input.
        classes: How many there are.
        optimizer: Makes it from the parameters.
        precision: As in a Workload.
        memory_bytes: Of the virtual GPU.
    """

    make: Callable[[], nn.Module]
    sample_shape: tuple[int, ...]
    classes: int
    optimizer: Callable[..., torch.optim.Optimizer]
    precision: str
    memory_bytes: int

    @property
    def images(self) -> bool:
        return len(self.sample_shape) == 3

    @property
    def gpu(self) -> VirtualGpu:
        return VirtualGpu(memory_bytes=self.memory_bytes)

    def inputs(self, n: int, device: str = "cpu") -> Tensor:
        dtype = torch.float32 if self.images else torch.long
        return torch.zeros(n, *self.sample_shape, dtype=dtype, device=device)

    def batch(self, n: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Inputs and classes of n samples."""
        inputs = self.inputs(n, device)
        return inputs, torch.zeros(n, dtype=torch.long, device=device) if self.images else inputs

    def workload(self) -> Workload:
        """Made anew, its model on the GPU."""
        return Workload(self.make().cuda(), self.batch(2), optimizer=self.optimizer, precision=self.precision)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)()
    return model


_sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
_image = (3, 224, 224)

CASES = {
    "ResNet-18 fp32 AdamW, 4 GiB": Case(
        functools.partial(_torchvision, "resnet18"), _image, 1000, torch.optim.AdamW, "fp32", 4 * GiB
    ),
    "ResNet-50 bf16 SGD, 16 GiB": Case(
        functools.partial(_torchvision, "resnet50"), _image, 1000, _sgd, "bf16", 16 * GiB
    ),
    "GPT bf16 AdamW, 8 GiB": Case(Gpt, (LENGTH,), 8192, torch.optim.AdamW, "bf16", 8 * GiB),
    "ViT-L/16 fp32 AdamW, 8 GiB": Case(
        functools.partial(_torchvision, "vit_l_16"), _image, 1000, torch.optim.AdamW, "fp32", 8 * GiB
    ),
}
