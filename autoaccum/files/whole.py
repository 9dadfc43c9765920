"""Write files whole or not at all, even if killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import UsageError

_SUFFIX = ".part"
_YOUNG_SECONDS = 1.0
_OTHER = "Name another file, or make room on the disk."


@dataclass(frozen=True)
class _Place:
    """Hold where a path leads: a file, or something to write into.

    A file is written whole or not at all; a terminal or pipe is written into as it is.
    """

    path: Path
    straight: bool = False
    exists: bool = False


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse what couldn't be written after the work; leave nothing behind.

    Args:
        path: The target.
        force: Whether a file that is there may be overwritten.

    Raises:
        UsageError: It exists, its folder is missing, or it can't be written.
    """
    place = _place(path)
    if place.straight:
        if not os.access(place.path, os.W_OK):
            raise _cant_write(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), _OTHER)
        return
    if place.exists and not force:
        raise UsageError(
            f"{os.fspath(path)} exists already.", hint="Name another file, or add --force to overwrite it."
        )
    if not place.path.parent.is_dir():
        raise UsageError(
            f"There is no folder {os.fspath(Path(path).parent)}.", hint="Make it first, or name another file."
        )
    try:
        descriptor, name = tempfile.mkstemp(dir=place.path.parent, prefix=f".{place.path.name}.", suffix=_SUFFIX)
        os.close(descriptor)
        Path(name).unlink()
    except (OSError, ValueError) as error:
        raise _cant_write(path, error, "Name a folder that you may write to.") from None


def write_whole(path: str | os.PathLike[str], content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write beside the target, flush to disk, and rename in one step.

    A link is followed, and what it leads to replaced. A device or a pipe is written into.

    Args:
        path: The target.
        content: What to write, or a function that writes it into a file.

    Raises:
        UsageError: The folder is missing, the disk is full, the target is a folder, a disk or a link to nothing, or it
            can't be written for another reason of the system's. What was there before is untouched.
    """
    place = _place(path)
    if place.straight:
        _write_straight(place.path, content)
        return
    target = place.path
    try:
        _remove_leftovers(target)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=_SUFFIX)
    except (OSError, ValueError) as error:
        raise _cant_write(path, error, "Name a folder that exists and that you may write to.") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives; the kernel drops it with the process
            _put(content, file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(_mode_of(target))  # mkstemp is for secrets: 0o600 whatever the user's mask says
        Path(name).replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        if isinstance(error, OSError):
            raise _cant_write(path, error, _OTHER) from None
        raise


def _put(content: bytes | Callable[[IO[bytes]], object], file: IO[bytes]) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content)


def _write_straight(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(descriptor, "wb") as file:
            _put(content, file)
    except OSError as error:
        raise _cant_write(path, error, _OTHER) from None


def _mode_of(target: Path) -> int:
    """Return the mode of the replaced file, or a new file's."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(target.stat().st_mode) & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _place(path: str | os.PathLike[str]) -> _Place:
    """Return where a path leads, its links followed.

    Raises:
        UsageError: To a folder, a disk, a socket, or nothing; or by a link that somebody else may have planted.
    """
    given = Path(path)
    try:
        link = given.is_symlink()
        if link:
            _check_link(given)
        found = given.stat()
    except FileNotFoundError:
        if link:
            raise _refused(given, f"is a link to {str(given.readlink())!r}, which isn't there") from None
        return _Place(given)
    except (OSError, ValueError) as error:
        raise _cant_write(path, error, "Name a file that you may write to.") from None
    if stat.S_ISDIR(found.st_mode):
        raise _refused(given, "is a folder")
    if stat.S_ISBLK(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        raise _refused(given, f"is a {'disk' if stat.S_ISBLK(found.st_mode) else 'socket'}")
    if not stat.S_ISREG(found.st_mode) or _is_descriptor(given):
        return _Place(given, straight=True, exists=True)
    return _Place(given.resolve(), exists=True)


def _is_descriptor(path: Path) -> bool:
    """Return whether the path names an open file, like /dev/stdout.

    Then that file is meant, not its name.
    """
    folder = path.parent.resolve()
    return folder.is_relative_to("/proc") or (folder == Path("/dev") and path.is_symlink())


def _check_link(path: Path) -> None:
    """Refuse another user's link in a world-writable folder.

    As the kernel's protected_symlinks does.
    """
    folder, own = path.parent.stat(), path.lstat().st_uid
    everybodys = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
    if everybodys and own not in (os.geteuid(), folder.st_uid):
        raise _refused(path, "is another user's link in a folder where everybody may make one")


def _refused(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{str(path)!r} can't be written: it {what}.",
        "A file there is written whole or not at all, and nothing else is replaced.",
        "Name a file.",
    )


def _remove_leftovers(target: Path) -> None:
    """Remove files that killed writers left behind.

    Their locks ended with them.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = os.fstat(descriptor)
                is_old = time.time() - found.st_mtime > _YOUNG_SECONDS  # or its writer may be about to lock it
                if stat.S_ISREG(found.st_mode) and is_old:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
            finally:
                os.close(descriptor)


def _cant_write(target: str | os.PathLike[str], error: OSError | ValueError, hint: str) -> UsageError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UsageError(f"{os.fspath(target)!r} can't be written.", f"The system says: {why}.", hint)
