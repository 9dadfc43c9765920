"""Recognize a real out-of-memory, and free what it holds."""

from __future__ import annotations

import gc
import traceback

import torch

from ..process_memory import committed_bytes
from .cpu.budget import read_cpu_budget

# What libraries say when they couldn't get memory: c10/core/impl/alloc_cpu.cpp; cuBLAS's and cuDNN's handles.
_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
# "CUDA error: out of memory" is cudaErrorMemoryAllocation, from what doesn't go through torch's allocator: a context, a
# kernel's code that is loaded at its first use, a library's own cudaMalloc.
_CUDA = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
# What they also say for other reasons (a shape that isn't supported, a bug): an out-of-memory only where it is short.
_CPU_SHORT = ("could not create a primitive", "could not execute a primitive", "std::bad_alloc", "bad allocation")
# A library's handle that can't be made: without memory for it, or without a usable device.
_CUDA_SHORT = ("unable to find an engine", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED")

SHORT_SHARE = 0.25  # memory is short where less than this part of it is left: a failed block may have been a large one


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a real out-of-memory.

    Nothing else is ever retried.

    Call it in the handler, while what the failed step allocated is still there.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    if any(text in said for text in (*_CPU, *_CUDA)):
        return True
    if any(text in said for text in _CPU_SHORT):
        return cpu_is_short()
    return any(text in said for text in _CUDA_SHORT) and cuda_is_short()


def cpu_is_short() -> bool:
    """Return whether this process is near its tightest memory limit."""
    limit = read_cpu_budget(headroom=0).limit_bytes
    return limit - committed_bytes() < SHORT_SHARE * limit


def cuda_is_short() -> bool:
    """Return whether the current GPU's memory is nearly used up.

    What torch's cache could give back counts as left.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    free, whole = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < SHORT_SHARE * whole


def drop_frames(error: BaseException) -> str:
    """Free an error's frames; return its first line.

    An exception holds its traceback, that the frames, and these the activations. Call it in the handler and recover
    outside of it.
    """
    lines = str(error).strip().splitlines()
    pending: list[BaseException | None] = [error]
    known: set[int] = set()
    while pending:
        seen = pending.pop()
        if seen is not None and id(seen) not in known:
            known.add(id(seen))
            traceback.clear_frames(seen.__traceback__)
            seen.__traceback__ = None
            pending += [seen.__cause__, seen.__context__]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def collect() -> None:
    """Free what only reference cycles hold.

    An error in backward leaves some.
    """
    gc.collect()
