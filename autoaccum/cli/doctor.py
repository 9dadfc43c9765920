"""Implement `autoaccum doctor`."""

from __future__ import annotations

import typer

from ..files.escape import one_line
from ..files.json_text import to_json


def doctor(
    json: bool = typer.Option(False, "--json", help="Print JSON."),
    gpus: bool = typer.Option(
        False, "--gpus", help="List the GPUs that --gpu accepts, with the sources of their figures."
    ),
) -> None:
    """Print what a bug report needs: versions, devices, limits, settings."""
    if gpus:
        _list_gpus(json)
        return
    from ..errors import AutoaccumError
    from ..planning.environment import host_facts
    from ..processes.child import call

    facts = host_facts()
    try:
        facts |= call("cli.tasks:doctor", {})
    except AutoaccumError as error:  # a report may be about torch failing to load
        facts["torch"] = f"does not load: {error.what}"
    if json:
        print(to_json(facts, indent=2))
        return
    width = max(len(name) for name in facts) + 2
    for name, value in facts.items():
        print(one_line(f"{name:{width}}{value}"))


def _list_gpus(json: bool) -> None:
    from ..devices.cuda.gpu_specs import GPUS, list_gpus

    if not json:
        print(list_gpus())
        return
    import dataclasses
    import json as encoder

    print(encoder.dumps([dataclasses.asdict(gpu) for gpu in GPUS], indent=2))
