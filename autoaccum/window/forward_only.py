"""Run forwards that train nothing, and leave everything as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from ..devices.oom import drop_frames, is_out_of_memory
from ..ranks.sharded import reshard
from ..state import snapshot
from .compiled import uncompiled

if TYPE_CHECKING:
    from .context import TrainingContext

Result = TypeVar("Result")


def forward_only(context: TrainingContext, run: Callable[[], Result], *, keeps: bool = False) -> Result:
    """Run forwards without gradients, where the loss takes none itself.

    Without gradients a forward needs the least memory. A loss of forces or gradient penalties needs them: the graph of
    one micro-batch is then there before the window's first micro-batch, which has as large a graph and gradients
    beside it, and is freed again before that begins.

    Args:
        context: What is trained. `takes_gradients` is set where the first call finds that out.
        run: Runs the forwards.
        keeps: Whether what they change (random states, buffers) stays as they leave it; else it is put back.

    Returns:
        What `run` returned.
    """
    if not context.takes_gradients:
        before = snapshot.take(model=context.model, storages=False) if keeps else None
        try:
            with contextlib.nullcontext() if keeps else _unchanged(context), torch.no_grad():
                return run()
        except Exception as error:
            if is_out_of_memory(error) or not _lacks_gradients(error):
                raise
            drop_frames(error)
        context.takes_gradients = True  # where that isn't the cause, the same is raised again
        if before is not None:
            before.restore()
    with contextlib.nullcontext() if keeps else _unchanged(context), torch.enable_grad():
        return run()


def _lacks_gradients(error: Exception) -> bool:
    """Return whether missing gradients may have caused an error.

    They do in torch.autograd, and in code that gets a None.
    """
    said = isinstance(error, RuntimeError) and "grad" in str(error)
    return said or isinstance(error, (AssertionError, AttributeError, TypeError))


@contextlib.contextmanager
def _unchanged(context: TrainingContext) -> Iterator[None]:
    """Put back random states, buffers and shards afterwards; compile nothing."""
    with snapshot.kept(model=context.model, held=context.held, storages=False), uncompiled():
        try:
            yield
        finally:
            reshard(context.model)
