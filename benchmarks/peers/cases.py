"""The searched cases: a model, data, an optimizer and a virtual GPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum import Workload
from autoaccum.devices.virtual import VirtualGpu

from ..models import Block

GiB = 2**30
LENGTH = 512
BERT_VOCABULARY = 30_522


class Gpt(nn.Module):
    """Tokens (B, T) to logits for each, by six causal blocks."""

    def __init__(self, vocab: int = 8192, width: int = 512, depth: int = 6) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(vocab, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*[Block(width, 8) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.places.weight[: x.shape[1]])))


class Bert(nn.Module):
    """Map tokens (B, T) to logits by transformers' BERT-base.

    It takes one tensor, as the finders give it.
    """

    def __init__(self) -> None:
        super().__init__()
        import transformers

        self.bert = transformers.BertForMaskedLM(transformers.BertConfig())

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.bert(input_ids=x).logits


class Mlp(nn.Module):
    """Features (B, 1024) to classes, by residual blocks."""

    def __init__(self, width: int = 1024, depth: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """One table of comparisons.

    Attributes:
        make: Makes the model, on the host.
        sample_shape: Of one input.
        classes: How many there are; of each token, where the input is tokens.
        optimizer: Makes it from the parameters.
        precision: As in a Workload.
        memory_bytes: Of the virtual GPU.
        start: Where finders begin that go downwards, and end that bisect: 128, which is Accelerate's default, or the
            first power of two above the answer.
    """

    make: Callable[[], nn.Module]
    sample_shape: tuple[int, ...]
    classes: int
    optimizer: Callable[..., torch.optim.Optimizer]
    precision: str
    memory_bytes: int
    start: int = 128

    @property
    def images(self) -> bool:
        """Whether its samples are images."""
        return len(self.sample_shape) == 3

    @property
    def tokens(self) -> bool:
        """Whether its samples are rows of tokens."""
        return self.sample_shape == (LENGTH,)

    @property
    def gpu(self) -> VirtualGpu:
        """The virtual GPU that it is searched on."""
        return VirtualGpu(memory_bytes=self.memory_bytes)

    def inputs(self, n: int, device: str = "cpu") -> Tensor:
        """Make inputs of n samples."""
        dtype = torch.long if self.tokens else torch.float32
        return torch.zeros(n, *self.sample_shape, dtype=dtype, device=device)

    def batch(self, n: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Make inputs and classes of n samples."""
        inputs = self.inputs(n, device)
        return inputs, inputs if self.tokens else torch.zeros(n, dtype=torch.long, device=device)

    def model(self, *, last: bool = False) -> nn.Module:
        """Put a new model on the GPU.

        Initial values are computed once and copied; the last model of a process needs no copy.
        """
        return (made(self) if last else copy.deepcopy(made(self))).cuda()

    def workload(self, *, last: bool = False) -> Workload:
        """Made anew, its model on the GPU."""
        return Workload(self.model(last=last), self.batch(2), optimizer=self.optimizer, precision=self.precision)


@functools.cache
def made(case: Case) -> nn.Module:
    """Make the case's model on the host, the same each time."""
    return case.make()


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)()
    return model


_adamw = torch.optim.AdamW
_sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
_image: Any = (3, 224, 224)
_resnet18, _resnet50, _vit_l = (functools.partial(_torchvision, name) for name in ("resnet18", "resnet50", "vit_l_16"))

SMALL = "ResNet-18 fp32 AdamW, 1.5 GiB"  # for tests; not in the table
CASES = {
    "ResNet-50 bf16 SGD, 8 GiB": Case(_resnet50, _image, 1000, _sgd, "bf16", 8 * GiB, start=256),
    "GPT bf16 AdamW, 8 GiB": Case(Gpt, (LENGTH,), 8192, _adamw, "bf16", 8 * GiB),
    "MLP fp32 AdamW, 4 GiB": Case(Mlp, (1024,), 100, _adamw, "fp32", 4 * GiB, start=4096),
    "BERT-base bf16 AdamW, 8 GiB": Case(Bert, (LENGTH,), BERT_VOCABULARY, _adamw, "bf16", 8 * GiB),
    "ViT-L/16 fp32 AdamW, 8 GiB": Case(_vit_l, _image, 1000, _adamw, "fp32", 8 * GiB),
    "ResNet-18 fp32 AdamW, 4 GiB": Case(_resnet18, _image, 1000, _adamw, "fp32", 4 * GiB, start=256),
    SMALL: Case(_resnet18, _image, 1000, _adamw, "fp32", 3 * GiB // 2),
}
