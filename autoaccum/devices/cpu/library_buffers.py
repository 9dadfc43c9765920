"""Free the buffers that libraries keep from one product to the next.

MKL packs parts of the matrices that it multiplies into buffers of its own, which it keeps for later products: some MiB
for each thread, more for larger matrices and for several sizes in turn. No recording shows them. So they are freed
before a window is recorded; what a window leaves is then what training at that size keeps.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import process_memory

_NAMES = ("mkl_free_buffers", "mkl_serv_free_buffers")  # MKL's reference; its name where MKL is linked statically


def free_library_buffers() -> int:
    """Free the buffers that are not in use; return their bytes.

    0 where torch is built without MKL, or nothing counts what malloc hands out.
    """
    before = process_memory.in_use_bytes() or 0
    _free()()
    return max(0, before - (process_memory.in_use_bytes() or 0))


@functools.cache
def _free() -> Callable[[], Any]:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with contextlib.suppress(OSError):
        loaded = ctypes.CDLL(str(library))
        for name in _NAMES:
            if hasattr(loaded, name):
                function: Callable[[], Any] = getattr(loaded, name)
                return function
    return lambda: None
