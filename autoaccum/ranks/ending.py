"""End all ranks of a sharded model when one of them fails.

The others are in its collectives, or on their way into one, and nothing but their process's end gets them out. So a
rank that fails says so in the process group's store, where a thread of every other rank looks for it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading

from ..torch_compat import default_store
from .words import Control

SECONDS = 0.2  # between two looks
_LAST_LOOK_SECONDS = 5.0
EXIT_CODE = 1


class Ending:
    """The end of all ranks.

    Every rank makes one at the same time.

    Args:
        control: The words, for this process's place.
    """

    def __init__(self, control: Control) -> None:
        self.rank = control.rank
        self._key = f"{control.name}/ended"
        self._store = default_store()
        clone = getattr(self._store, "clone", None)  # a client of its own: a store's calls wait for each other
        looked_at = self._store if clone is None else clone()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(looked_at,), daemon=True, name="autoaccum ending")
        self._thread.start()
        atexit.register(self._stop)

    def end(self, text: str) -> None:
        """Say that this rank failed, and why; the others' processes end."""
        self._store.set(self._key, f"{self.rank} {text}".encode())

    def _stop(self) -> None:
        """Stop looking before the interpreter ends.

        A daemon thread that is in the store's C++ then is unwound in it, which aborts the process: after a whole
        training, torchrun takes it for a failure (CPython ends such threads by pthread_exit, up to 3.13).
        """
        self._over.set()
        self._thread.join(_LAST_LOOK_SECONDS)

    def _look(self, store: object) -> None:
        """Wait for another rank's failure, and end this process."""
        while not self._over.is_set():
            try:
                if store.check([self._key]):  # type: ignore[attr-defined]
                    break
            except RuntimeError:  # the store's process is gone, or this one ends
                return
            self._over.wait(SECONDS)
        else:
            return
        rank, _, text = store.get(self._key).decode().partition(" ")  # type: ignore[attr-defined]
        if int(rank) == self.rank:
            return
        print(f"autoaccum: rank {self.rank} ends, as rank {rank} failed: {text}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
