"""Show a plan as a card, read in five seconds. No torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..files.escape import one_line
from ..plan import Plan
from ..units import show_bytes
from .kinds import place
from .words import over_ranks

LABEL = 12  # columns
_MOST_BAR, _LEAST_BAR = 48, 10
_BLOCKS = ("█", "░")
_ASCII = ("#", ".")
# The eight colours of every terminal, which its owner has chosen to be read on a dark or a light ground.
_CODES = {"green": "32", "yellow": "33", "red": "31", "bold": "1"}


@dataclass(frozen=True)
class Look:
    """What a terminal can show.

    Attributes:
        columns: Its width; None where nothing is wrapped, as in a file.
        colours: Whether it takes colours.
        blocks: Whether its encoding has block characters.
    """

    columns: int | None = None
    colours: bool = False
    blocks: bool = True

    def paint(self, text: str, *styles: str) -> str:
        """Return a text in colours, if there are any."""
        codes = ";".join(_CODES[style] for style in styles)
        return f"\x1b[{codes}m{text}\x1b[0m" if self.colours and codes and text else text


def card(plan: Plan, look: Look, following: str = "", rewrite: Callable[[str], str] = str, origin: str = "") -> str:
    """Return a plan in a few lines: device, split, peak, exactness, next.

    Args:
        plan: The plan.
        look: What the terminal can show.
        following: The command to type next.
        rewrite: Called with each text, to put flags in place of arguments.
        origin: Where the plan comes from, if it was not made just now.
    """
    lines = [
        *_line(look, "device", f"{plan.device.name}, {show_bytes(plan.budget_bytes)} to use"),
        *_line(look, "plan", _split(plan), "bold"),
        *_peak(look, plan),
        *_line(look, "exactness", plan.exactness, _colour_of(plan.exactness)),
    ]
    if origin:
        lines += _line(look, "planned", origin)
    for note in plan.notes:
        lines += _line(look, "note", _first_sentence(rewrite(note)))
    if following:
        lines += _line(look, "next", following, "bold")
    return "\n".join(lines)


def _line(look: Look, label: str, text: str, *styles: str) -> Iterator[str]:
    """Yield a label and its text, wrapped to the terminal."""
    text = one_line(text)
    rows = (
        [text] if look.columns is None else textwrap.wrap(text, max(20, look.columns - LABEL), break_on_hyphens=False)
    )
    for index, row in enumerate(rows or [""]):
        yield f"{label if not index else '':<{LABEL}}{look.paint(row, *styles)}"


def _split(plan: Plan) -> str:
    parts = [f"{times} of {size}" for size, times in Counter(plan.split).items()]
    steps = f"{plan.accumulation_steps} accumulation step{'s' * (plan.accumulation_steps > 1)}"
    return f"{steps}: {' and '.join(parts)} samples = {sum(plan.split)}{over_ranks(plan)}"


def _peak(look: Look, plan: Plan) -> Iterator[str]:
    """Yield the peak as a bar of the budget."""
    part = plan.predicted_peak_bytes / max(1, plan.budget_bytes)
    percent = f" {part:.0%}"
    sizes = f"{show_bytes(plan.predicted_peak_bytes)} of {show_bytes(plan.budget_bytes)}  "
    room = (look.columns or 80) - LABEL - len(sizes) - len(percent)
    cells = min(_MOST_BAR, room)
    bar = ""
    if cells >= _LEAST_BAR:
        full, empty = _BLOCKS if look.blocks else _ASCII
        filled = min(cells, int(part * cells + 0.5))
        bar = look.paint(full * filled, "green" if part <= 1 else "red") + empty * (cells - filled)
    yield f"{'peak':<{LABEL}}{look.paint(sizes, 'bold')}{bar}{percent}"
    yield from _line(look, "", _known_by(plan))


def _known_by(plan: Plan) -> str:
    predicted = f"predicted, {'reserved' if plan.on_cuda else 'committed'}"
    if plan.measured_peak_bytes is None:
        return f"{predicted}; not verified"
    error = (plan.evidence.this_process_peak_bytes or plan.predicted_peak_bytes) / plan.measured_peak_bytes - 1
    return f"{predicted}; {show_bytes(plan.measured_peak_bytes)} {place(plan)} ({error:+.1%})"


def _colour_of(exactness: str) -> str:
    if exactness.startswith(("exact (", "same distribution")):
        return "green"
    return "yellow" if exactness.startswith(("unknown", "unchecked", "exact")) else "red"


def _first_sentence(text: str) -> str:
    """Return a note's first sentence; `explain` has the rest."""
    head, stop, _ = text.partition(". ")
    return f"{head}." if stop else text
