"""Render a report as one HTML page that loads nothing. No torch.

The page has light and dark colors and is readable without JavaScript.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from ..files.escape import finalize
from ..plan import Plan
from ..simulation.breakdown import CATEGORIES
from ..units import show_bytes
from . import charts, what_if, words
from .batch_choice import batch_choice
from .data import Rows, frames, usable_bytes
from .kinds import Kind, is_virtual, measured

ROWS_BEFORE, ROWS_AFTER = 8, 12  # plans shown around the chosen one; .csv and .json have all


def render(plan: Plan) -> str:
    """Return the whole page.

    The template escapes the user's texts (names, paths, notes). The content security policy allows only the page's
    script, by its hash.
    """
    import jinja2
    from markupsafe import Markup

    loader = jinja2.PackageLoader("autoaccum.reporting", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = finalize
    environment.undefined = jinja2.StrictUndefined
    environment.filters |= {"bytes": show_bytes, "number": words.number}
    style, script = _text("page.css"), _text("what_if.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page: str = environment.get_template("page.html").render(
        context(plan), style=Markup(style), script=Markup(script), script_hash=Markup(digest)
    )
    return page


def context(plan: Plan) -> dict[str, Any]:
    """Return the template's variables."""
    data: dict[str, Rows] = {name: frame.to_dict("records") for name, frame in frames(plan).items()}
    table = what_if.table_of(plan)
    return {
        "plan": plan,
        "title": words.title(plan),
        "answer": words.answer(plan),
        "words": words,
        "kind": Kind,
        "measured": measured(plan),
        "is_virtual": is_virtual(plan),
        "usable_bytes": usable_bytes(plan),
        "data": data,
        "tiles": _tiles(data["figures"]),
        "peaks_chart": charts.peaks(plan, data["peaks"], data["points"]),
        "timeline_chart": charts.timeline(plan, data["timeline"]),
        "times_chart": charts.times(data["times"]),
        "bars": _bars(plan),
        "categories": [name for name in CATEGORIES if any(name in parts for parts in plan.memory.composition.values())],
        "plans": around_chosen(data["plans"]),
        "advice": " ".join(batch_choice(plan)),
        "what_if": None if table is None else what_if.for_page(table),
        "memory_text": _size_text(plan.memory.budget.limit_bytes),
        "headroom_text": _size_text(plan.memory.budget.headroom_bytes),
    }


def _text(name: str) -> str:
    return (resources.files("autoaccum.reporting") / name).read_text(encoding="utf-8")


def _tiles(figures: Rows) -> Rows:
    """Return the figures at the top of the page."""
    shown = ("micro-batch", "accumulation steps", "peak, predicted", "peak, measured", "budget", "optimizer step")
    found = {row["figure"]: row for row in figures}
    return [found[name] | {"text": _figure(found[name])} for name in shown if name in found]


def _figure(row: dict[str, Any]) -> str:
    if row["unit"] == "bytes":
        return show_bytes(row["value"])
    return f"{row['value']:.3g} s" if row["unit"] == "seconds" else f"{row['value']:,}"


def _bars(plan: Plan) -> list[dict[str, Any]]:
    """Return each phase's parts, in percent of the highest phase."""
    highest = max((sum(parts.values()) for parts in plan.memory.composition.values()), default=0) or 1
    return [
        {
            "phase": words.phase(name),
            "bytes": sum(parts.values()),
            "parts": [
                {"category": category, "slug": category.replace(" ", "-"), "bytes": size}
                | {"percent": round(100 * size / highest, 3)}
                for category, size in parts.items()
                if size > 0
            ],
        }
        for name, parts in plan.memory.composition.items()
    ]


def around_chosen(plans: Rows) -> Rows:
    """Return the chosen plan, its neighbors, and others at doubling step counts."""
    chosen = next((index for index, row in enumerate(plans) if row["chosen"]), 0)
    near = set(range(chosen - ROWS_BEFORE, chosen + ROWS_AFTER + 1))
    far, index = {len(plans) - 1}, chosen + ROWS_AFTER
    while index < len(plans):
        far.add(index)
        index = 2 * index
    return [row for index, row in enumerate(plans) if index in near | far]


def _size_text(size: int) -> str:
    """Format bytes exactly, as `--memory` accepts them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)
