"""Name the sources of figures and the kinds of a device's bytes."""

from __future__ import annotations

from enum import StrEnum

from ..plan import Plan


class Kind(StrEnum):
    """The source of a figure, by the label shown beside it."""

    CPU = "measured on this CPU"
    GPU = "measured on a GPU"
    VIRTUAL = "real allocator on a virtual GPU"
    PREDICTED = "predicted"
    GIVEN = "given"  # requested, or read from the system: a limit, a target


def measured(plan: Plan) -> Kind:
    """Return the kind of the plan's measured figures, by its device."""
    if plan.device.name == "cpu":
        return Kind.CPU
    return Kind.VIRTUAL if is_virtual(plan) else Kind.GPU


def is_virtual(plan: Plan) -> bool:
    """Return whether the plan's GPU was virtual, hence without times."""
    return plan.device.is_virtual


def byte_word(plan: Plan) -> str:
    """Return the bytes that a limit counts: committed or reserved."""
    return "committed" if plan.device.name == "cpu" else "reserved"


def cached_word(plan: Plan) -> str:
    """Return the title of bytes that the allocator holds beyond live blocks."""
    return "rounding and heap" if plan.device.name == "cpu" else "cached"


def place(plan: Plan) -> str:
    """Return on what the plan's figures were measured."""
    if plan.device.is_virtual:
        return "by the real allocator on a virtual GPU"
    return "measured on this GPU" if plan.on_cuda else "measured on this CPU"
