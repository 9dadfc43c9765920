"""Refuse, by name, what lanes can't train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import UsageError
from ...ranks.group import are_absent
from ...torch_compat import compiled_call, is_compiled_function, is_compiled_wrapper

INSTEAD = "Use batchnorm='frozen', which is exact, or 'merged' or 'per_micro_batch'"


def refuse_lanes(model: nn.Module, loss: Any) -> None:
    """Refuse a model whose samples may interact where no lane can meet.

    Raises:
        UsageError: Names the module.
    """
    for name, module in model.named_modules():
        title = f"{name or 'the model'} ({type(module).__name__})"
        if is_compiled_wrapper(module) or compiled_call(module) is not None:
            raise _compiled(f"{title} is compiled")
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"batchnorm='exact', but {title} is a TorchScript module.",
                "It runs outside of Python, where its micro-batches can't meet.",
                "Give the module that was scripted.",
            )
        if isinstance(module, nn.DataParallel):
            raise UsageError(
                f"batchnorm='exact', but {title} splits each micro-batch over devices, in threads of its own.",
                "Statistics would be those of its parts.",
                "Give the module inside, on one device.",
            )
    if is_compiled_function(loss):
        raise _compiled("the loss is compiled")
    if are_absent():
        raise UsageError(
            "batchnorm='exact' on a fake process group.",
            "Lanes meet those of all ranks, and its ranks are not here.",
            f"Plan on real ranks, or for them: autoaccum plan --gpus 8 --parallel ddp. {INSTEAD} here.",
        )


def _compiled(what: str) -> UsageError:
    return UsageError(
        f"batchnorm='exact', but {what}.",
        "A compiled graph runs from end to end, and a lane has to stop at each normalization.",
        f"Train without torch.compile. {INSTEAD} with it.",
    )


def refuse_one_by_one() -> None:
    """Refuse a loop that runs micro-batches one after the other.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        "batchnorm='exact' needs a window whose micro-batches run in lanes, and this trainer runs them one after the "
        "other.",
        "Its own training step runs forward and backward of each before the next one.",
        f"Train with autoaccum's Runner. {INSTEAD} here.",
    )
