"""Control the virtual GPU of this process.

Devices are numbered as NVML numbers them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from ...errors import UsageError

_FIELDS = ("used_bytes", "peak_bytes", "other_bytes", "free_bytes", "mallocs", "frees", "failures", "launches")


class _Stats(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in _FIELDS)  # source/memory.c


@dataclass(frozen=True)
class Stats:
    """A device's memory, as a real driver would count it.

    Attributes:
        used_bytes: Held by this process, without its context.
        peak_bytes: The most of that since the start or `reset_peak`.
        other_bytes: Held by the other process.
        free_bytes: What is left.
        mallocs: Allocations that were granted.
        frees: What was given back.
        failures: Allocations that were refused.
        launches: Kernels launched, on all devices.
    """

    used_bytes: int
    peak_bytes: int
    other_bytes: int
    free_bytes: int
    mallocs: int
    frees: int
    failures: int
    launches: int


def is_virtual() -> bool:
    """Return whether this process runs on a virtual GPU."""
    return hasattr(ctypes.CDLL(None), "autoaccum_gpu_stats")


def read_settings() -> None:
    """Read the environment's settings again, in a process forked since.

    It must not have used its GPU yet.
    """
    _loaded().autoaccum_gpu_read_settings()


def set_other(device: int, other_bytes: int) -> None:
    """Set the bytes that the other process holds from now on."""
    _library(device).autoaccum_gpu_set_other(device, ctypes.c_uint64(other_bytes))


def fail_next(count: int) -> None:
    """Fail the next `count` allocations.

    PyTorch empties its cache and retries once, so 2 make its error.
    """
    _library().autoaccum_gpu_fail_next(count)


def stats(device: int = 0) -> Stats:
    """Return the driver's figures of a device."""
    found = _Stats()
    _library(device).autoaccum_gpu_stats(device, ctypes.byref(found))
    return Stats(*(getattr(found, name) for name in _FIELDS))


def reset_peak(device: int = 0) -> None:
    """Reset the peak to what is used now."""
    _library(device).autoaccum_gpu_reset_peak(device)


@cache
def _loaded() -> ctypes.CDLL:
    if not is_virtual():
        raise UsageError(
            "This process doesn't run on a virtual GPU.",
            "Its library isn't preloaded.",
            "Start it with: autoaccum virtual-gpu -- COMMAND",
        )
    return ctypes.CDLL(None)


def _library(device: int = 0) -> ctypes.CDLL:
    library = _loaded()
    count = library.autoaccum_gpu_devices()
    if not 0 <= device < count:
        raise UsageError(
            f"There is no virtual GPU {device}.",
            f"This process has {count}, counted from 0 as NVML does.",
            "Name one of those.",
        )
    return library
