"""Hold benchmark figures: their origin, their spread, and changes between runs.

No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

UNSTABLE = 0.1  # of the value: a figure whose repeats spread further can't be distinguished from another within that
TIMED = ("s", "x")  # units of times and of their ratios, which one repeat says nothing about
DRIFT = 0.02  # of the value: what a figure without repeats may differ by without being said to have changed


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: What it is, the same in every run.
        value: The median of its repeats.
        unit: Its unit; "%" for what is a difference in percent already.
        kind: How it came to be, in the words of `report.kinds.Kind`.
        low: The lowest of its repeats.
        high: The highest.
        repeats: How many there were.
    """

    name: str
    value: float
    unit: str
    kind: str
    low: float
    high: float
    repeats: int = 1

    @property
    def is_unstable(self) -> bool:
        """Whether its repeats spread too far to say much."""
        return self.repeats > 1 and self.high - self.low > UNSTABLE * abs(self.value)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"unstable": self.is_unstable}


def figure_of(values: Sequence[float], name: str, unit: str, kind: str) -> Figure:
    """Return the figure of some repeats."""
    import statistics

    return Figure(name, statistics.median(values), unit, kind, min(values), max(values), len(values))


def read_figure(data: dict[str, Any]) -> Figure:
    """Read what `to_dict` wrote."""
    return Figure(**{name: value for name, value in data.items() if name != "unstable"})


@dataclass(frozen=True)
class Change:
    """One figure in two runs.

    Attributes:
        name: Its name.
        old: Before; None where it wasn't there.
        new: Now; None where it is gone.
        verdict: "same", "changed", "unstable", "new" or "gone".
        difference: By how much, in words.
    """

    name: str
    old: Figure | None
    new: Figure | None
    verdict: str
    difference: str


def compare(old: Sequence[Figure], new: Sequence[Figure]) -> list[Change]:
    """Compare every figure of two runs: the same, changed, or unstable.

    Figures with repeats have changed where the ranges of their repeats don't overlap; without, where they differ by
    more than 2 % (a difference in percent: by more than a point). Nothing is concluded from a time that was taken once,
    nor where either run's repeats spread beyond 10 % of the value and the ranges overlap.
    """
    before, now = ({figure.name: figure for figure in figures} for figures in (old, new))
    return [_change(name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now])]


def _change(name: str, old: Figure | None, new: Figure | None) -> Change:
    if old is None or new is None:
        return Change(name, old, new, "new" if old is None else "gone", "")
    if new.unit == "%" or old.value == 0:
        difference = f"{new.value - old.value:+.3g} {new.unit}{' points' if new.unit == '%' else ''}"
    else:
        difference = f"{100 * (new.value / old.value - 1):+.1f} %"
    if old.kind != new.kind:
        return Change(name, old, new, "changed", f"{old.kind} before, {new.kind} now")
    if old.repeats > 1 and new.repeats > 1:
        overlap = new.low <= old.high and old.low <= new.high
        if not overlap:
            return Change(name, old, new, "changed", difference)
        return Change(name, old, new, "unstable" if old.is_unstable or new.is_unstable else "same", difference)
    if new.unit in TIMED:
        return Change(name, old, new, "unstable", f"{difference}, timed once")
    allowed = 1.0 if new.unit == "%" else DRIFT * abs(old.value)
    return Change(name, old, new, "same" if abs(new.value - old.value) <= allowed else "changed", difference)
