"""Stamp the files that a process has read, to notice a change.

A stamp is the SHA-256 of a small file, and size, number and times of a large or an installed one: torch and what it
loads have thousands of files, which `pip` replaces and nobody edits unnoticed by their times.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

_SMALL_BYTES = 1 << 20
_PASSING = ("/proc/", "/sys/", "/dev/", "/run/")  # the kernel's and other processes' state
_INSTALLED = tuple({sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class OpenedFiles:
    """Notes the files that this process opens for reading, from `watch` on.

    By an audit hook (PEP 578), which sees `open` and `os.open` of all Python code, and no file that native code opens
    by itself. No hook can be removed, so this is for processes that end with their task.
    """

    def __init__(self) -> None:
        self._paths: dict[str, None] = {}

    def watch(self) -> None:
        """Note files from now on."""
        sys.addaudithook(self._note)

    def paths(self) -> set[str]:
        """Return the files so far, without modules' compiled code."""
        found = {os.path.realpath(path) for path in self._paths}
        return {path for path in found if not path.endswith(".pyc") and not path.startswith(_PASSING)}

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, _, flags = arguments
        if isinstance(path, (str, bytes)) and flags & os.O_ACCMODE != os.O_WRONLY:
            self._paths[os.path.abspath(os.fsdecode(path))] = None  # noqa: PTH100  # a Path takes ten times as long


def loaded_files() -> set[str]:
    """Return the files of this process's modules and native libraries."""
    found = set()
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            file = object.__getattribute__(module, "__dict__").get("__file__")  # a lazy module imports when asked
            if isinstance(file, str):
                found.add(file)
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        mapped = []
    rows = (line.split(maxsplit=5) for line in mapped)
    return found | {row[5] for row in rows if len(row) == 6 and "x" in row[1] and row[5].startswith("/")}


def stamps(paths: Iterable[str]) -> dict[str, str]:
    """Return the stamps of those files that exist, sorted."""
    found = {path: stamp(path) for path in sorted(paths)}
    return {path: each for path, each in found.items() if each}


def stamp(path: str) -> str:
    """Return what tells a file from a changed one, or ""."""
    try:
        about = os.stat(path)  # noqa: PTH116  # thousands of them
        if not stat.S_ISREG(about.st_mode):
            return ""
        if about.st_size <= _SMALL_BYTES and not path.startswith(_INSTALLED):
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return ""
    return f"{about.st_size} {about.st_ino} {about.st_mtime_ns} {about.st_ctime_ns}"
