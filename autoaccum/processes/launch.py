"""Join the ranks that a launcher like torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def launched_rank() -> int:
    """Return this process's rank as its launcher says; 0 without one."""
    return int(os.environ.get("RANK", 0)) if launched_ranks() > 1 else 0


def launched_ranks() -> int:
    """Return the number of processes that were launched together."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ.get(name, "") for name in names]
    return int(values[1]) if all(values) and values[0].isdigit() and values[1].isdigit() else 1


def choose_device(device: str) -> None:
    """Make this rank's GPU the current one, where it trains on one."""
    import torch

    if device == "cuda" and launched_ranks() > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def launched_group(device: str) -> Iterator[None]:
    """Join the launched processes to a process group while this is entered.

    Nothing is done where there is one process, or where the user's code has made the group.

    Args:
        device: "cpu" or "cuda".
    """
    import torch.distributed as dist

    if launched_ranks() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield
    finally:
        dist.destroy_process_group()
