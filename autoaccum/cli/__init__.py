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
from . import bench, check, doctor, explain, plan, report, run, tune, virtual_gpu
from .terminal import show_error

app = typer.Typer(
    name="autoaccum",
    help=(
        "The largest micro-batch that fits, and accumulation steps that add up to exactly the batch you want.\n\n"
        "autoaccum plan --target-batch 512 -o plan.json && autoaccum run plan.json"
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("plan")(plan.plan)
app.command("run")(run.run)
app.command("check")(check.check)
app.command("explain")(explain.explain)
app.command("tune")(tune.tune)
app.command("report")(report.report)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
# What stands after the command to run is that command's own.
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
    """The `autoaccum` command; ends with its exit code.

    0 ok, 1 failure, 2 usage, 3 does not fit; 130 and 143 where SIGINT and SIGTERM ended it.
    """
    interrupts.watch(end_if_dropped=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding doesn't have is no failure
            stream.reconfigure(errors="backslashreplace")
    with_traceback = "--traceback" in sys.argv
    # As a global option it may stand anywhere: it is what people add at the end of a command that failed.
    sys.argv = [
        sys.argv[0],
        *(["--traceback"] if with_traceback else []),
        *(a for a in sys.argv[1:] if a != "--traceback"),
    ]
    try:
        code = _code_of(app, with_traceback=with_traceback)
    except KeyboardInterrupt as error:
        interrupts.taken()
        print("interrupted", file=sys.stderr)
        code = interrupts.exit_code(getattr(error, "number", signal.SIGINT))
    sys.exit(code)


def _code_of(command: Callable[[], Any], *, with_traceback: bool) -> int:
    """Runs a command and shows its error, if any; its exit code."""
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
    except BrokenPipeError:  # whoever reads has enough, as `head` has
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
        told = AutoaccumError(
            f"{type(error).__name__}: {error}", "That is an error of autoaccum's own.", "Run it again with --traceback."
        )
        show_error(told, with_traceback=False)
        return 1
    return 0


def _raise_interrupt(error: BaseException | None) -> None:
    """Raises the interrupt that typer made an ordinary end of, if there was one."""
    interrupts.raise_if_received()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        error = error.__cause__ or error.__context__


def _cant_print(error: BaseException) -> AutoaccumError:
    why = getattr(error, "strerror", None) or str(error)
    return AutoaccumError(
        "The results can't be written to standard output.",
        f"The system says: {why}.",
        "Print elsewhere, or make room on the disk; a plan goes to a file with -o plan.json.",
    )
