"""What a window's loss is divided by, known before its first backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..data import split as cutting
from ..data import tree
from ..devices.oom import drop_frames, is_out_of_memory
from ..devices.registry import get_device
from ..errors import BatchError
from ..state import snapshot
from ..state.rng import put_rng, take_rng
from ..workload import Batch, default_loss
from .compiled import uncompiled
from .context import TrainingContext, autocast, forward
from .hugging_face import Denominator, can_tell, find_denominator, has_labels
from .loss_terms import count_of

Asked = TypeVar("Asked")


def window_count(context: TrainingContext, pieces: Sequence[Batch]) -> Any:
    """Return the window's count, before its first backward.

    Returns:
        The count, 0 where nothing counts; None where the loss is a mean over samples, or where the window is one
        piece whose loss brings its own count.
    """
    if (
        not context.asked_for_denominator
        and context.loss is default_loss
        and has_labels(pieces[0])
        and not context.count
    ):
        telling = next((piece for piece in pieces if can_tell(piece)), None)
        if telling is None:
            return 0  # all labels are ignored
        few = _few(telling)
        _ask_for_denominator(context, few if can_tell(few) else telling)
    if context.count is not None:
        return sum(context.count(piece) for piece in pieces)
    if len(pieces) < 2 or context.encode is not None:
        return None
    if not (context.counts_by_forward or _is_pair(context, pieces[0])):
        return None
    return asked(context, lambda: sum(_value(count_of(forward(context, _copy(piece)))) for piece in pieces))


def _ask_for_denominator(context: TrainingContext, piece: Batch) -> None:
    """Find the denominator of a model with its own loss, once."""

    def find() -> Denominator | None:
        rng, batch = take_rng(), tree.to_device(piece, context.device)

        def ask(more: dict[str, Any]) -> Any:
            put_rng(rng)
            with autocast(context):
                return context.model(**{**batch, **more})

        return find_denominator(ask, batch)

    context.denominator = asked(context, find)
    # Blocks that this left would decide where the window's large ones lie.
    get_device(context.device).release_cache()
    context.asked_for_denominator = True
    if context.denominator is not None:
        context.count = context.denominator.count


def _is_pair(context: TrainingContext, piece: Batch) -> bool:
    """Whether the loss returns `(sum, count)`: found once, and remembered."""
    if context.loss_is_mean:
        return False
    few = _few(piece)
    context.counts_by_forward = asked(context, lambda: count_of(forward(context, _copy(few))) is not None)
    get_device(context.device).release_cache()
    context.loss_is_mean = not context.counts_by_forward
    return context.counts_by_forward


def asked(context: TrainingContext, ask: Callable[[], Asked], *, keeps: bool = False) -> Asked:
    """Call `ask` without gradients, or with where it computes some.

    Without needs least memory; forces and penalties need them.

    A graph of one micro-batch's forward is then there before the window's first, which has as large a one and gradients
    beside it, and is gone again before that begins.

    Args:
        context: What is trained.
        ask: Runs its forward.
        keeps: Whether what the forward moves (random states, buffers) stays as it leaves it.
    """
    if not context.takes_gradients:
        before = snapshot.take(model=context.model, storages=False) if keeps else None
        try:
            with contextlib.nullcontext() if keeps else _untouched(context), torch.no_grad():
                return ask()
        except Exception as error:
            if is_out_of_memory(error) or not _misses_gradients(error):
                raise
            drop_frames(error)
        context.takes_gradients = True  # where that isn't it, the same is raised again
        if before is not None:
            before.restore()
    with contextlib.nullcontext() if keeps else _untouched(context), torch.enable_grad():
        return ask()


def _misses_gradients(error: Exception) -> bool:
    """Whether an error may come from missing gradients.

    From torch.autograd, or from code that gets a None.
    """
    said = isinstance(error, RuntimeError) and "grad" in str(error)
    return said or isinstance(error, (AssertionError, AttributeError, TypeError))


def _value(count: Any) -> Any:
    return count.detach() if isinstance(count, torch.Tensor) else count


def _few(piece: Batch) -> Batch:
    """Return two of its samples, where it can be split.

    A forward that only counts should need less memory than one that trains.
    """
    try:
        return cutting.tile(piece, min(2, cutting.batch_size(piece)))
    except BatchError:
        return piece


def _copy(piece: Batch) -> Batch:
    """Copy a batch, since a counting forward may write into it."""
    return tree.map_leaves(piece, lambda _, leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)


@contextlib.contextmanager
def _untouched(context: TrainingContext) -> Iterator[None]:
    """Restore random state and buffers after a counting forward; compile nothing."""
    with snapshot.kept(model=context.model, held=context.held, storages=False), uncompiled():
        yield
