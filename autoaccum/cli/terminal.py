"""Show errors and progress in the terminal."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import AutoaccumError, UsageError
from ..files.escape import lines, one_line
from ..processes.child import Say
from .flags import in_flags

if TYPE_CHECKING:
    from ..plan import Plan
    from ..reporting.card import Look


def show_error(error: AutoaccumError, *, with_traceback: bool) -> None:
    """Print an error on stderr: what happened, why, what to do."""
    if with_traceback:
        import traceback

        notes = getattr(error, "__notes__", []) or traceback.format_exception(error)
        print(*(lines(note.rstrip("\n")) for note in notes), sep="\n", file=sys.stderr)
    # Only `why` may have several lines, such as a compiler's output; each is indented, so that none looks like ours
    parts = [one_line(error.what), *lines(error.why).split("\n"), one_line(in_flags(error.hint))]
    first, *others = [part for part in parts if part]
    print("error: " + first, *others, sep="\n  ", file=sys.stderr)


def look_of(stream: TextIO) -> Look:
    """Return what the terminal behind a stream can show.

    Colours are left out where NO_COLOR is set (no-color.org), where TERM is dumb, and in a file or a pipe.
    """
    from ..reporting.card import Look

    is_terminal = stream.isatty()
    colours = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    try:
        "█░".encode(stream.encoding or "ascii")
        blocks = True
    except (UnicodeEncodeError, LookupError):
        blocks = False
    return Look(min(shutil.get_terminal_size().columns, 120) if is_terminal else None, colours, blocks)


def keep_plan(plan: Plan, output: Path) -> None:
    """Write a plan's file; print the plan if that fails.

    Raises:
        UsageError: The file can't be written.
    """
    try:
        plan.save(output)
    except UsageError as error:
        print(plan.to_json(), end="", flush=True)
        raise UsageError(error.what, error.why, f"The complete plan is on stdout. {error.hint}") from error
    print(f"wrote {output}", file=sys.stderr)


@contextmanager
def progress(title: str) -> Iterator[Say]:
    """Show a child process's progress and the elapsed seconds on a terminal."""
    if not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.console import Console
    from rich.markup import escape

    started = time.monotonic()
    with Console(stderr=True).status(title) as status:

        def say(message: dict[str, Any]) -> None:
            if "say" in message:
                text = f"{title}: {one_line(message['say'])} ({time.monotonic() - started:.0f} s)"
                status.update(escape(text))

        yield say
