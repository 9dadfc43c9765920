"""Reads plan files: whatever is accepted can be explained, reported and run; all else is refused in words.

A file from elsewhere is nobody's word: its size, its numbers and what follows from them are checked here, so that no
reader has to. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from .errors import PlanFileError, UsageError
from .phases import PHASE_TITLES
from .plan import KIND, OBJECTIVES, SCHEMA_VERSION, Plan

PLAN_AGAIN = "Plan again: autoaccum plan --target-batch N -o plan.json"
MOST_FILE_BYTES = 1 << 26  # a million micro-batches take an eighth of it
MOST = 2**63 - 1  # of bytes and samples; no machine has more
MOST_SECONDS = 1e12
LEAST_SECONDS = 1e-9  # of what was timed: an instruction takes about as long
_REASONS = (  # without these a plan can't explain itself
    "accumulation_steps",
    "baseline_bytes",
    "budget_bytes",
    "input_bytes",
    "measured_peak_bytes",
    "method",
)
# By a field's name the least that it may be; 0 where it isn't named.
_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("micro_batch", "min_micro_batch", "max_micro_batch", "max_tokens", "most_rows"), 1),
    **dict.fromkeys(("accumulation_steps", "target_batch", "world_size", "split", "passes", "windows"), 1),
    **dict.fromkeys(("step_seconds", "round_seconds"), LEAST_SECONDS),
    "composition": -MOST,  # a phase's parts may overlap by a little, and then the rest is less than nothing
    "configuration": -MOST,
}


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan file.

    Raises:
        PlanFileError: It is missing, half-written, foreign, newer or far too long.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123  a pipe (`<(...)`) is a file, too
            kind = os.fstat(file.fileno()).st_mode
            content = b"" if stat.S_ISBLK(kind) else file.read(MOST_FILE_BYTES + 1)
        if len(content) > MOST_FILE_BYTES:
            raise ValueError(f"it is longer than {MOST_FILE_BYTES:,} bytes")
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        why = f"The system says: {error.strerror}." if isinstance(error, OSError) else f"It is no plan's text: {error}."
        hint = "Make one: autoaccum plan --target-batch N -o plan.json"
        raise PlanFileError(f"The plan {os.fspath(path)!r} can't be read.", why, hint) from None
    return read_plan(text, os.fspath(path))


def read_plan(text: str, source: str) -> Plan:
    """Reads what `Plan.to_json` wrote.

    Raises:
        PlanFileError: It is half-written, foreign, newer, or does not add up.
    """
    data = _parse(text, source)
    try:
        plan = _validator().validate_python({k: v for k, v in data.items() if k != "kind"})
    except ValueError as error:
        raise PlanFileError(
            f"{source} is not a whole plan: {_first_error(error)}.",
            "It was cut short, edited, or written by something else.",
            PLAN_AGAIN,
        ) from None
    assert isinstance(plan, Plan)
    wrong = next(_out_of_bounds(plan, ""), None) or _contradiction(plan)
    if wrong is not None:
        raise PlanFileError(
            f"{source} does not add up: {wrong}.", "It was edited, or written by something else.", PLAN_AGAIN
        )
    return plan


def _out_of_bounds(value: Any, place: str, name: str = "") -> Iterator[str]:
    """Every number that no plan has, in words."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _out_of_bounds(getattr(value, field.name), f"{place}.{field.name}".lstrip("."), field.name)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _out_of_bounds(each, f"{place}.{key}", name)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _out_of_bounds(each, place, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        most = MOST_SECONDS if isinstance(value, float) else MOST
        if not math.isfinite(value) or value > most:
            yield f"{place} is {_number(value)}, more than there is"
        elif value < _LEAST.get(name, 0):
            yield f"{place} is {_number(value)}, less than {_LEAST.get(name, 0):g}"


def _number(value: float) -> str:
    if isinstance(value, int) and abs(value) > MOST:
        return f"a number of {value.bit_length()} bits"
    return str(value)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        data = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise PlanFileError(
            f"{source} is not JSON ({error}).", "It was cut short, or is something else.", PLAN_AGAIN
        ) from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise PlanFileError(
            f"{source} is JSON, but not a plan of autoaccum's.", f'A plan says "kind": "{KIND}".', PLAN_AGAIN
        )
    version = data.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise PlanFileError(
            f"{source} has no schema version that can be ({version!r}).", "It was edited, or cut.", PLAN_AGAIN
        )
    if version > SCHEMA_VERSION:
        raise PlanFileError(
            f"{source} has schema version {version}; this autoaccum reads up to {SCHEMA_VERSION}.",
            "A newer autoaccum wrote it.",
            "python -m pip install --upgrade autoaccum, or plan again.",
        )
    return data


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _contradiction(plan: Plan) -> str | None:
    """The first thing in which the plan contradicts itself, or lacks what explaining it needs; None where it holds."""
    split, target, ranks = plan.split, plan.target_batch, plan.world_size
    budget = plan.budget
    needed = (*_REASONS, *(name for name in ("history_bytes", "malloc_overhead") if getattr(plan, name)))
    lacking = [name for name in needed if name not in plan.reasons]
    parts = f"the split {split if len(split) < 9 else f'of {len(split)} micro-batches'}"
    checks = (
        (ranks >= 1, f"{ranks} ranks"),
        (len(split) == plan.accumulation_steps >= 1, f"{parts} is not of {plan.accumulation_steps} micro-batches"),
        (min(split, default=0) >= 1, f"{parts} has micro-batches of no samples"),
        (max(split, default=0) == plan.micro_batch, f"{plan.micro_batch} is not the largest of {parts}"),
        (
            abs(sum(split) * ranks - target) < ranks,  # shares differ by at most one
            f"{parts} sums to {sum(split)}, which is no share of {target} among {ranks} rank{'s' * (ranks > 1)}",
        ),
        (budget.bytes > 0, f"a budget of {budget.bytes} bytes"),
        (
            budget.binding_constraint in [term.name for term in budget.terms],
            f"{budget.binding_constraint!r} is none of its budget's limits",
        ),
        (bool(plan.phases), "it has no phases"),
        (
            set(plan.phases) <= set(PHASE_TITLES),
            f"{', '.join(sorted(set(plan.phases) - set(PHASE_TITLES)))}: no phase of a window",
        ),
        (plan.objective in OBJECTIVES, f"{plan.objective!r} is no objective"),
        (bool(plan.recordings), "it rests on no recording"),
        (all(note.measured_bytes > 0 for note in plan.recordings), "a recording of no bytes"),
        (
            plan.measured_peak_bytes is None
            or (plan.measured_peak_bytes > 0 and (plan.on_cuda or plan.resident_peak_bytes is not None)),
            "it was verified, but what was measured is missing",
        ),
        (all(part.bytes for part in plan.timeline), "a part of its timeline is empty"),
        (not lacking, f"it gives no reason for {', '.join(lacking)}"),
    )
    return next((wrong for holds, wrong in checks if not holds), None) or _wrong_configuration(plan)


def _wrong_configuration(plan: Plan) -> str | None:
    if not plan.configuration:
        return None
    from .configuration import Configuration

    try:
        Configuration.from_values(plan.configuration)
    except UsageError as error:
        return f"its configuration can't be: {error.what}"
    return None


def _validator() -> Any:
    """Pydantic's, made where a file comes in: importing it takes longer than most commands."""
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)


def _first_error(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "it"
    return f"{place}: {first['msg'].lower()}" + (f" ({len(errors())} such)" if len(errors()) > 1 else "")
