"""Files that are whole or not there at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .errors import UsageError

_SUFFIX = ".part"
_YOUNG_SECONDS = 1.0


def write_whole(path: str | os.PathLike[str], content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Writes beside the target, flushes to the disk, then takes its place in one step.

    Args:
        path: The target.
        content: What to write, or a function that writes it into a file.

    Raises:
        UsageError: The folder is missing, the disk is full, the target is a folder, or it can't be written for another
            reason of the system's. What was there before is untouched.
    """
    target = Path(path)
    try:
        _remove_leftovers(target)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=_SUFFIX)
    except (OSError, ValueError) as error:
        raise _cant_write(target, error, "Name a folder that exists and that you may write to.") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives; the kernel drops it with the process
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)  # mkstemp is for secrets: 0o600 whatever the user's mask says
        Path(name).replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        if isinstance(error, OSError):
            raise _cant_write(target, error, "Name another file, or make room on the disk.") from None
        raise


def _remove_leftovers(target: Path) -> None:
    """Removes what writers of this file left behind that were killed: their lock went with them."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_SUFFIX}"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            if time.time() - left.stat().st_mtime > _YOUNG_SECONDS:  # or its writer may be about to lock it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def _cant_write(target: Path, error: OSError | ValueError, hint: str) -> UsageError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UsageError(f"{str(target)!r} can't be written.", f"The system says: {why}.", hint)
