"""Give a model or a loss the rows of the whole window."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UsageError
from .baton import Request, current_lane
from .interception import Meetings


def gather_window(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of the whole window, in order; differentiable.

    Within a window whose micro-batches run in lanes (`batchnorm="exact"` or `batch_interactions="exact"`), the lanes
    meet here, and each gets the rows of all: a contrastive loss over all representations, a load balance over all
    tokens, a Dice score. Each micro-batch's loss is then the whole window's, and so is their mean. Outside of such a
    window, and in one of a single micro-batch, the argument is returned as it is.

    Args:
        tensor: With the micro-batch's rows in dimension 0, at least one dimension.

    Returns:
        A tensor with the rows of all micro-batches.

    Raises:
        UsageError: It has no rows, or the micro-batches' tensors differ in more than their rows.
    """
    lane = current_lane()
    if lane is None:
        return tensor
    if tensor.dim() == 0:
        raise UsageError(
            "gather_window was given a tensor without dimensions.",
            "It joins the rows of micro-batches, and a number has none.",
            "Give what the number is computed from; of a mean, the values that it is over.",
        )
    is_on = torch.is_grad_enabled()

    def settle(values: list[Any]) -> list[Any]:
        with torch.set_grad_enabled(is_on):
            together = torch.cat(values)
        meetings: Meetings = lane.meetings
        meetings.order.met(values, [together])
        return [together] * len(values)

    shape = tuple(tensor.shape[1:])
    place = ("gather_window", shape, tensor.dtype, tensor.device.type)
    found: torch.Tensor = lane.ask(Request(place, lambda: f"gather_window of rows of shape {shape}", tensor, settle))
    lane.meetings.order.mark(lane.index)
    return found
