"""Keep torch's native log silent while memory is profiled."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

_ERRORS = 2  # c10/util/logging_is_not_google_glog.h: GLOG_ERROR


@contextlib.contextmanager
def native_warnings_left_out() -> Iterator[None]:
    """Keep torch's native log of warnings silent; Python's warnings stay.

    While memory is profiled, c10/core/CPUAllocator.cpp logs each thousandth freed block that was there before. A build
    with glog has no such variable, and logs.
    """
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):
        yield
        return
    before = level.value
    level.value = max(before, _ERRORS)
    try:
        yield
    finally:
        level.value = before
