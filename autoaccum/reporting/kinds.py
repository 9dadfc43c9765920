"""Of what kind a figure is. Four kinds, never mixed up, and the words for a device's bytes."""

from __future__ import annotations

from enum import StrEnum

from ..plan import Plan


class Kind(StrEnum):
    """How a figure came to be; the value is what is written beside it."""

    CPU = "measured on this CPU"
    GPU = "measured on a GPU"
    VIRTUAL = "real allocator on a virtual GPU"
    PREDICTED = "predicted"
    GIVEN = "given"  # asked for, or read from the system: a limit, a target


def measured(plan: Plan) -> Kind:
    """The kind of what planning measured: it depends on the device alone."""
    if plan.device.name == "cpu":
        return Kind.CPU
    return Kind.VIRTUAL if is_virtual(plan) else Kind.GPU


def is_virtual(plan: Plan) -> bool:
    """Whether the plan's GPU was a virtual one, which has an allocator but computes nothing and has no times."""
    return plan.device.is_virtual


def byte_word(plan: Plan) -> str:
    """What a limit limits: committed bytes on a CPU, reserved ones on a GPU."""
    return "committed" if plan.device.name == "cpu" else "reserved"


def cached_word(plan: Plan) -> str:
    """What the allocator takes beyond what is alive."""
    return "rounding and heap" if plan.device.name == "cpu" else "cached"
