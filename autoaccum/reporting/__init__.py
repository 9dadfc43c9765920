"""Turn a plan into text, HTML, Markdown, CSV or JSON. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..plan import Plan

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".html", ".md", ".csv", ".json")


def frames(plan: Plan) -> dict[str, pd.DataFrame]:
    """Return the plan's figures as pandas frames, described at `data.frames`."""
    from . import data

    return data.frames(plan)


def render(plan: Plan, suffix: str = ".html") -> str:
    """Return the report's text.

    Args:
        plan: Any plan.
        suffix: ".html", ".md", ".csv" or ".json".

    Raises:
        UsageError: The suffix is none of these.
    """
    return _renderer(suffix)(plan)


def write(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the report atomically, in the format that the file's suffix selects.

    Raises:
        UsageError: The suffix is none of `SUFFIXES`, or the file cannot be written.
    """
    from ..files.whole import write_whole

    write_whole(path, render(plan, check_suffix(path)).encode())


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return the path's suffix, in lower case.

    Raises:
        UsageError: It is none of `SUFFIXES`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"{os.fspath(path)!r} doesn't end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.",
            "The file's suffix selects the report's format.",
            "autoaccum report plan.json -o report.html",
        )
    return suffix


def _renderer(suffix: str) -> Callable[[Plan], str]:
    check_suffix(f"report{suffix}")
    if suffix == ".html":
        from . import page

        return page.render
    if suffix == ".md":
        from . import markdown

        return markdown.render
    from . import tables

    return tables.as_csv if suffix == ".csv" else tables.as_json
