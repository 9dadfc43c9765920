"""Handle SIGINT and SIGTERM before `interrupts` is loaded.

Nothing has begun yet, so they end the command immediately.

The first thing that the command does. What is left before it is Python's own start, some 20 ms. Nothing is imported
that Python hasn't loaded by itself (see `import_path`): `signal` would load `enum`, so it is the built-in `_signal`.
"""

import _signal  # type: ignore[import-not-found]
import os
import sys

from .import_path import module_run


def end_at_once() -> None:
    """Let both signals end this process, if it is `autoaccum`.

    A user's program is left alone.
    """
    if module_run() == "autoaccum" or os.path.basename(sys.argv[0]) == "autoaccum":  # noqa: PTH119  pathlib isn't loaded
        for number in (_signal.SIGINT, _signal.SIGTERM):
            _signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)
