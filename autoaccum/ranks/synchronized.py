"""Let SyncBatchNorm normalize without talking to other ranks.

Its own forward waits for all ranks and runs on GPUs only. Where micro-batches run in lanes, these meet with those of
other ranks at each call of `torch.nn.functional.batch_norm`, which every other batch normalization makes; and while a
rank plans alone, nobody answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType

from torch import nn

from ..torch_compat import BatchNorm


@contextlib.contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Run a model's SyncBatchNorms as BatchNorm while it is entered."""
    found = [each for each in synchronized(model).values() if "forward" not in vars(each)]
    for module in found:
        module.forward = MethodType(BatchNorm.forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in found:
            vars(module).pop("forward", None)


def synchronized(model: nn.Module) -> dict[str, nn.SyncBatchNorm]:
    """Return a model's SyncBatchNorms by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)}


def customized(model: nn.Module) -> str:
    """Name a SyncBatchNorm with a forward of its own; empty for none."""
    found = synchronized(model).items()
    return next((name for name, each in found if type(each).forward is not nn.SyncBatchNorm.forward), "")
