"""`autoaccum report`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from ..errors import UsageError


def report(
    plan: Path = typer.Argument(help="A plan file."),
    output: Path = typer.Option(
        None, "--output", "-o", help="Where to write it: .html, .md, .csv or .json. Left out: Markdown on stdout."
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite the file."),
) -> None:
    """Make a page, or tables, of a plan. Needs no model and no GPU."""
    from ..plan import Plan
    from ..report import check_suffix, render, write

    if output is not None:
        check_suffix(output)
        if output.exists() and not force:
            raise UsageError(f"{output} exists already.", hint="Name another file, or add --force to overwrite it.")
        if not output.parent.is_dir():
            raise UsageError(f"There is no folder {output.parent}.", hint="Make it first, or name another file.")
    read = Plan.load(plan)
    if output is None:
        print(render(read, ".md"), end="")
        return
    write(read, output)
    print(f"wrote {output}", file=sys.stderr)
