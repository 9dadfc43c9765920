"""A page of tables that is no plan's: a benchmark's results, in the same form as a plan's report. No torch here."""

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
class Bar:
    """A bar of a chart: its label, its length in percent of the longest, and what is written beside it."""

    label: str
    percent: float
    shown: str
    strong: bool = False


@dataclass(frozen=True)
class Section:
    """A table, and a chart above it if it has one.

    Attributes:
        name: A short name, for CSV.
        title: Its heading.
        lead: A sentence below that.
        head: The columns.
        rows: Their cells, as text.
        numbers: The columns that are numbers.
        strong: Rows to point out.
        kinds: How its figures came to be.
        bars: A chart.
        bars_title: What its lengths are.
        notes: What else to know.
    """

    name: str
    title: str
    lead: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()
    strong: frozenset[int] = frozenset()
    kinds: tuple[Kind, ...] = ()
    bars: tuple[Bar, ...] = ()
    bars_title: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tile:
    """A figure that the page begins with."""

    label: str
    shown: str
    kind: Kind


@dataclass(frozen=True)
class Sheet:
    """The whole page.

    Attributes:
        what: What kind of page it is.
        title: What it is about.
        answer: The answer in one sentence.
        tiles: The figures that it begins with.
        sections: Its tables.
        facts: Machine and versions.
        notes: What else to know.
        command: What wrote it.
    """

    what: str
    title: str
    answer: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    command: str = ""


def render(sheet: Sheet, suffix: str) -> str:
    """The page as .html, .md or .csv."""
    return {".html": as_html, ".md": as_markdown, ".csv": as_csv}[suffix](sheet)


def as_html(sheet: Sheet) -> str:
    """One file that loads nothing; texts of the user's are escaped by the template."""
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
    """For an issue, or a results folder."""
    from .markdown import escape, table

    parts = [f"# {escape(sheet.title)}: {sheet.what}", escape(sheet.answer)]
    for section in sheet.sections:
        kinds = f" ({', '.join(kind.value for kind in section.kinds)})" if section.kinds else ""
        parts.append(f"## {escape(section.title)}{kinds}")
        parts += [escape(section.lead)] if section.lead else []
        parts += [table(list(section.head), [list(row) for row in section.rows])] if section.rows else []
        parts += ["\n".join(f"- {escape(note)}" for note in section.notes)] if section.notes else []
    parts += ["## Where it comes from", table(["name", "value"], [list(fact) for fact in sheet.facts])]
    if sheet.notes:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in sheet.notes)]
    return "\n\n".join(parts) + "\n"


def as_csv(sheet: Sheet) -> str:
    """Every cell in a line of its own: section, row, column, value, kind."""
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
