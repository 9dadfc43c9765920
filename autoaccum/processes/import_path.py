"""Import modules never from the current folder.

A `random.py` there would otherwise be what torch gets for `import random`. Only the folder of a workload's file becomes
importable, in the process that loads it, and after everything that is installed: its modules never stand in for others.
Imported before anything else of autoaccum's, so it imports nothing that Python hasn't loaded by itself; `__future__`
isn't either.
"""

import os
import sys

TYPE_CHECKING = False  # typing isn't loaded yet
if TYPE_CHECKING:
    from typing import Any

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 2))  # noqa: PTH100, PTH118, PTH120  pathlib isn't loaded yet


def leave_current_folder() -> None:
    """Drop the current folder, which `python -m autoaccum` puts first.

    A no-op for every other way to come here: the `autoaccum` script, a program of the user's, `python -P`.
    """
    if sys.flags.safe_path or module_run().partition(".")[0] != "autoaccum":
        return
    first = sys.path.pop(0)
    if first == ROOT:  # a checkout: behind the standard library it does no harm
        sys.path.append(first)


def module_run() -> str:
    """Return the module that `python -m` will run, or "".

    Empty where it runs something else, or has begun.
    """
    if sys.argv[:1] != ["-m"]:
        return ""
    words = sys.orig_argv
    return next((after if word == "-m" else word[2:] for word, after in _pairs(words) if word.startswith("-m")), "")


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[1:], [*words[2:], ""], strict=False))


def add_folders(folders: list[str]) -> None:
    """Make modules of the user's folders importable in this process.

    They come last: a name that the standard library or an installed package has stays theirs, also where this
    platform's lacks it (colorama tries `import msvcrt` everywhere). They stay, since a workload imports more while it
    trains, and a loader's processes import it anew.
    """
    for folder in map(os.path.abspath, folders):
        if folder not in sys.path:
            _finder(folder)
            sys.path.append(folder)


class _UsersFolder:
    """Find a folder's modules, except under the standard library's names."""

    def __init__(self, finder: "Any") -> None:
        self._finder = finder

    def find_spec(self, name: str, target: "Any" = None) -> "Any":
        """Return the module's spec, or None."""
        return None if name in sys.stdlib_module_names else self._finder.find_spec(name, target)

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._finder, name)


def _finder(folder: str) -> None:
    """Put a finder for the folder where Python looks for one (importlib.machinery.PathFinder)."""
    for hook in sys.path_hooks:
        try:
            sys.path_importer_cache[folder] = _UsersFolder(hook(folder))
            return
        except ImportError:
            continue
