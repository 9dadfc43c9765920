"""Plans and their JSON with some fields changed, by the fields' names: no two sections of a plan have one in common."""

from __future__ import annotations

import copy
import dataclasses
import typing
from typing import Any

from autoaccum.plan import Plan

HINTS = typing.get_type_hints(Plan)
SECTIONS = {name: kind for name, kind in HINTS.items() if dataclasses.is_dataclass(kind)}
PLACES = {
    "device_name" if field.name == "name" else field.name: (section, field.name)
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)  # type: ignore[arg-type]
}


def plan_of(fields: dict[str, Any]) -> Plan:
    """A plan of its fields' values."""
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in fields.items():
        section, field = PLACES[name]
        values[section][field] = value
    return Plan(**{section: kind(**values[section]) for section, kind in SECTIONS.items()})


def changed_plan(plan: Plan, **changes: Any) -> Plan:
    """The plan with other values of some fields."""
    for name, value in changes.items():
        section, field = PLACES[name]
        plan = dataclasses.replace(plan, **{section: dataclasses.replace(getattr(plan, section), **{field: value})})
    return plan


def changed_json(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A plan's JSON with other values of some fields, whatever they are; of the plan's own too (schema_version)."""
    data = copy.deepcopy(data)
    for name, value in changes.items():
        if name in PLACES:
            section, field = PLACES[name]
            data[section][field] = value
        else:
            data[name] = value
    return data
