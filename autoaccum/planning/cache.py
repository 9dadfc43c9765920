"""Keep answers, and find them by their question. No torch here.

An entry is a JSON file in a folder that only this user may enter, named for its key: a digest of all that the answer
depends on and that is known before it is computed. It lists the files that were read until the answer was there, with
their stamps: one that has changed since makes the entry useless. An entry that is damaged, another user's, or of
another form counts as none. Nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import private, stamps
from ..files.whole import write_whole

log = logging.getLogger("autoaccum")

SWITCH = "AUTOACCUM_PLAN_CACHE"  # "0" switches the cache off
REPLAYED = "replayed"  # the method of plans that hold for their question, not for one machine at one time
OFF, USE, REFRESH = "off", "use", "refresh"
_FORM = 1
_MOST_BYTES = 64 << 20
_MOST_ENTRIES = 64
_STALE_SECONDS = 3600.0  # what was begun so long ago and not renamed was left by a killed process
# What differs from call to call, from terminal to terminal, and that no training depends on.
_PASSING = frozenset(
    """
    _ PWD OLDPWD SHLVL TERM TERMINFO COLUMNS LINES NO_COLOR FORCE_COLOR COLORTERM PS1 PS2 PROMPT_COMMAND LS_COLORS
    PAGER EDITOR VISUAL HISTFILE DISPLAY WAYLAND_DISPLAY XAUTHORITY WINDOWID STY INVOCATION_ID JOURNAL_STREAM MANPATH
    DBUS_SESSION_BUS_ADDRESS PYTEST_CURRENT_TEST PYTEST_VERSION MAIL GPG_AGENT_INFO
    """.split()  # noqa: SIM905  # a list of words
)
_PASSING_PREFIXES = (
    "SSH_", "TMUX", "XDG_", "TERM_", "VTE_", "KITTY_", "GNOME_", "KDE_", "VSCODE_", "DESKTOP_", "LESS", "PYTEST_XDIST_",
    "BASH_FUNC_",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """An answer that was kept.

    Attributes:
        answer: The answer, JSON.
        made: When it was computed, like "2026-11-28 12:40".
    """

    answer: dict[str, Any]
    made: str

    @property
    def origin(self) -> str:
        """Where it comes from, and how to get a new one."""
        return f"on {self.made}, kept since then; --refresh plans anew"


def mode_of(*, refresh: bool) -> str:
    """Return whether answers are used, made anew, or neither."""
    if os.environ.get(SWITCH) == "0":
        return OFF
    return REFRESH if refresh else USE


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the key of JSON values, by their names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def look_up(key: str) -> Entry | None:
    """Return the whole entry of a key, or None."""
    path = _path(key)
    if path is None:
        return None
    try:
        private.check_own(path)
        if path.stat().st_size > _MOST_BYTES:
            return None
        entry = json.loads(path.read_bytes())
        if _sum(entry["kept"]) != entry["sha256"]:
            return None
        kept = entry["kept"]
        if kept["form"] != _FORM or kept["key"] != key:
            return None
        found = Entry(dict(kept["answer"]), str(kept["made"]))
        if any(stamps.stamp(file) != stamp for file, stamp in kept["files"].items()):
            return None
    except FileNotFoundError:
        return None
    except UsageError as error:
        log.warning("A kept plan is left alone: %s", error.what)
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        log.debug("a kept plan can't be read", exc_info=True)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the least recently used go first
    return found


def keep(key: str, answer: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Keep an answer, whole or not at all; never fail.

    Args:
        key: Its key.
        answer: JSON.
        files: The stamps of all files that were read until it was there.
    """
    path = _path(key)
    if path is None:
        return
    made = time.strftime("%Y-%m-%d %H:%M")
    kept = {"form": _FORM, "key": key, "made": made, "files": dict(files), "answer": dict(answer)}
    try:
        _clear_the_way(path)
        write_whole(path, json.dumps({"sha256": _sum(kept), "kept": kept}).encode())
        path.chmod(0o600)
        _remove_old(path.parent)
    except (OSError, UsageError) as error:
        log.warning("The plan is not kept: %s", error.what if isinstance(error, UsageError) else error)


def surroundings() -> dict[str, Any]:
    """Return what a process's answers depend on besides its question.

    Its environment, folder, interpreter, installed packages and machine. A folder of packages changes its time when one
    is installed or removed; the versions are in the stamps of loaded files.
    """
    names = sorted(name for name in os.environ if name not in _PASSING and not name.startswith(_PASSING_PREFIXES))
    sites = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    return {
        "environment": {name: os.environ[name] for name in names},
        "folder": os.getcwd(),  # noqa: PTH109
        "python": [sys.version, sys.executable, list(sys.flags), sys.path],
        "packages": [[folder, Path(folder).stat().st_mtime_ns] for folder in sites if Path(folder).is_dir()],
        "machine": [*platform.uname(), _processor(), sorted(os.sched_getaffinity(0))],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _path(key: str) -> Path | None:
    """Return an entry's path; None where no folder is this user's alone."""
    try:
        return private.private_folder(private.cache_folder(), "autoaccum", "plans") / f"{key}.json"
    except (UsageError, OSError, RuntimeError) as error:
        _say_once(f"The plan cache is not used: {error.what if isinstance(error, UsageError) else error}")
        return None


@lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    """Warn, once for the look-up of a plan and its keeping."""
    log.warning("%s", text)


def _sum(kept: Any) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _clear_the_way(path: Path) -> None:
    """Remove an entry that isn't this user's own file: a link, say."""
    try:
        private.check_own(path)
    except FileNotFoundError:
        return
    except UsageError:
        path.unlink()


def _remove_old(folder: Path) -> None:
    """Remove all but the entries used last, and what killed processes left."""
    with contextlib.suppress(OSError):
        entries = sorted(folder.glob("*.json"), key=lambda path: path.lstat().st_mtime)
        begun = [path for path in folder.glob(".*.part") if time.time() - path.lstat().st_mtime > _STALE_SECONDS]
        for path in (*entries[:-_MOST_ENTRIES], *begun):
            path.unlink(missing_ok=True)
