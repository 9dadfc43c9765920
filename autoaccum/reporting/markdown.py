"""Render a report as Markdown, for issues and READMEs. No torch."""

from __future__ import annotations

import re

from ..files.escape import one_line
from ..plan import Plan
from ..units import show_bytes
from . import words
from .batch_choice import batch_choice
from .data import Rows, frames
from .page import around_chosen

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&@])")


def render(plan: Plan) -> str:
    """Return the report as Markdown, with the user's texts escaped."""
    data: dict[str, Rows] = {name: frame.to_dict("records") for name, frame in frames(plan).items()}
    parts = [f"# {escape(words.title(plan))}: autoaccum report", escape(words.answer(plan))]
    figures = [
        [row["figure"], _figure(row["value"], row["unit"]), row["kind"].value, row["why"]] for row in data["figures"]
    ]
    parts.append(table(["figure", "value", "kind", "why"], figures))
    parts += [escape(words.fewer(plan)), escape(words.bytes_note(plan))]
    if data["composition"]:
        parts += ["## Memory at the peak (predicted)", _composition(plan)]
    parts += ["## Time per optimizer step", escape(words.time_sentence(plan))]
    if data["times"]:
        parts.append(_times(data["times"]))
    advice = batch_choice(plan)
    if advice:
        parts += ["## Accumulating at all", escape(" ".join(advice))]
    if data["plans"]:
        parts += [f"## Plans for {plan.target_batch:,} samples (predicted)", _plans(around_chosen(data["plans"]))]
    budget = [[row["limit"], show_bytes(row["bytes"]), row["why"]] for row in data["budget"]]
    parts += ["## Budget (given)", table(["limit", "size", "why"], budget)]
    recordings = [
        [
            row["micro_batch"],
            show_bytes(row["measured_bytes"]),
            _figure(row["predicted_bytes"], "bytes"),
            row["kind"].value,
        ]
        for row in data["recordings"]
    ]
    parts += ["## Recordings", table(["samples", "recorded", "predicted before", "kind"], recordings)]
    facts = [[row["name"], row["value"]] for row in data["environment"]]
    parts += ["## Environment", table(["name", "value"], [*facts, ["exactness", plan.exactness]])]
    if plan.notes:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in plan.notes)]
    return "\n\n".join(parts) + "\n"


def escape(text: object) -> str:
    """Return text as one line of Markdown without markup or HTML."""
    return _SPECIAL.sub(r"\\\1", one_line(" ".join(str(text).split())))


def _composition(plan: Plan) -> str:
    names = list(dict.fromkeys(name for parts in plan.memory.composition.values() for name in parts))
    rows = [
        [words.category(plan, name), *(_figure(parts.get(name), "bytes") for parts in plan.memory.composition.values())]
        for name in names
    ]
    rows.append(["total", *(show_bytes(sum(parts.values())) for parts in plan.memory.composition.values())])
    return table(["held by", *map(words.phase, plan.memory.composition)], rows)


def _times(rows: Rows) -> str:
    shown = [
        [row["micro_batch"], f"{row['step_seconds']:.4g}", f"{row['low_seconds']:.4g} to {row['high_seconds']:.4g}",
         f"{100 * (row['ratio'] - 1):+.1f} %", row["kind"].value]
        for row in rows
    ]  # fmt: skip
    return table(["micro-batch", "seconds per step", "range of the rounds", "over the fastest", "kind"], shown)


def _plans(rows: Rows) -> str:
    shown = [
        [row["accumulation_steps"], row["split"], show_bytes(row["peak_bytes"]), show_bytes(row["free_bytes"]),
         "chosen" if row["chosen"] else words.number(row["fits"]), words.number(row["step_seconds"])]
        for row in rows
    ]  # fmt: skip
    return table(["steps", "micro-batches", "peak", "free", "fits", "seconds"], shown)


def _figure(value: object, unit: str) -> str:
    if unit == "bytes":
        return show_bytes(value) if isinstance(value, int) else words.NONE
    return f"{words.number(value)} {unit}".strip()


def table(head: list[str], rows: list[list[object]] | list[list[str]]) -> str:
    """Return a table with its cells escaped."""
    lines = [[escape(cell) for cell in head], ["---"] * len(head), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
