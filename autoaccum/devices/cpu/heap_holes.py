"""Keep large holes in malloc's heap occupied while planning.

Before its mmap threshold is fixed, glibc lets it rise to 32 MiB, so a process that has trained or loaded data has
tensors in its heap, and holes once they are freed. With the threshold fixed a large block still goes into a hole that
it fits (malloc.c: _int_malloc looks through its bins before sysmalloc maps anything), and which ones fit hangs on the
process's past. A replay knows nothing of that, and a plan must hold without it. So the holes are filled: windows then
take what they take in a process without holes, which is the most.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from ... import process_memory

_HEADER_BYTES = 8  # in front of a block: its chunk's size, and three flags in the low bits
_IS_MAPPED = 0x2
_FLAGS = 0x7


@contextlib.contextmanager
def filled(threshold_bytes: int | None) -> Iterator[int]:
    """Occupy all holes of at least the threshold; yield their bytes.

    Nothing is taken from the system.

    Args:
        threshold_bytes: Malloc's fixed threshold; None where it isn't fixed, and nothing is done.
    """
    libc = process_memory.glibc() if threshold_bytes is not None else None
    blocks = _fill(libc, threshold_bytes) if libc is not None and threshold_bytes is not None else []
    try:
        yield sum(_chunk_bytes(block) & ~_FLAGS for block in blocks)
    finally:
        for block in blocks:
            libc.free(block)  # type: ignore[union-attr]


def _fill(libc: ctypes.CDLL, threshold_bytes: int) -> list[int]:
    """Allocate ever smaller blocks until no hole is as large.

    An answer that is a mapping means that no hole fits.
    """
    found: list[int] = []
    least = threshold_bytes - _HEADER_BYTES
    size = max(least, process_memory.read_heap().free_bytes)
    while True:
        block = libc.malloc(size)
        if block and not _chunk_bytes(block) & _IS_MAPPED:
            found.append(block)
            continue
        if block:
            libc.free(block)
        if size == least:
            return found
        size = max(least, size - size // 8)


def _chunk_bytes(block: int) -> int:
    """Return a block's chunk size with its flags.

    glibc keeps it in front of the block (malloc.c: mchunk_size).
    """
    return ctypes.c_size_t.from_address(block - _HEADER_BYTES).value
