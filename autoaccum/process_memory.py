"""This process's own memory, as Linux and the C library count it.

*Committed* bytes are the private writable pages of the process (VmData): what RLIMIT_DATA limits. *Resident* bytes are
those that are in memory now. No torch here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from pathlib import Path
from types import TracebackType

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MMAP_THRESHOLD_BYTES = 128 * 1024  # glibc's own DEFAULT_MMAP_THRESHOLD_MIN, held fixed
SAMPLING_SECONDS = 50e-6

_M_MMAP_THRESHOLD = -3  # malloc.h


class _Mallinfo2(ctypes.Structure):
    # arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks come before fordblks, and keepcost after it
    _fields_ = [("before", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library where it is glibc 2.33 or newer, which has mallinfo2; else None."""
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallinfo2") and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return None
    libc.mallinfo2.restype = _Mallinfo2
    return libc


_fixed: list[int] = []


def fix_mmap_threshold(threshold_bytes: int = MMAP_THRESHOLD_BYTES) -> bool:
    """Makes malloc give every block of at least that size a mapping of its own, from now on.

    By default the threshold moves up whenever a large block is freed, and large blocks then fragment the heap
    differently in each run: no prediction of committed or resident bytes holds to better than a quarter.

    Returns:
        Whether the C library took it. It can't be undone within the process.
    """
    libc = _libc()
    taken = libc is not None and libc.mallopt(_M_MMAP_THRESHOLD, threshold_bytes) == 1
    if taken:
        _fixed[:] = [threshold_bytes]
    return taken


def fixed_threshold_bytes() -> int | None:
    """What the threshold was fixed to in this process; None where it never was."""
    return _fixed[0] if _fixed else None


def heap_free_bytes() -> int:
    """Free bytes inside malloc's heaps, which small blocks will fill before the heap grows; 0 where unknown."""
    libc = _libc()
    return int(libc.mallinfo2().fordblks) if libc is not None else 0


def trim() -> None:
    """Gives what is free at the top of the heap back to the system."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def read_memory(statm: int | None = None) -> tuple[int, int]:
    """Committed and resident bytes of this process.

    Args:
        statm: An open descriptor of /proc/self/statm, for who reads often.
    """
    text = os.pread(statm, 256, 0) if statm is not None else Path("/proc/self/statm").read_bytes()
    fields = text.split()
    return int(fields[5]) * PAGE_BYTES, int(fields[1]) * PAGE_BYTES


def committed_bytes() -> int:
    """Private writable bytes of this process: what a data limit limits."""
    return read_memory()[0]


class PeakSampler:
    """Watches committed and resident bytes from a thread, some thousand times a second, while it is entered.

    A peak that lasts less than 0.1 ms can be missed; a large block takes longer than that to fill.

    Attributes:
        base_bytes: Committed bytes when it was entered, its own thread included.
        committed_peak_bytes: The most that were seen.
        resident_peak_bytes: The most that were seen.
    """

    def __init__(self) -> None:
        self.base_bytes = self.committed_peak_bytes = self.resident_peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="autoaccum-memory", daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> PeakSampler:
        """Starts watching; returns once the thread's own stack is part of the base."""
        self._thread.start()
        self._ready.wait()
        self.base_bytes = committed_bytes()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Stops watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        statm = os.open("/proc/self/statm", os.O_RDONLY)
        try:
            self._ready.set()
            while not self._stop.is_set():
                committed, resident = read_memory(statm)
                self.committed_peak_bytes = max(self.committed_peak_bytes, committed)
                self.resident_peak_bytes = max(self.resident_peak_bytes, resident)
                time.sleep(SAMPLING_SECONDS)
        finally:
            os.close(statm)
