"""Compute the geometry of the page's charts.

Paths lie in a square of 1000 units, marks and ticks are placed in percent. Charts contain numbers and the package's own
labels only, so nothing needs escaping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import Plan
from ..units import show_bytes
from .data import Rows

SIDE = 1000


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, at a percentage of its length."""

    percent: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point, horizontal line, band or range from `y` up, in percent."""

    name: str
    x: float
    y: float
    label: str = ""
    height: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A plot.

    Attributes:
        x_most: The value at the right edge.
        y_most: The value at the upper edge.
        paths: SVG path data by name.
        x_ticks: Ticks of the horizontal axis.
        y_ticks: Ticks of the vertical axis.
        marks: Points and lines, placed over the SVG so that they keep their shape at every width.
    """

    x_most: float
    y_most: float
    paths: dict[str, str]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]


def peaks(plan: Plan, rows: Rows, points: Rows) -> Chart | None:
    """Plot peak against micro-batch; None if the plan has no table."""
    if len(rows) < 2:
        return None
    x_most = float(rows[-1]["micro_batch"])
    y_most = _round_up(max(rows[-1]["peak_bytes"], min(1.15 * plan.budget_bytes, 1.6 * rows[-1]["peak_bytes"])))
    line = [(row["micro_batch"], row["peak_bytes"]) for row in rows]
    marks = [
        Mark(point["point"].replace(" ", "-"), _percent(point["micro_batch"], x_most), _percent(size, y_most))
        for point in points
        if (size := point["peak_bytes"]) <= y_most and point["micro_batch"] <= x_most
    ]
    for name, size in (("base", plan.memory.baseline_bytes), ("budget", plan.budget_bytes)):
        if size <= y_most:
            marks.append(Mark(name, 0, _percent(size, y_most), show_bytes(size)))
    paths = {"peak": _path(line, x_most, y_most)}
    return Chart(x_most, y_most, paths, _number_ticks(x_most), byte_ticks(y_most), tuple(marks))


def timeline(plan: Plan, rows: Rows) -> Chart | None:
    """Plot live bytes through the window, each phase equally wide.

    None if the plan has no timeline.
    """
    if not rows:
        return None
    parts = rows[-1]["part"] + 1
    y_most = _round_up(max(max(row["bytes"] for row in rows), 1.1 * min(plan.budget_bytes, 2 * rows[0]["bytes"])))
    line = [(row["part"] + row["position"], row["bytes"]) for row in rows]
    ends = [(0, line[0][1]), *line, (parts, line[-1][1])]
    area = _path([(0, 0), *ends, (parts, 0)], parts, y_most) + "Z"
    marks = [
        Mark(name, 0, _percent(size, y_most), show_bytes(size))
        for name, size in (("base", plan.memory.baseline_bytes), ("budget", plan.budget_bytes))
        if size <= y_most
    ]
    paths = {"area": area, "peak": _path(ends, parts, y_most)}
    return Chart(parts, y_most, paths, (), byte_ticks(y_most), tuple(marks))


def times(rows: Rows) -> Chart | None:
    """Plot seconds per optimizer step against micro-batch, with each size's range.

    Timed sizes about double from one to the next, so the horizontal axis is logarithmic. None if fewer than two sizes
    were timed.
    """
    if len(rows) < 2:
        return None
    places = [math.log2(row["micro_batch"] / rows[0]["micro_batch"]) for row in rows]
    x_most = places[-1] + 0.5 + 0.5  # a margin of half a doubling at each side
    y_most = 1.15 * max(row["high_seconds"] for row in rows)
    line = [(x + 0.5, row["step_seconds"]) for x, row in zip(places, rows, strict=True)]
    marks = [
        mark
        for (x, seconds), row in zip(line, rows, strict=True)
        for mark in (
            Mark("range", _percent(x, x_most), _percent(row["low_seconds"], y_most),
                 height=_percent(row["high_seconds"] - row["low_seconds"], y_most)),
            Mark("knee" if row["is_knee"] else "timed", _percent(x, x_most), _percent(seconds, y_most)),
        )
    ]  # fmt: skip
    x_ticks = tuple(
        Tick(_percent(x, x_most), f"{row['micro_batch']:,}") for (x, _), row in zip(line, rows, strict=True)
    )
    ticks = tuple(Tick(25 * i, f"{y_most * i / 4:.2g} s") for i in range(5))
    return Chart(x_most, y_most, {"peak": _path(line, x_most, y_most)}, x_ticks, ticks, tuple(marks))


def byte_ticks(most: float) -> tuple[Tick, ...]:
    """Return at most six ticks at round numbers of bytes, from 0."""
    step = 1
    while most / step > 5.5:
        step *= 2
    return tuple(Tick(_percent(size, most), _round_bytes(size)) for size in range(0, int(most) + 1, step))


def _round_bytes(size: int) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B" if size else "0"


def _number_ticks(most: float) -> tuple[Tick, ...]:
    step = next(base * 10**power for power in range(20) for base in (1, 2, 5) if most / (base * 10**power) <= 7.5)
    return tuple(Tick(_percent(n, most), f"{n:,}") for n in range(0, int(most) + 1, step))


def _round_up(most: float) -> float:
    """Add a margin, so that a line at the top is visible."""
    return 1.04 * most or 1.0


def _percent(value: float, most: float) -> float:
    return round(100 * value / most, 2)


def _path(points: Sequence[tuple[float, float]], x_most: float, y_most: float) -> str:
    places = [f"{SIDE * x / x_most:.1f} {SIDE - SIDE * y / y_most:.1f}" for x, y in points]
    return "M" + "L".join(places)
