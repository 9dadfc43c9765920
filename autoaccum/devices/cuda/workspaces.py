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
from collections.abc import Iterator

from ...torch_compat import clear_cublas_workspaces
from .positions import read_position

Span = tuple[int, int]  # positions in the allocator's history
_watched: list[tuple[int, list[Span]]] = []


def release() -> None:
    """Give cuBLAS's workspaces back to the caching allocator.

    Recordings get to know where in the allocator's history that was.
    """
    begins = [read_position(index) for index, _ in _watched]
    clear_cublas_workspaces()
    for begin, (index, spans) in zip(begins, _watched, strict=True):
        spans.append((begin, read_position(index)))


@contextlib.contextmanager
def watch_releases(index: int) -> Iterator[list[Span]]:
    """Collect between which positions workspaces are given back.

    Args:
        index: The device's number.
    """
    spans: list[Span] = []
    _watched.append((index, spans))
    try:
        yield spans
    finally:
        _watched.remove((index, spans))
