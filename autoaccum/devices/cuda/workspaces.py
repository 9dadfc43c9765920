"""What would decide by chance where a window's large blocks lie in the CUDA caching allocator, and is given back first.

cuBLAS keeps a workspace (8 to 32 MiB) for each thread and stream from its first product on. In a backward pass the only
free block that is large enough may be the one that a language model's logits have just left: hundreds of MiB, which no
later logits fit any more while 8 of them are in use, so the next micro-batch takes as much from the driver again. Given
back after each micro-batch, workspaces are in nobody's way; the next product makes them anew, in microseconds. And what
was run before the first window (an evaluation, the forward that asks the loss what it counts) leaves blocks behind that
the window's own are cut from, in another way than they would be in a fresh process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

WORKSPACES = "autoaccum workspaces"  # in the allocator's history, beside the events that give them back


def let_go_of_workspaces(device: torch.device) -> None:
    """Returns cuBLAS's workspaces to the caching allocator; nothing where the device isn't CUDA."""
    if device.type != "cuda":
        return
    with metadata(WORKSPACES) if torch._C._cuda_isHistoryEnabled() else contextlib.nullcontext():
        torch._C._cuda_clearCublasWorkspaces()


def give_back(device: torch.device) -> None:
    """Gives back to the driver what is free, cuBLAS's workspaces included; nothing where the device isn't CUDA."""
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def metadata(text: str) -> Iterator[None]:
    """Has the allocator write a text beside each event of this thread, in its history."""
    before = torch.cuda.memory._get_memory_metadata()
    torch.cuda.memory._set_memory_metadata(text)
    try:
        yield
    finally:
        torch.cuda.memory._set_memory_metadata(before)
