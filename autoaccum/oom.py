"""Which errors are a real out-of-memory, and what one leaves behind."""

from __future__ import annotations

import gc
import traceback

import torch

# What libraries say when they couldn't get memory, and only then on a device that is short of it:
# c10/core/impl/alloc_cpu.cpp; oneDNN's primitives; cuDNN's engines and cuBLAS's handles.
_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_CPU_SHORT = ("could not create a primitive", "could not execute a primitive", "std::bad_alloc", "bad allocation")
_CUDA_SHORT = ("unable to find an engine", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a real out-of-memory: nothing else is ever retried."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(text in str(error) for text in (*_CPU, *_CPU_SHORT, *_CUDA_SHORT))


def drop_frames(error: BaseException) -> str:
    """Frees what the frames of an error hold, and returns the error's first line.

    An exception holds its traceback, that the frames, and these the activations. Call it in the handler and recover
    outside of it.
    """
    told = str(error).strip().splitlines()
    pending: list[BaseException | None] = [error]
    known: set[int] = set()
    while pending:
        seen = pending.pop()
        if seen is not None and id(seen) not in known:
            known.add(id(seen))
            traceback.clear_frames(seen.__traceback__)
            seen.__traceback__ = None
            pending += [seen.__cause__, seen.__context__]
    return f"{type(error).__name__}: {told[0] if told else ''}"


def collect() -> None:
    """Frees what only reference cycles still hold (an error in backward leaves some)."""
    gc.collect()
