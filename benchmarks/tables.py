"""Write rows as Markdown, as CSV, and into pages of docs/."""

from __future__ import annotations

import csv
import datetime
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
Row = dict[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """Render rows as a table with the longest row's columns."""
    heads = list(max(rows, key=len))
    lines = [heads, ["---"] * len(heads), *([str(row.get(head, "")) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_frame(frame: Any, digits: int) -> str:
    """Render a pandas frame, its fractions with this many digits."""

    def cell(value: Any) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    return markdown([{name: cell(value) for name, value in row.items()} for row in frame.to_dict("records")])


def write_results(name: str, text: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Write `<today>-<name>.md` and `.csv`; return the first."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{datetime.date.today()}-{name}.md"
    path.write_text(text.rstrip() + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_results(name: str, folder: Path = RESULTS) -> list[Row]:
    """Read the rows written today; whole numbers become numbers."""
    path = folder / f"{datetime.date.today()}-{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {key: int(value) if value.isdigit() else value for key, value in row.items() if value != ""}
            for row in csv.DictReader(file)
        ]


def write_between_marks(path: Path, text: str) -> None:
    """Replace a page's text between its two marks.

    `<!-- printed: begin -->` and `<!-- printed: end -->`.
    """
    begin, end = "<!-- printed: begin -->\n", "<!-- printed: end -->"
    page = path.read_text()
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no marks to write between: {begin.strip()} and {end}")
    path.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}")


def installed(modules: Iterable[str]) -> dict[str, str]:
    """Of these modules' packages, the versions of those that are there."""
    there = [module for module in dict.fromkeys(modules) if importlib.util.find_spec(module)]
    return {module: _version(module) for module in there}


def _version(module: str) -> str:
    """Return a package's version; a checkout that isn't installed says it itself."""
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(module).__version__)
