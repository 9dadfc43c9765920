"""Check numbers before anything runs, on the command line and in Python."""

from __future__ import annotations

import math
from typing import Any

from .errors import UsageError

MOST_SAMPLES = 9_999_999  # of an effective batch, as in a report's what-if box; a plan lists its micro-batches
MOST = 1_000_000_000  # of anything else that is counted, and seconds: thirty years
MOST_SEED = 2**32 - 1  # what numpy's generators take


def check_samples(name: str, value: Any) -> None:
    """Refuses what is no number of samples; None is left out.

    Raises:
        UsageError: It is no whole number, below 1, or beyond what a plan can list.
    """
    check_count(name, value, most=MOST_SAMPLES, what="a number of samples", example=512)


def check_count(
    name: str, value: Any, *, least: int = 1, most: int = MOST, what: str = "a whole number", example: int | None = None
) -> None:
    """Refuse anything but a whole number within bounds; None passes.

    Raises:
        UsageError: With the bounds.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (whole and least <= value <= most):
        return
    example = max(least, 1) if example is None else example
    raise UsageError(
        f"{name} is {show_number(value)}: {what}, {_bounds(least, most, value if whole else None)}.",
        hint=f"Give {_written(name, example)}, say.",
    )


def check_seconds(name: str, value: Any, *, zero: bool = True) -> None:
    """Refuses what is no number of seconds; None is left out.

    Args:
        name: Of the option or the argument.
        value: Anything.
        zero: Whether 0 is allowed.

    Raises:
        UsageError: It is no finite number, negative, or beyond thirty years.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or (number and not math.isnan(value) and (value >= 0 if zero else value > 0) and value <= MOST):
        return
    raise UsageError(
        f"{name} is {show_number(value)}: seconds, {'from' if zero else 'more than'} 0 and at most {MOST:,}.",
        hint=f"Give {_written(name, 30)}, say.",
    )


def show_number(value: Any) -> str:
    """Return a number as given; a very long one by its length."""
    if not isinstance(value, int) or isinstance(value, bool):
        return repr(value)
    digits = int(math.log10(abs(value) or 1)) + 1
    return str(value) if digits <= 30 else f"a number of about {digits} digits"


def _bounds(least: int, most: int, value: int | None) -> str:
    if value is not None and value > most:
        return f"at most {most:,}"
    return f"at least {least}"


def _written(name: str, value: int) -> str:
    return f"{name} {value}" if name.startswith("--") else f"{name}={value}"
