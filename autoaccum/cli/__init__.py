"""Define the command line: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from ..errors import AutoaccumError
from ..processes import interrupts, standard_streams
from . import bench, check, doctor, explain, export, fits, plan, report, run, tune, virtual_gpu
from .terminal import show_error

app = typer.Typer(
    name="autoaccum",
    help=(
        "Find the fewest gradient accumulation steps that fit, for exactly the batch you want.\n\n"
        "autoaccum plan --target-batch 512 -o plan.json && autoaccum run plan.json"
    ),
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("plan")(plan.plan)
app.command("run")(run.run)
app.command("check")(check.check)
app.command("explain")(explain.explain)
app.command("tune")(tune.tune)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("fits")(fits.fits)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
# Options after the command to run belong to that command.
app.command("virtual-gpu", context_settings={"allow_interspersed_args": False})(virtual_gpu.virtual_gpu)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    traceback: bool = typer.Option(False, "--traceback", help="Show where an error came from."),
) -> None:
    if version:
        from .. import __version__

        print(f"autoaccum {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the `autoaccum` command and exit with its code.

    0 ok, 1 failure, 2 usage, 3 does not fit; 130 and 143 where SIGINT and SIGTERM ended it.
    """
    interrupts.watch(end_if_dropped=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name outside the terminal's encoding is printed escaped
            stream.reconfigure(errors="backslashreplace")
    with_traceback = "--traceback" in sys.argv
    # Accepted anywhere: people append it to a command that failed.
    sys.argv = [
        sys.argv[0],
        *(["--traceback"] if with_traceback else []),
        *(a for a in sys.argv[1:] if a != "--traceback"),
    ]
    try:
        # By its name, however it was started: `python -m autoaccum --install-completion` completes `autoaccum`.
        code = _code_of(lambda: app(prog_name="autoaccum"), with_traceback=with_traceback)
    except KeyboardInterrupt as error:
        interrupts.taken()
        print("interrupted", file=sys.stderr)
        code = interrupts.exit_code(getattr(error, "number", signal.SIGINT))
    sys.exit(code)


def _code_of(command: Callable[[], Any], *, with_traceback: bool) -> int:
    """Run a command, show its error, and return its exit code."""
    try:
        try:
            command()
        finally:
            standard_streams.flush(sys.stdout)
    except SystemExit as error:  # as typer ends every command
        _raise_interrupt(error)
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except AutoaccumError as error:
        show_error(error, with_traceback=with_traceback)
        return error.exit_code
    except BrokenPipeError:  # the reader closed its end, as `head` does
        standard_streams.silence(sys.stdout)
        return 1
    except Exception as error:
        lost = isinstance(error, OSError) and standard_streams.is_lost(sys.stdout)
        if lost:
            standard_streams.silence(sys.stdout)
        if with_traceback:
            raise
        if lost:
            show_error(_cant_print(error), with_traceback=False)
            return 1
        shown = AutoaccumError(
            f"{type(error).__name__}: {error}",
            "This is an error in autoaccum itself.",
            "Run it again with --traceback.",
        )
        show_error(shown, with_traceback=False)
        return 1
    return 0


def _raise_interrupt(error: BaseException | None) -> None:
    """Raise the interrupt that typer turned into an ordinary exit, if any."""
    interrupts.raise_if_received()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        error = error.__cause__ or error.__context__


def _cant_print(error: BaseException) -> AutoaccumError:
    why = getattr(error, "strerror", None) or str(error)
    return AutoaccumError(
        "The results can't be written to standard output.",
        f"The system reports: {why}.",
        "Print elsewhere, or make room on the disk; a plan goes to a file with -o plan.json.",
    )
