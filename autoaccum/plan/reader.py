"""Read plan files and check that they are consistent. No torch here.

Plan files are untrusted: size, numbers and the relations between them are checked here, so that every plan that is
accepted can be explained, reported and run.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PlanFileError, UsageError
from ..phases import PHASE_TITLES
from .sections import KIND, OBJECTIVES, SCHEMA_VERSION

if TYPE_CHECKING:
    from .plan import Plan

PLAN_AGAIN = "Plan again: autoaccum plan --target-batch N -o plan.json"
MAX_FILE_BYTES = 1 << 26  # a million micro-batches need an eighth of it
MAX_INTEGER = 2**63 - 1  # bytes or samples; no machine has more
MAX_SECONDS = 1e12
MIN_TIMED_SECONDS = 1e-9  # about the time of one instruction
_NEEDED_REASONS = (  # `explain` prints these
    "accumulation_steps",
    "baseline_bytes",
    "budget_bytes",
    "input_bytes",
    "measured_peak_bytes",
    "method",
)
# Minimum by field name; 0 for any other.
_MINIMUM: Mapping[str, float] = {
    **dict.fromkeys(
        ("micro_batch", "min_micro_batch", "max_micro_batch", "max_tokens", "max_rows", "samples_per_group"), 1
    ),
    **dict.fromkeys(("accumulation_steps", "target_batch", "world_size", "split", "passes", "windows"), 1),
    **dict.fromkeys(("step_seconds", "round_seconds"), MIN_TIMED_SECONDS),
    "composition": -MAX_INTEGER,  # parts of a phase may overlap a little, which makes the remainder negative
    "configuration": -MAX_INTEGER,
}


def load_plan(path: str | os.PathLike[str], plan_type: type[Plan]) -> Plan:
    """Read a plan file.

    Raises:
        PlanFileError: It is missing, truncated, foreign, of another schema version, inconsistent, or too long.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123  a pipe (`<(...)`) is a file, too
            mode = os.fstat(file.fileno()).st_mode
            content = b"" if stat.S_ISBLK(mode) else file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"it is longer than {MAX_FILE_BYTES:,} bytes")
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        why = f"The system says: {error.strerror}." if isinstance(error, OSError) else f"It is not a plan: {error}."
        hint = "Make one: autoaccum plan --target-batch N -o plan.json"
        raise PlanFileError(f"The plan {os.fspath(path)!r} cannot be read.", why, hint) from None
    return read_plan(text, os.fspath(path), plan_type)


def read_plan(text: str, source: str, plan_type: type[Plan]) -> Plan:
    """Read the output of `Plan.to_json`.

    Args:
        text: The JSON.
        source: The text's name in error messages.
        plan_type: `Plan`, which imports this file, and not the other way round.

    Raises:
        PlanFileError: It is truncated, foreign, of another schema version, or inconsistent.
    """
    data = _parse(text, source)
    hashable: Any = plan_type  # a class is, whatever its instances' `__hash__` says
    try:
        plan = _validator(hashable).validate_python({k: v for k, v in data.items() if k != "kind"})
    except ValueError as error:
        raise PlanFileError(
            f"{source} is not a complete plan: {_first_error(error)}.",
            "It was cut short, edited, or written by something else.",
            PLAN_AGAIN,
        ) from None
    assert isinstance(plan, plan_type)
    wrong = next(_out_of_bounds(plan, ""), None) or _contradiction(plan)
    if wrong is not None:
        raise PlanFileError(
            f"{source} does not add up: {wrong}.", "It was edited, or written by something else.", PLAN_AGAIN
        )
    return plan


def _out_of_bounds(value: Any, place: str, name: str = "") -> Iterator[str]:
    """Yield a message for each number that is out of bounds."""
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
        most = MAX_SECONDS if isinstance(value, float) else MAX_INTEGER
        if not math.isfinite(value) or value > most:
            yield f"{place} is {_number(value)}, above the maximum of {most:g}"
        elif value < _MINIMUM.get(name, 0):
            yield f"{place} is {_number(value)}, below the minimum of {_MINIMUM.get(name, 0):g}"


def _number(value: float) -> str:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
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
            f"{source} is JSON, but not an autoaccum plan.", f'A plan has "kind": "{KIND}".', PLAN_AGAIN
        )
    version = data.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise PlanFileError(
            f"{source} has the schema version {version!r}, which is not a positive integer.",
            "It was edited.",
            PLAN_AGAIN,
        )
    if version > SCHEMA_VERSION:
        raise PlanFileError(
            f"{source} has schema version {version}; this autoaccum reads {SCHEMA_VERSION}.",
            "A newer autoaccum wrote it.",
            "python -m pip install --upgrade autoaccum, or plan again.",
        )
    if version < SCHEMA_VERSION:
        raise PlanFileError(
            f"{source} has schema version {version}; this autoaccum reads {SCHEMA_VERSION}.",
            "An older autoaccum wrote it, and its fields are arranged differently.",
            PLAN_AGAIN,
        )
    return data


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _contradiction(plan: Plan) -> str | None:
    """Return the first inconsistency or missing reason, or None."""
    checks = (*_schedule_checks(plan), *_memory_checks(plan), *_evidence_checks(plan))
    return next((wrong for holds, wrong in checks if not holds), None) or _wrong_configuration(plan)


def _schedule_checks(plan: Plan) -> tuple[tuple[bool, str], ...]:
    """Check that split, steps, ranks and target agree.

    Returns:
        Pairs: whether it holds, and the message if it doesn't.
    """
    split, target, ranks = plan.split, plan.target_batch, plan.world_size
    parts = f"the split {split if len(split) < 9 else f'of {len(split)} micro-batches'}"
    return (
        (ranks >= 1, f"{ranks} ranks"),
        (len(split) == plan.accumulation_steps >= 1, f"{parts} is not of {plan.accumulation_steps} micro-batches"),
        (min(split, default=0) >= 1, f"{parts} has micro-batches without samples"),
        (max(split, default=0) == plan.micro_batch, f"{plan.micro_batch} is not the largest of {parts}"),
        (
            _is_share(plan, sum(split)),
            f"{parts} sums to {sum(split)}, which is not a share of {target} among {ranks} rank{'s' * (ranks > 1)}",
        ),
        (plan.request.objective in OBJECTIVES, f"{plan.request.objective!r} is not an objective"),
    )


def _is_share(plan: Plan, samples: int) -> bool:
    """Whether so many samples are one rank's share of the target."""
    entries, ranks, target = plan.ranks, plan.world_size, plan.target_batch
    if not entries:
        return abs(samples * ranks - target) < ranks  # equal shares differ by at most one
    splits = [entry.split for entry in entries]
    return (
        len(entries) == ranks
        and all(min(split, default=0) >= 1 for split in splits)
        and sum(map(sum, splits)) == target
        and plan.split in splits
    )


def _memory_checks(plan: Plan) -> tuple[tuple[bool, str], ...]:
    """Check budget, phases, timeline and reasons, likewise."""
    memory, budget = plan.memory, plan.memory.budget
    unknown = sorted(set(memory.phases) - set(PHASE_TITLES))
    reasons = (*_NEEDED_REASONS, *(name for name in ("history_bytes", "malloc_overhead") if getattr(memory, name)))
    lacking = [name for name in reasons if name not in plan.provenance.reasons]
    return (
        (budget.bytes > 0, f"a budget of {budget.bytes} bytes"),
        (
            budget.binding_constraint in [term.name for term in budget.terms],
            f"{budget.binding_constraint!r} is not one of its budget's limits",
        ),
        (bool(memory.phases), "it has no phases"),
        (not unknown, f"a window has no phase {', '.join(unknown)}"),
        (all(part.bytes for part in memory.timeline), "a part of its timeline is empty"),
        (not lacking, f"it gives no reason for {', '.join(lacking)}"),
    )


def _evidence_checks(plan: Plan) -> tuple[tuple[bool, str], ...]:
    """Check recordings and measurements; pairs of whether, and the message if not."""
    return (
        (bool(plan.evidence.recordings), "it has no recordings"),
        (all(note.measured_bytes > 0 for note in plan.evidence.recordings), "a recording of no bytes"),
        (
            plan.measured_peak_bytes is None
            or (plan.measured_peak_bytes > 0 and (plan.on_cuda or plan.evidence.resident_peak_bytes is not None)),
            "it was verified, but what was measured is missing",
        ),
    )


def _wrong_configuration(plan: Plan) -> str | None:
    """Return what is wrong with the tuned configuration; None if nothing is."""
    if not plan.schedule.configuration:
        return None
    from ..configuration import Configuration

    try:
        Configuration.from_values(plan.schedule.configuration)
    except UsageError as error:
        return f"its configuration is invalid: {error.what}"
    return None


@functools.cache
def _validator(plan_type: Any) -> Any:
    """Return pydantic's validator; imported here, since that takes longer than most commands."""
    from pydantic import TypeAdapter

    return TypeAdapter(plan_type)


def _first_error(error: ValueError) -> str:
    """Return the first validation error and its place."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "it"
    return f"{place}: {first['msg'].lower()}" + (f" ({len(errors())} such)" if len(errors()) > 1 else "")
