"""What every command shows alike: errors, and progress on a terminal's stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..child import Say
from ..errors import AutoaccumError, UsageError

if TYPE_CHECKING:
    from ..plan import Plan


def show_error(error: AutoaccumError, *, with_traceback: bool) -> None:
    """Three lines on stderr: what happened, why, what to do next."""
    if with_traceback:
        print(*getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        if not getattr(error, "__notes__", []):
            import traceback

            traceback.print_exception(error)
    lines = [line for line in (error.what, error.why, error.hint) if line]
    print("error: " + lines[0], *lines[1:], sep="\n  ", file=sys.stderr)


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

    started = time.monotonic()
    with Console(stderr=True).status(title) as status:

        def say(message: dict[str, Any]) -> None:
            if "say" in message:
                status.update(f"{title}: {message['say']} ({time.monotonic() - started:.0f} s)")

        yield say
