"""Functions of the user's own, handed from one process to another that it starts: pickled, through a pipe.

Unpickling runs whatever the bytes say, so nothing else reaches it: no file, option or environment variable has a form
that means "a function that was handed over". In arguments, None stands for the workload's function.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from .import_path import add_folders

_received = b""


@dataclass(frozen=True)
class Functions:
    """What can be handed over.

    Attributes:
        workload: Makes the workload; None where that has a name.
        extra: How choices of a search space are applied, by name.
    """

    workload: Callable[[], Any] | None = None
    extra: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)


def pickled(functions: Functions) -> bytes:
    """The functions as another process can be given them; no bytes for none.

    Raises:
        UsageError: One can't be pickled: a lambda, or a function within another.
    """
    if functions == Functions():
        return b""
    named = {"The workload's function": functions.workload, **{f"extra[{k!r}]": v for k, v in functions.extra.items()}}
    for name, function in named.items():
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"{name} can't be given to another process: {error}.",
                "It is called there, so that nothing of yours is changed here.",
                "Give a function that stands by itself in a module, or FILE.py:FUNCTION.",
            ) from None
    # By themselves, so that their modules can be found before they are asked for
    return pickle.dumps((sys.path, pickle.dumps((functions.workload, dict(functions.extra)))))


def send(content: bytes, descriptor: int) -> None:
    """Writes them into a pipe and closes it, in a thread: the reader may not be there yet."""

    def write() -> None:
        try:
            with os.fdopen(descriptor, "wb") as pipe:
                pipe.write(len(content).to_bytes(8, "little") + content)
        except OSError:
            pass  # the reader died: how is said elsewhere

    threading.Thread(target=write, daemon=True).start()


def receive(descriptor: int) -> None:
    """Keeps what this process is handed; nothing is unpickled before it is asked for."""
    global _received
    with os.fdopen(descriptor, "rb") as pipe:
        _received = pipe.read(int.from_bytes(pipe.read(8), "little"))


def to_hand_on() -> bytes:
    """What this process was handed, for one that it starts itself."""
    return _received


def functions() -> Functions:
    """What this process was handed."""
    if not _received:
        return Functions()
    folders, content = pickle.loads(_received)
    add_folders(folders)
    workload, extra = pickle.loads(content)
    return Functions(workload, extra)
