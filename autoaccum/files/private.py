"""Folders and files that only this user can write to.

The cache of compiled code, and locks.

What is loaded into a process, or locked by it, must be this user's own. So it lies in folders of mode 0700, and a link,
another owner or a mode that lets others write is refused; nobody's wrong folder is quietly mended or used.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import UsageError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def cache_folder() -> Path:
    """Return the user's cache folder, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()


def private_folder(root: Path, *names: str) -> Path:
    """Make nested folders that only this user may enter.

    Args:
        root: The folder that they are in: any that others can't write into.
        *names: Theirs.

    Raises:
        UsageError: One can't be made, or is a link or another user's; or others could replace it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        place = root.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise _cant_keep(root, error) from None
    _check_above(root, place)
    for name in names:
        place = place / name
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            check_own(place, is_folder=True)
            if place.lstat().st_mode & _OTHERS:
                place.chmod(0o700)
        except OSError as error:
            raise _cant_keep(place, error) from None
    return place


def check_own(path: Path, *, is_folder: bool = False) -> None:
    """Refuse what isn't this user's own file or folder.

    Raises:
        UsageError: It is a link, another user's, or others may write to it.
        OSError: It isn't there.
    """
    found = path.lstat()
    is_kind = stat.S_ISDIR(found.st_mode) if is_folder else stat.S_ISREG(found.st_mode)
    if not is_kind:
        raise _not_own(path, f"is no {'folder' if is_folder else 'file'}, but {_kind(found.st_mode)}")
    if found.st_uid != os.geteuid():
        raise _not_own(path, f"belongs to {_user(found.st_uid)}, and this process is {_user(os.geteuid())}'s")
    if found.st_mode & _OTHERS_WRITE:
        raise _not_own(path, f"has the mode {stat.S_IMODE(found.st_mode):04o}, so others can write to it")


def _check_above(root: Path, resolved: Path) -> None:
    """Refuse a place where another user could put a folder instead.

    Of links on the way there the owner counts, of the folders that they lead to owner and mode. A folder that others
    may write to will do where its sticky bit keeps them from what isn't theirs (/tmp), or where only the user's own
    group may (a home under the umask 002).
    """
    trusted = (0, os.geteuid())
    for folder in (root, *root.parents):
        found = folder.lstat()
        if stat.S_ISLNK(found.st_mode) and found.st_uid not in trusted:
            raise _not_own(folder, f"is a link of {_user(found.st_uid)}'s")
    for folder in (resolved, *resolved.parents):
        found = folder.lstat()
        if found.st_uid not in trusted:
            raise _not_own(folder, f"belongs to {_user(found.st_uid)}")
        writers = found.st_mode & _OTHERS_WRITE
        if writers == stat.S_IWGRP and _is_own_group(found.st_gid):
            continue
        if writers and not found.st_mode & stat.S_ISVTX:
            raise _not_own(
                folder, f"has the mode {stat.S_IMODE(found.st_mode):04o}, so others can replace what is in it"
            )


def _is_own_group(number: int) -> bool:
    try:
        return grp.getgrgid(number).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


def runtime_folder() -> Path:
    """Return a folder for locks.

    The user's runtime folder (XDG Base Directory), else one in the cache, else one in /tmp.

    Raises:
        UsageError: None of these can be used.
    """
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    if named.startswith("/"):
        with contextlib.suppress(OSError, UsageError):
            folder = Path(named)
            check_own(folder, is_folder=True)
            if not folder.lstat().st_mode & _OTHERS and os.access(folder, os.W_OK):
                return folder
    with contextlib.suppress(UsageError):  # a home that can't be written, say
        return private_folder(cache_folder(), "autoaccum", "run")
    return private_folder(Path(tempfile.gettempdir()), f"autoaccum-{os.geteuid()}")


@contextlib.contextmanager
def lock_file(path: Path, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Open a lock file, creating it if necessary; never follow a link.

    Raises:
        UsageError: It is a link or no file, or can't be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        why = "it is a link" if path.is_symlink() else f"the system says: {error.strerror}"
        raise _no_lock(path, why) from None
    try:
        found = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(found):
            raise _no_lock(path, f"it is {_kind(found)}")
        with os.fdopen(descriptor, "r+b", buffering=0, closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISREG, "a file"), (stat.S_ISFIFO, "a FIFO"))
    return next((name for test, name in kinds if test(mode)), "a device or a socket")


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _not_own(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{str(path)!r} {what}.",
        "Whoever can write there could have this process run their code, or keep it waiting.",
        "See who made it, then remove it or take others' rights away (chmod go-w); or name another: XDG_CACHE_HOME=DIR",
    )


def _cant_keep(path: Path, error: OSError | RuntimeError) -> UsageError:
    return UsageError(
        f"The cache can't be kept in {str(path)!r}: {getattr(error, 'strerror', None) or error}.",
        "The user's cache holds what is compiled once, and locks.",
        "Name a folder that can be written: XDG_CACHE_HOME=DIR",
    )


def _no_lock(path: Path, why: str) -> UsageError:
    return UsageError(
        f"The lock {str(path)!r} can't be used: {why}.",
        "While something is timed, no other tuning may time anything.",
        "Remove it if nobody needs it." if os.path.lexists(path) else "Name a folder that can be written.",
    )
