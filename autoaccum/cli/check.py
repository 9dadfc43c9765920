"""Implement `autoaccum check`."""

from __future__ import annotations

import typer

from ..devices.cpu import page_cache
from ..files.escape import one_line
from ..files.json_text import to_json
from ..processes.examples import BUILT_IN, DEFAULT
from ..processes.launch import launched_rank
from .completion import workloads


def check(
    workload: str = typer.Option(
        DEFAULT, help=f"FILE.py:FUNCTION, or one of: {', '.join(BUILT_IN)}.", autocompletion=workloads
    ),
    json: bool = typer.Option(False, "--json", help="Print the verdict as JSON only."),
) -> None:
    """Test whether accumulation gives the large batch's gradient.

    Exit code 1 if not, or unknown.
    """
    from ..processes.child import call
    from ..processes.workload_source import check_source
    from .terminal import progress

    check_source(workload)
    with progress("checking") as say:
        verdict = call(
            "cli.tasks:check", {"workload": workload}, on_message=say, env=page_cache.environment(page_cache.CACHED)
        )
    if launched_rank() > 0:  # the first one prints
        raise typer.Exit(0 if verdict["exact"] else 1)
    if json:
        print(to_json(verdict, indent=2))
    else:
        print(one_line(verdict["words"]))
        if verdict["error"] is not None:
            worst = one_line(verdict["worst_tensor"])
            print(
                f"{'error':<12}{verdict['error']:.2g} of the gradient (relative L2); "
                f"worst tensor {worst}: {verdict['worst_tensor_error']:.2g}"
            )
        if verdict["assumed"] is not None:
            print(f"{'assumed':<12}{one_line(verdict['assumed'])}")
        for text in verdict["advice"]:
            print(f"{'note' if verdict['exact'] else 'advice':<12}{one_line(text)}")
    if not verdict["exact"]:
        raise typer.Exit(1)
