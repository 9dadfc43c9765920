"""Build image classifiers of timm and torchvision by name, without weights."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from ...errors import UsageError
from .description import Description

Made = tuple[nn.Module, Any, str, tuple[str, ...]]
SAMPLES = 2


def make_timm(description: Description) -> Made:
    """Create timm's model of that name, and a sample."""
    try:
        import timm
    except ImportError:
        raise not_installed("timm", "--timm") from None
    name = description.name
    _check_name("timm", name, timm.list_models())  # no prefix as `hf-hub:`, which would download
    sized: dict[str, Any] = {} if description.image_size is None else {"img_size": description.image_size}
    model: Any
    try:
        model = timm.create_model(name, pretrained=False, **sized)
    except TypeError:  # convolutional ones take any size, and no argument for it
        model = timm.create_model(name, pretrained=False)
    channels, *sides = model.default_cfg.get("input_size", (3, 224, 224))
    if description.image_size is not None:
        sides = [description.image_size] * 2
    if description.checkpointing:
        model.set_grad_checkpointing(True)
    return model, _pair(channels, sides), _words(sides), ()


def make_torchvision(description: Description) -> Made:
    """Create torchvision's classifier of that name."""
    try:
        import torchvision
    except ImportError:
        raise not_installed("torchvision", "--torchvision") from None
    name = description.name
    _check_name("torchvision", name, torchvision.models.list_models(module=torchvision.models))
    if description.checkpointing:
        raise UsageError(
            "torchvision's models have no checkpointing of their own.",
            hint="Plan a workload that checkpoints, or use --timm.",
        )
    model = torchvision.models.get_model(name, weights=None)
    sides = [description.image_size or 224] * 2
    assumed = () if description.image_size else ("images of 224 x 224",)
    return model, _pair(3, sides), _words(sides), assumed


def _pair(channels: int, sides: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros(SAMPLES, channels, *sides, device="cpu", dtype=torch.get_default_dtype())
    return images, torch.zeros(SAMPLES, dtype=torch.long, device="cpu")


def _words(sides: list[int]) -> str:
    return "images of " + " x ".join(map(str, sides))


def _check_name(library: str, name: str, known: list[str]) -> None:
    """Refuse a name that the library doesn't list."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    raise UsageError(
        f"{library} has no classifier {name!r}.", hint=f"Did you mean {near[0]}?" if near else f"See {library}'s list."
    )


def not_installed(package: str, option: str) -> UsageError:
    """Return the error that an option's package is missing."""
    return UsageError(f"{option} needs {package}, which is not installed.", hint=f"python -m pip install {package}")
