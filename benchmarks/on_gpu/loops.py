"""The loop that a person writes, over micro-batches of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autoaccum import Workload
from autoaccum.data import split as cutting
from autoaccum.data import tree
from autoaccum.workload import default_loss

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def hand_written(work: Workload, optimizer: torch.optim.Optimizer, n: int, steps: int) -> Callable[[], None]:
    """Return a function that trains one window on the GPU.

    It copies each micro-batch from the host, divides its mean loss by their number, clips and steps. Each is memory of
    its own, as a loader's would be: one that is copied again and again comes from the processor's cache.
    """
    pieces = cutting.split(cutting.tile(work.sample, n * steps), (n,) * steps)
    loss_of = work.loss or default_loss
    dtype = DTYPES.get(work.precision or "")
    scaler, trained = work.scaler, [p for p in work.model.parameters() if p.requires_grad]

    def window() -> None:
        for piece in pieces:
            batch: Any = tree.to_device(piece, torch.device("cuda"))
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                loss = loss_of(work.model, batch) / steps
            (scaler.scale(loss) if scaler else loss).backward()
            del loss, batch
        if work.clip_grad_norm is not None:
            if scaler:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, work.clip_grad_norm)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return window
