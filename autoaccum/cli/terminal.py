"""What every command shows alike: errors, and progress on a terminal's stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AutoaccumError, UsageError
from ..files.escape import lines, one_line
from ..processes.child import Say

if TYPE_CHECKING:
    from ..plan import Plan


def show_error(error: AutoaccumError, *, with_traceback: bool) -> None:
    """Three lines on stderr: what happened, why, what to do next."""
    if with_traceback:
        import traceback

        notes = getattr(error, "__notes__", []) or traceback.format_exception(error)
        print(*(lines(note.rstrip("\n")) for note in notes), sep="\n", file=sys.stderr)
    # Only `why` may have several lines, like what a compiler said; each is set in, so that none looks like ours
    parts = [one_line(error.what), *lines(error.why).split("\n"), one_line(error.hint)]
    first, *others = [part for part in parts if part]
    print("error: " + first, *others, sep="\n  ", file=sys.stderr)


def keep_plan(plan: Plan, output: Path) -> None:
    """Writes a plan's file; where that fails after all, prints it, so that what was found isn't lost.

    Raises:
        UsageError: The file can't be written.
    """
    try:
        plan.save(output)
    except UsageError as error:
        print(plan.to_json(), end="", flush=True)
        raise UsageError(error.what, error.why, f"The plan is on stdout, whole: keep it. {error.hint}") from error
    print(f"wrote {output}", file=sys.stderr)


@contextmanager
def progress(title: str) -> Iterator[Say]:
    """Shows what a child process says, with the seconds so far; nothing where stderr isn't a terminal."""
    if not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.console import Console
    from rich.markup import escape

    started = time.monotonic()
    with Console(stderr=True).status(title) as status:

        def say(message: dict[str, Any]) -> None:
            if "say" in message:
                told = f"{title}: {one_line(message['say'])} ({time.monotonic() - started:.0f} s)"
                status.update(escape(told))

        yield say
