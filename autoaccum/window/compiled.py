"""Record and test compiled models uncompiled; verify and train them compiled.

torch.compile makes a graph for the first batch size it sees, and one for all others (or one for each, with
dynamic=False, until it silently gives up at eight). Planning runs many sizes that training never will, so none of
these is compiled: only the two sizes of the plan's own window are, when it is verified.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..devices.registry import get_device
from ..torch_compat import compiled_call, is_compiled_function, is_compiled_wrapper, is_compiler_loaded

if TYPE_CHECKING:
    from .context import TrainingContext


def is_compiled(model: nn.Module, loss: Any = None) -> bool:
    """Whether a model, a module in it, or its loss is compiled.

    By torch.compile or Module.compile.
    """
    if is_compiled_function(loss):
        return True
    return any(is_compiled_wrapper(each) or compiled_call(each) is not None for each in model.modules())


def runs_compiled(context: TrainingContext) -> bool:
    """Whether its windows really run compiled, which virtual GPUs can't."""
    return is_compiled(context.model, context.loss) and get_device(context.device).computes


def as_trained(context: TrainingContext) -> AbstractContextManager[None]:
    """Around a window that is run for real while planning."""
    return contextlib.nullcontext() if get_device(context.device).computes else uncompiled()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything uncompiled within this context, and compile nothing."""
    if not is_compiler_loaded():  # nothing can be compiled, and loading it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
