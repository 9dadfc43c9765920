"""Build the workload of a description, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...workload import Workload
from . import images, language
from .description import CONFIG, TIMM, Description

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Built:
    """A workload, and what was assumed where the description leaves it open.

    Attributes:
        workload: The workload.
        architecture: The model's class.
        sample_words: One sample in words, such as "2,048 tokens".
        parameters: Number of parameters.
        trained: Number of parameters that are trained.
        assumed: What was assumed.
    """

    workload: Workload
    architecture: str
    sample_words: str
    parameters: int
    trained: int
    assumed: tuple[str, ...]


def build(description: Description, device: str) -> Built:
    """Build a description's model on a device, with a sample and AdamW.

    Args:
        description: The description.
        device: Where to create the model; its weights are whatever initialization makes there.

    Raises:
        UsageError: There is no such architecture, or an option does not apply to it.
    """
    make = {CONFIG: language.make, TIMM: images.make_timm}.get(description.family, images.make_torchvision)
    with torch.device(device), _default_dtype(description, DTYPES):
        model, sample, words, assumed = make(description)
    model.train()
    sample = {name: each.cpu() for name, each in sample.items()} if isinstance(sample, dict) else sample
    own = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    workload = Workload(
        model,
        sample,
        optimizer=_fused_adamw,
        precision=description.precision,
        clip_grad_norm=1.0,
        accumulate="as_parameters",
    )
    return Built(workload, _class_name(model), words, own, trained, (*assumed, *_assumed(model)))


def _fused_adamw(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer that transformers' Trainer makes by default."""
    return torch.optim.AdamW(parameters, fused=True)


def _assumed(model: nn.Module) -> Iterator[str]:
    """Yield what trainers do by default, and this workload does."""
    first = next(model.parameters())
    yield f"parameters in {_name(first.dtype)}"
    yield "fused AdamW, clipping at 1.0"
    if first.dtype != torch.float32:
        yield f"gradients added up in {_name(first.dtype)}, as trainers do"


def _name(dtype: torch.dtype) -> str:
    return next((name for name, each in DTYPES.items() if each == dtype), str(dtype))


def _class_name(model: Any) -> str:
    """Return the architecture's name, without an adapter's wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__


@contextmanager
def _default_dtype(description: Description, dtypes: dict[str, torch.dtype]) -> Iterator[None]:
    """Create parameters in a dtype while this is entered."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtypes[description.dtype or "fp32"])
    try:
        yield
    finally:
        torch.set_default_dtype(before)
