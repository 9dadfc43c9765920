"""Pass the workload's function to a child process: pickled, through a pipe.

Unpickling runs whatever the bytes say, so nothing else reaches it: no file, option or environment variable has a form
that means "a function that was handed over". In arguments, None stands for the workload's function.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from .import_path import add_folders

_received = b""


def pickled(function: Callable[[], Any] | None) -> bytes:
    """Pickle the workload's function for another process; no bytes for None.

    Raises:
        UsageError: It can't be pickled, as a lambda or a function within another.
    """
    if function is None:
        return b""
    try:
        content = pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"The workload's function can't be given to another process: {error}.",
            "Other processes call it, so that this one stays unchanged.",
            "Give a function at the top level of a module, or FILE.py:FUNCTION.",
        ) from None
    return pickle.dumps((sys.path, content))  # the path first, so that the function's module can be found


def send(content: bytes, descriptor: int) -> None:
    """Write them into a pipe and close it, in a thread.

    The reader may not be there yet.
    """

    def write() -> None:
        try:
            with os.fdopen(descriptor, "wb") as pipe:
                pipe.write(len(content).to_bytes(8, "little") + content)
        except OSError:
            pass  # the reader died: how is said elsewhere

    threading.Thread(target=write, daemon=True).start()


def receive(descriptor: int) -> None:
    """Keep what this process is handed.

    Nothing is unpickled before it is asked for.
    """
    global _received
    with os.fdopen(descriptor, "rb") as pipe:
        _received = pipe.read(int.from_bytes(pipe.read(8), "little"))


def to_hand_on() -> bytes:
    """What this process was handed, for one that it starts itself."""
    return _received


def workload_function() -> Callable[[], Any] | None:
    """Return the function that this process was given, or None."""
    if not _received:
        return None
    folders, content = pickle.loads(_received)
    add_folders(folders)
    function: Callable[[], Any] = pickle.loads(content)
    return function
