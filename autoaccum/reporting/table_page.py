"""Render tables, such as benchmark results, as a report. No torch."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..files.escape import finalize
from .kinds import Kind
from .tables import cell


@dataclass(frozen=True)
class Section:
    """A table with its heading.

    Attributes:
        name: A short name, for CSV.
        title: The heading.
        lead: A sentence below the heading.
        head: The columns' names.
        rows: The cells, as text.
        numbers: Names of the columns of numbers.
        strong: Indices of the rows to highlight.
        kinds: The sources of the figures.
        notes: Further remarks.
    """

    name: str
    title: str
    lead: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()
    strong: frozenset[int] = frozenset()
    kinds: tuple[Kind, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sheet:
    """A whole page.

    Attributes:
        what: The kind of page.
        title: The subject.
        answer: The answer in one sentence.
        sections: The tables.
        facts: Machine and versions, as (name, value).
        notes: Further remarks.
        command: The command that wrote the page.
    """

    what: str
    title: str
    answer: str
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    command: str = ""


def render(sheet: Sheet, suffix: str) -> str:
    """Return the page as .html, .md or .csv."""
    return {".html": as_html, ".md": as_markdown, ".csv": as_csv}[suffix](sheet)


def as_html(sheet: Sheet) -> str:
    """Return one HTML file that loads nothing, with texts escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autoaccum.reporting", ""),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        finalize=finalize,
    )  # fmt: skip
    style = (resources.files("autoaccum.reporting") / "page.css").read_text(encoding="utf-8")
    page: str = environment.get_template("sheet.html").render(sheet=sheet, kind=Kind, style=Markup(style))
    return page


def as_markdown(sheet: Sheet) -> str:
    """Return Markdown for an issue or a results folder."""
    from .markdown import escape, table

    parts = [f"# {escape(sheet.title)}: {sheet.what}", escape(sheet.answer)]
    for section in sheet.sections:
        kinds = f" ({', '.join(kind.value for kind in section.kinds)})" if section.kinds else ""
        parts.append(f"## {escape(section.title)}{kinds}")
        parts += [escape(section.lead)] if section.lead else []
        parts += [table(list(section.head), [list(row) for row in section.rows])] if section.rows else []
        parts += ["\n".join(f"- {escape(note)}" for note in section.notes)] if section.notes else []
    parts += ["## Origin", table(["name", "value"], [list(fact) for fact in sheet.facts])]
    if sheet.notes:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in sheet.notes)]
    return "\n\n".join(parts) + "\n"


def as_csv(sheet: Sheet) -> str:
    """Return one line per cell: section, row, column, value, kind."""
    out = io.StringIO()
    writer: Any = csv.writer(out, lineterminator="\n")
    writer.writerow(("table", "row", "column", "value", "kind"))
    for section in sheet.sections:
        kind = section.kinds[0].value if len(section.kinds) == 1 else ""
        for index, row in enumerate(section.rows):
            writer.writerows(
                (section.name, index, column, cell(value), kind)
                for column, value in zip(section.head, row, strict=True)
            )
    return out.getvalue()
