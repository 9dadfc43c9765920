"""The command line: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys

import typer

from ..errors import AutoaccumError
from . import bench, check, doctor, explain, plan, report, run, tune
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
    """The `autoaccum` command. Exit codes: 0 ok, 1 failure, 2 usage, 3 does not fit, 130 interrupted."""
    with_traceback = "--traceback" in sys.argv
    # As a global option it may stand anywhere: it is what people add at the end of a command that failed.
    sys.argv = [
        sys.argv[0],
        *(["--traceback"] if with_traceback else []),
        *(a for a in sys.argv[1:] if a != "--traceback"),
    ]
    try:
        app()
    except AutoaccumError as error:
        show_error(error, with_traceback=with_traceback)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if with_traceback:
            raise
        told = AutoaccumError(
            f"{type(error).__name__}: {error}", "That is an error of autoaccum's own.", "Run it again with --traceback."
        )
        show_error(told, with_traceback=False)
        sys.exit(1)
