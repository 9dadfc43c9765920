"""Implement `autoaccum export`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from ..errors import UsageError
from .completion import choices

_TARGETS = ("hf", "accelerate", "lightning", "deepspeed", "torchtitan", "env", "json")
_MOST_BYTES = 1 << 24


def export(
    plan: Path = typer.Argument(help="A plan file."),
    to: str = typer.Option(..., "--to", help=f"One of: {', '.join(_TARGETS)}.", autocompletion=choices(*_TARGETS)),
    merge: Path = typer.Option(None, help="For deepspeed: a configuration file to set the numbers in."),
    output: Path = typer.Option(None, "--output", "-o", help="File to write. Left out: stdout."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file."),
) -> None:
    """Print a plan's numbers as another trainer reads them.

    Needs no model. Remarks go to stderr.
    """
    from ..files.escape import one_line
    from ..files.whole import check_output, write_whole
    from ..plan import Plan
    from ..reporting.exports.targets import TARGETS
    from ..reporting.exports.targets import export as write

    if to not in TARGETS:
        raise UsageError(f"--to {to} is not known.", hint=f"Give one of: {', '.join(TARGETS)}.")
    if merge is not None and to != "deepspeed":
        raise UsageError("--merge is for --to deepspeed.", hint="Leave it out, and copy the printed values.")
    if output is not None:
        check_output(output, force=force)
    read = Plan.load(plan)
    made = write(read, to)
    text = made.text if merge is None else _merged(read, merge)
    for remark in made.remarks:
        print(f"note: {one_line(remark)}", file=sys.stderr)
    if output is None:
        print(text, end="")
        return
    write_whole(output, text.encode())
    print(f"wrote {output}", file=sys.stderr)


def _merged(plan: object, path: Path) -> str:
    """Return a DeepSpeed configuration with a plan's numbers set."""
    from ..plan import Plan
    from ..reporting.exports.equal_steps import equal_steps
    from ..reporting.exports.json_merge import merge
    from ..reporting.exports.targets import deepspeed_values

    assert isinstance(plan, Plan)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is longer than {_MOST_BYTES:,} bytes")
        text = content.decode()
    except (OSError, ValueError) as error:
        why = f"The system says: {error.strerror}." if isinstance(error, OSError) else f"It is no JSON: {error}."
        raise UsageError(f"{str(path)!r} cannot be read.", why, "Name DeepSpeed's configuration file.") from None
    return merge(text, deepspeed_values(equal_steps(plan)), source=str(path))
