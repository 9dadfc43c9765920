"""`python -m autoaccum`, and the `autoaccum` command."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command, with signals handled before any other import."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    from .processes import interrupts, standard_streams

    interrupts.watch(end_if_dropped=True)
    standard_streams.open_missing()
    try:
        from .cli import main as command

        command()
    except interrupts.Interrupted as error:
        interrupts.end_now(error.number)


def _end(number: int, frame: object) -> None:
    """End a process that has done nothing yet, before `interrupts` is imported."""
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)


if __name__ == "__main__":
    main()
