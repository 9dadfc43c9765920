"""Watch this process's own memory from a thread."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from types import TracebackType

from ...process_memory import committed_bytes, read_memory, read_page_cache

SAMPLING_SECONDS = 50e-6
_STACK_BYTES = 1 << 20  # of 8 MiB as a rule, which the C library keeps when the thread has ended


class Watcher:
    """Call `look` from a thread, some thousand times per second.

    What lasts less than 0.1 ms can be missed; a large block takes longer than that to fill.

    Attributes:
        user_seconds: Processor time that watching itself took, once it has stopped.
        system_seconds: The same of the kernel's: it reads a file of /proc each time.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self.user_seconds = self.system_seconds = 0.0
        self._stop, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="autoaccum-memory", daemon=True)

    def __enter__(self) -> Watcher:
        """Start watching; return once the thread runs with its stack mapped."""
        before = threading.stack_size(_STACK_BYTES)  # of threads that start from now on
        try:
            self._thread.start()
        finally:
            threading.stack_size(before)
        self._ready.wait()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        self._ready.set()
        while not self._stop.is_set():
            self._look()
            time.sleep(SAMPLING_SECONDS)
        used = resource.getrusage(resource.RUSAGE_THREAD)
        self.user_seconds, self.system_seconds = used.ru_utime, used.ru_stime


class PeakSampler:
    """Watch committed and resident bytes while it is entered.

    Attributes:
        baseline_bytes: Committed bytes when it was entered, its own thread included.
        committed_peak_bytes: The most that were seen.
        resident_peak_bytes: The most that were seen.
    """

    def __init__(self) -> None:
        self.baseline_bytes = self.committed_peak_bytes = self.resident_peak_bytes = 0
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._watcher = Watcher(self._look)

    def __enter__(self) -> PeakSampler:
        """Start watching; the thread's own stack is part of the base."""
        self._watcher.__enter__()
        self.baseline_bytes = committed_bytes()
        return self

    @property
    def own_seconds(self) -> tuple[float, float]:
        """Processor time that watching itself took, the user's and the kernel's."""
        return self._watcher.user_seconds, self._watcher.system_seconds

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Stop watching."""
        self._watcher.__exit__()
        os.close(self._statm)

    def _look(self) -> None:
        committed, resident = read_memory(self._statm)
        self.resident_peak_bytes = max(self.resident_peak_bytes, resident)
        if committed > self.committed_peak_bytes and (settled := self._settled_bytes()) is not None:
            self.committed_peak_bytes = max(self.committed_peak_bytes, settled)

    def _settled_bytes(self) -> int | None:
        """Return the committed bytes; None while the page cache moves pages.

        The kernel counts pages that it moves twice until they have left their old place, which takes up to
        milliseconds. Reading the cache's counts waits for such a move to end.
        """
        before = read_page_cache().pieces
        committed, _ = read_memory(self._statm)
        return committed if read_page_cache().pieces == before else None
