"""Find the user's line that an error comes from, and explain it.

An error in a workload is raised deep within a library as often as in the workload's file. The line that helps is the
last one of the user's: neither autoaccum's, nor Python's, nor an installed package's.
"""

from __future__ import annotations

import errno
import os
import resource
import sysconfig
import traceback
from collections.abc import Iterator

from ..units import show_bytes
from .import_path import ROOT

_OURS = os.path.join(ROOT, "autoaccum") + os.sep  # noqa: PTH118  as frames name files, not as the system does
_INSTALLED = tuple({sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_NO_ROOM = ("failed to map segment", "cannot allocate memory", "can't start new thread", "failed to create thread")
OWN_NOTE = "autoaccum: "  # begins what planning adds to an error of the user's
SHOW_ALL = "The same command with --traceback shows all of it."


def explained(error: BaseException) -> tuple[str, str, str]:
    """Explain an error that isn't autoaccum's: what, where, and the fix."""
    own, raised = _places(error)
    where = f"at {own}" if own else f"at {raised}" if raised else ""
    if own and raised and own != raised:
        where += f", from where {raised} was reached"
    if isinstance(error, SystemExit):
        code = "" if error.code is None else repr(error.code)
        return (
            f"The workload's code ended the process: sys.exit({code}).",
            f"Called {where}." if where else "",
            "Raise an exception there, or leave it out: the file is imported and its function called.",
        )
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}", f"In {error.filename}:{error.lineno}.", "Mend that line."
    short = _lacks_room(error)
    if short is not None:
        return f"{_named(error)}", f"Raised {where}. {short[0]}", short[1]
    return _named(error), f"Raised {where}." if where else "", _hint(error)


def text_of(error: BaseException) -> str:
    """Return the first line of an error's text, even if str() fails."""
    try:
        return (str(error).strip().splitlines() or [""])[0]
    except BaseException as failure:
        if isinstance(failure, KeyboardInterrupt):
            raise
        return f"(its text can't be shown: asking for it raised {type(failure).__name__})"


def _named(error: BaseException) -> str:
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _hint(error: BaseException) -> str:
    if isinstance(error, ImportError) and "relative import" in text_of(error):
        return (
            "The file is loaded by itself, not as a part of a package: write `import name` or `from name import ...`."
        )
    if own := [note for note in getattr(error, "__notes__", ()) if note.startswith(OWN_NOTE)]:
        text = own[-1].removeprefix(OWN_NOTE)
        return f"{text[:1].upper()}{text[1:]} {SHOW_ALL}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"Install {error.name.partition('.')[0]} in this environment, or put it beside the workload's file."
    return SHOW_ALL


def _lacks_room(error: BaseException) -> tuple[str, str] | None:
    """Explain a library or thread that couldn't load for lack of memory."""
    text = text_of(error).lower()
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full:
        file = getattr(error, "filename", None)
        name = f" for {file}" if file else ""
        return f"The disk has no room{name}.", "Make room there, or name another folder."
    if not any(part in text for part in _NO_ROOM) and not isinstance(error, MemoryError):
        return None
    limits = list(_limits())
    if not limits:
        return "The machine's memory is used up.", "End what else uses it."
    return (
        f"This process is limited to {' and '.join(limits)}.",
        "Raise that limit: torch alone takes about 4 GiB of ulimit -v.",
    )


def _limits() -> Iterator[str]:
    for name, limit in (("ulimit -v", resource.RLIMIT_AS), ("ulimit -d", resource.RLIMIT_DATA)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield f"{show_bytes(soft)} ({name})"


def _places(error: BaseException) -> tuple[str, str]:
    """Return the user's last line and the raising line; "" for none."""
    frames = traceback.extract_tb(error.__traceback__)
    named = [f"{frame.filename}:{frame.lineno}" for frame in frames]
    own = [place for frame, place in zip(frames, named, strict=True) if _is_the_users(frame.filename)]
    return own[-1] if own else "", named[-1] if named else ""


def _is_the_users(file: str) -> bool:
    return not file.startswith(("<", _OURS, *_INSTALLED))
