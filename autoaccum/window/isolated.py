"""Put a model into training state, and restore it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..state import snapshot
from ..state.closures import Holdings
from ..torch_compat import hook_tables
from .compiled import uncompiled


@contextlib.contextmanager
def as_it_trains(model: nn.Module, held: Holdings, *, everything: bool = False) -> Iterator[None]:
    """Enter train mode, uncompiled; restore everything but parameters.

    Random states, buffers, attributes and hooks.

    Args:
        model: The model.
        held: What the loss holds; put back alike.
        everything: Whether to put back all of what it holds, however large, which copies it once more.
    """
    with contextlib.ExitStack() as stack:
        if everything:
            stack.enter_context(snapshot.kept(model=None, held=held))
        stack.enter_context(snapshot.kept(model=model, held=held, storages=False))
        for root in (model, *held.modules.values()):
            stack.enter_context(_hooks_kept(root))
        stack.enter_context(uncompiled())
        if not model.training:
            model.train()
        yield


@contextlib.contextmanager
def _hooks_kept(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that a forward added.

    Hugging Face models add some to capture their router's outputs.
    """
    kept = [(hooks, dict(hooks)) for module in model.modules() for hooks in hook_tables(module)]
    try:
        yield
    finally:
        for hooks, before in kept:
            for number in [number for number in hooks if number not in before]:
                del hooks[number]
