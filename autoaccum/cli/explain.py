"""Implement `autoaccum explain`."""

from __future__ import annotations

from pathlib import Path

import typer

from .flags import in_flags


def explain(
    plan: Path = typer.Argument(help="A plan file."),
    json: bool = typer.Option(False, "--json", help="Print the plan's JSON alone."),
) -> None:
    """Explain how each number of a plan was derived.

    Needs no model.
    """
    from ..plan import Plan

    read = Plan.load(plan)
    print(read.to_json() if json else in_flags(read.explain()), end="" if json else "\n")
