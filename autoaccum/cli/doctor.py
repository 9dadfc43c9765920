"""`autoaccum doctor`."""

from __future__ import annotations

import typer


def doctor(json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Print what a bug report needs: versions, devices, limits, settings."""
    from ..child import call
    from ..doctor import host_facts
    from ..errors import AutoaccumError

    facts = host_facts()
    try:
        facts |= call("doctor", {})
    except AutoaccumError as error:  # that torch doesn't load is what a report is about
        facts["torch"] = f"does not load: {error.what}"
    if json:
        import json as encoder

        print(encoder.dumps(facts, indent=2))
        return
    width = max(len(name) for name in facts) + 2
    for name, value in facts.items():
        print(f"{name:{width}}{value}")
