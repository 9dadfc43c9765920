"""`python -m autoaccum`, and the `autoaccum` command."""

from __future__ import annotations

from .processes import interrupts, standard_streams


def main() -> None:
    """The command, with signals handled before anything else is imported."""
    interrupts.watch(end_if_dropped=True)
    standard_streams.open_missing()
    try:
        from .cli import main as command

        command()
    except interrupts.Interrupted as error:
        interrupts.end_now(error.number)


if __name__ == "__main__":
    main()
