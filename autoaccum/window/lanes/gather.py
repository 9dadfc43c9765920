"""Give a model or a loss the rows of the whole window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ...errors import UsageError
from .baton import Request, current_lane
from .interception import Meetings
from .over_ranks import absent_rows, gather_rows

_absent: ContextVar[float] = ContextVar("absent", default=0.0)


@contextlib.contextmanager
def gathering_absent(absent: float) -> Iterator[None]:
    """Give rows of ranks that aren't here, without lanes: while planning.

    Args:
        absent: Rows for each one that is here; 0 for none.
    """
    token = _absent.set(absent)
    try:
        yield
    finally:
        _absent.reset(token)


def gather_window(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of the whole window, in order; differentiable.

    Within a window whose micro-batches run in lanes (`batchnorm="exact"` or `batch_interactions="exact"`), the lanes
    meet here, and each gets the rows of all: a contrastive loss over all representations, a load balance over all
    tokens, a Dice score. Each micro-batch's loss is then the whole window's, and so is their mean. Over ranks it is the
    window of all, with the first rank's rows first. Outside of such a window, and in one of a single micro-batch on one
    rank, the argument is returned as it is.

    Args:
        tensor: With the micro-batch's rows in dimension 0, at least one dimension.

    Returns:
        A tensor with the rows of all micro-batches.

    Raises:
        UsageError: It has no rows, or the micro-batches' tensors differ in more than their rows.
    """
    lane = current_lane()
    if lane is None:
        absent = _absent.get()
        return torch.cat([tensor, absent_rows(tensor, absent)]) if absent else tensor
    if tensor.dim() == 0:
        raise UsageError(
            "gather_window was given a tensor without dimensions.",
            "It joins the rows of micro-batches, and a number has none.",
            "Give what the number is computed from; of a mean, the values that it is over.",
        )
    is_on = torch.is_grad_enabled()

    def settle(values: list[Any]) -> list[Any]:
        meetings: Meetings = lane.meetings
        with torch.set_grad_enabled(is_on):
            ranks = meetings.over_ranks(title, tensor, values)
            if ranks is None:
                together = torch.cat(values)
            else:
                together, anchor = gather_rows(ranks, values)
                meetings.anchor(anchor)
        meetings.order.met(values, [together])
        meetings.gathered.add(len(together))
        return [together] * len(values)

    shape = tuple(tensor.shape[1:])
    title = f"gather_window of rows of shape {shape}"
    place = ("gather_window", shape, tensor.dtype, tensor.device.type)
    found: torch.Tensor = lane.ask(Request(place, lambda: title, tensor, settle))
    lane.meetings.order.mark(lane.index)
    return found
