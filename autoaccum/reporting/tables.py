"""Render a report as JSON or tidy CSV. No torch."""

from __future__ import annotations

import csv
import io
from typing import Any

from .. import __version__
from ..files.escape import one_line
from ..files.json_text import to_json
from ..plan import Plan
from . import words
from .data import frames

COLUMNS = ("table", "row", "column", "value", "kind")


def as_json(plan: Plan) -> str:
    """Return the frames as lists of objects, with the answer in words."""
    tables = {name: frame.to_dict("records") for name, frame in frames(plan).items()}
    report = {"kind": "autoaccum report", "schema_version": 1, "autoaccum": __version__}
    report |= {"title": words.title(plan), "answer": words.answer(plan), "tables": tables}
    return to_json(report, indent=1) + "\n"


def as_csv(plan: Plan) -> str:
    """Return one line per figure: table, row, column, value, kind."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, frame in frames(plan).items():
        for index, row in enumerate(frame.to_dict("records")):
            kind = row.pop("kind", "")
            writer.writerows((name, index, column, cell(value), kind) for column, value in row.items())
    return out.getvalue()


def cell(value: Any) -> Any:
    """Quote text that a spreadsheet would evaluate as a formula."""
    if not isinstance(value, str):
        return value
    quote = "'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    return quote + one_line(value)
