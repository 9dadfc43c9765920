"""Implement `autoaccum report`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer


def report(
    plan: Path = typer.Argument(help="A plan file."),
    output: Path = typer.Option(
        None, "--output", "-o", help="File to write: .html, .md, .csv or .json. Left out: Markdown on stdout."
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite the file."),
) -> None:
    """Write a report on a plan: a page or tables.

    Needs no model and no GPU.
    """
    from ..files.whole import check_output
    from ..plan import Plan
    from ..reporting import check_suffix, render, write

    if output is not None:
        check_suffix(output)
        check_output(output, force=force)
    read = Plan.load(plan)
    if output is None:
        print(render(read, ".md"), end="")
        return
    write(read, output)
    print(f"wrote {output}", file=sys.stderr)
