"""Parse, check and show sizes, counts and seconds that a person gives.

They are checked before anything runs, on the command line and in Python alike. Everywhere else bytes are `int`.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from .errors import UsageError

MAX_SAMPLES = 9_999_999  # of an effective batch, as in a report's what-if box; a plan lists its micro-batches
MAX_COUNT = 1_000_000_000  # of anything else that is counted, and seconds: thirty years
MAX_SEED = 2**32 - 1  # what numpy's generators take

_LEAST_WITHOUT_UNIT = 2**20  # bytes: below that, a unit was left out
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?)(iB|B)?\s*", re.IGNORECASE)
_TOKENS = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*((?:[KMG]i?)?)[\s-]*tokens?\s*", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*%\s*")


def parse_bytes(text: str | int, *, what: str = "a size") -> int:
    """Parse "2GiB", "1.5 GB", "800M" or a number of bytes.

    KB, MB and GB are powers of 1000, all others of 1024.

    Raises:
        UsageError: It is no size, or nothing at all.
    """
    size = _size(text, what)
    if size <= 0:
        raise UsageError(
            f"{text!r} is not {what}: it must be more than 0 bytes.",
            "Less than one byte holds nothing.",
            "Write it like 2GiB or 800MiB.",
        )
    return size


def _size(text: str | int, what: str) -> int:
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise UsageError(
            f"{text!r} is not {what}.",
            "A size is a number and a unit: B, KiB, MiB, GiB, TiB, or KB, MB, GB, TB in thousands.",
            "Write it like 2GiB, 1.5GiB, 800MiB or 12GB.",
        )
    number, unit, suffix = match[1], match[2].upper(), (match[3] or "").lower()
    return int(Fraction(number) * (_DECIMAL if suffix == "b" and unit else _UNITS)[unit])


def parse_part(text: str | int | None, whole_bytes: int, *, what: str = "a size") -> int | None:
    """Parse a size, or a percentage of `whole_bytes`.

    None stays None, and 0 is allowed.
    """
    if text is None:
        return None
    match = _PERCENT.fullmatch(str(text))
    if match is not None:
        part = Fraction(match[1]) / 100
        if part >= 1:
            raise UsageError(
                f"{what.capitalize()} of {text} leaves nothing.", "All of it is 100%.", "Write it like 5% or 500MiB."
            )
        return int(whole_bytes * part)
    return 0 if _size(text, what) == 0 else parse_bytes(text, what=what)


def check_memory(memory: str | int | None, headroom: str | int | None) -> None:
    """Refuse an invalid size of memory or headroom, on any machine.

    Raises:
        UsageError: One of them can't be read, or the headroom leaves nothing of the memory.
    """
    whole = None if memory is None else parse_bytes(memory, what="an amount of memory")
    if whole is not None and whole < _LEAST_WITHOUT_UNIT and str(memory).strip().replace(".", "").isdigit():
        raise UsageError(
            f"Memory of {memory} would be {whole} bytes.",
            "A number without a unit counts bytes.",
            f"Did you mean {str(memory).strip()}GiB? Write the unit: GiB, MiB, or B for bytes.",
        )
    kept = parse_part(headroom, whole or 1 << 62, what="headroom")
    if whole is not None and kept is not None and kept >= whole:
        raise UsageError(
            f"Headroom of {headroom} leaves nothing of {memory}.",
            "Headroom is the part of the memory that is kept free.",
            "Name less headroom, or more memory.",
        )


def show_bytes(size: int) -> str:
    """Return a size in three digits: `1.50 GiB`, `12.3 MiB`, `512 B`."""
    if abs(size) < 1024:
        return f"{size} B"
    for unit in ("KiB", "MiB"):
        number = f"{size / _UNITS[unit[0]]:.1f}"
        if abs(float(number)) < 1024:
            return f"{number} {unit}"
    return f"{size / _UNITS['G']:.2f} GiB"


def parse_target(text: str | int | None, name: str) -> tuple[int | None, int | None]:
    """Parse a target: "512" samples, or "4M-tokens".

    K, M and G are powers of 1000; Ki, Mi and Gi of 1024.

    Returns:
        Samples and tokens, one of them None; both None for None.

    Raises:
        UsageError: It is neither.
    """
    if text is None:
        return None, None
    match = _TOKENS.fullmatch(str(text))
    if match is not None:
        unit = match[2].upper()
        tokens = Fraction(match[1]) * (_UNITS[unit[0]] if unit.endswith("I") else {**_DECIMAL, "": 1}[unit])
        check_count(name, int(tokens), most=MAX_SAMPLES * MAX_SAMPLES, what="a number of tokens", example=4_000_000)
        return None, int(tokens)
    if re.fullmatch(r"\s*[+-]?\d{1,4000}\s*", str(text)) is None:
        raise UsageError(
            f"{name} is {text!r}, neither samples nor tokens.",
            "Samples are a whole number; tokens are a number, with K, M, G or Ki, Mi, Gi, and the word.",
            f"Give {_written(name, 512)}, or {name} 4M-tokens.",
        )
    check_samples(name, int(text))
    return int(text), None


def check_samples(name: str, value: Any) -> None:
    """Refuse anything but a number of samples; None passes.

    Raises:
        UsageError: It is not a whole number from 1 to what a plan can list.
    """
    check_count(name, value, most=MAX_SAMPLES, what="a number of samples", example=512)


def check_count(
    name: str,
    value: Any,
    *,
    least: int = 1,
    most: int = MAX_COUNT,
    what: str = "a whole number",
    example: int | None = None,
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
    """Refuse anything but a number of seconds; None passes.

    Args:
        name: Of the option or the argument.
        value: Anything.
        zero: Whether 0 is allowed.

    Raises:
        UsageError: It is not a finite number from 0 to thirty years.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    in_range = number and not math.isnan(value) and (value >= 0 if zero else value > 0) and value <= MAX_COUNT
    if value is None or in_range:
        return
    raise UsageError(
        f"{name} is {show_number(value)}: seconds, {'from' if zero else 'more than'} 0 and at most {MAX_COUNT:,}.",
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
