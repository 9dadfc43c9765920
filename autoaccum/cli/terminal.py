"""What every command shows alike: errors, and progress on a terminal's stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..child import Say
from ..errors import AutoaccumError


def show_error(error: AutoaccumError, *, with_traceback: bool) -> None:
    """Three lines on stderr: what happened, why, what to do next."""
    if with_traceback:
        print(*getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        if not getattr(error, "__notes__", []):
            import traceback

            traceback.print_exception(error)
    lines = [line for line in (error.what, error.why, error.hint) if line]
    print("error: " + lines[0], *lines[1:], sep="\n  ", file=sys.stderr)


@contextmanager
def progress(title: str) -> Iterator[Say]:
    """Shows what a child process says, with the seconds so far; nothing where stderr isn't a terminal."""
    if not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.console import Console

    started = time.monotonic()
    with Console(stderr=True).status(title) as status:

        def say(message: dict[str, Any]) -> None:
            if "say" in message:
                status.update(f"{title}: {message['say']} ({time.monotonic() - started:.0f} s)")

        yield say
