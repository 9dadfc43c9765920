"""Standard streams that are closed, full, or that nobody reads any more."""

from __future__ import annotations

import os
import sys
from typing import IO


def open_missing() -> None:
    """Open closed standard streams on /dev/null.

    Otherwise a pipe of ours would get their number, and print would fail.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free; processes need it too
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123


def flush(stream: IO[str]) -> None:
    """Write what was printed.

    Raises:
        OSError: It can't be written.
    """
    if not stream.closed:
        stream.flush()


def is_lost(stream: IO[str]) -> bool:
    """Return whether what is printed can't be written, or not any more."""
    try:
        stream.write("\n")
        flush(stream)
    except OSError:
        return True
    return False


def silence(stream: IO[str]) -> None:
    """Redirect unwritten output to nowhere, before Python reports it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
