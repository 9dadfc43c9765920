"""Release cuBLAS's workspaces, which would fragment the allocator's memory.

cuBLAS keeps a workspace (8 to 32 MiB) for each thread and stream from its first matrix product on. In a backward pass
the only free block that is large enough may be the one that a language model's logits have just left: hundreds of MiB,
which no later logits fit while 8 MiB of them are in use, so the next micro-batch reserves as much again. Released after
each micro-batch, workspaces fragment nothing; the next product creates them again, in microseconds. And what ran before
the first window (an evaluation, the forward pass that counts for the loss) leaves blocks behind that the window's own
are split from, in another way than in a new process.
"""

from __future__ import annotations

import contextlib

from ...torch_compat import clear_cublas_workspaces, history_metadata, is_history_on

WORKSPACES = "autoaccum workspaces"  # in the allocator's history, beside the events that give them back


def release() -> None:
    """Give cuBLAS's workspaces back to the caching allocator.

    A history that is being recorded names them.
    """
    with history_metadata(WORKSPACES) if is_history_on() else contextlib.nullcontext():
        clear_cublas_workspaces()
