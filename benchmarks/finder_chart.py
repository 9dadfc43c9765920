"""Draw what each batch size finder's search costs: `python -m benchmarks.finder_chart`.

Reads the newest `results/*-search-cost.csv`, and writes docs/pictures/finders-light.svg and finders-dark.svg.
"""

from __future__ import annotations

import csv
import html
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean

from .tables import DOCS, RESULTS

SHOWN = (  # as they come, without variants of their arguments
    "autoaccum",
    "Lightning power",
    "Lightning binsearch",
    "Accelerate",
    "Accelerate, halving",
    "toma",
    "batch-finder",
    "batch-probe of the training",
    "autotrainer",
    "Ultralytics autobatch",
)
THEMES = {  # text, faint text, autoaccum's bar, others' bars
    "light": ("#1c2330", "#5c6675", "#0a7d55", "#b3bcc8"),
    "dark": ("#e6eaed", "#9aa4b1", "#4cc38a", "#56616f"),
}
WIDTH, ROW, TOP = 900, 27, 62
NAMES, PASSES, ERRORS, RESULT = 205, 215, 505, 785  # where each column begins
LONGEST_BAR = 210


@dataclass(frozen=True)
class Finder:
    """The means of one finder's searches.

    Attributes:
        passes: Forward passes per search.
        errors: Out-of-memory errors per search.
        trained: Cases in which a new process trained at the size found.
        cases: Cases in which it found a size.
    """

    name: str
    passes: float
    errors: float
    trained: int
    cases: int


def finders(rows: list[dict[str, str]]) -> list[Finder]:
    """Average each shown finder's rows, those without an answer left out."""
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if row["found"].isdigit():
            groups[row["finder"]].append(row)
    return [
        Finder(
            name,
            fmean(int(row["forward"]) for row in groups[name]),
            fmean(int(row["ooms"]) for row in groups[name]),
            sum(row["afresh"].startswith("yes") for row in groups[name]),
            len(groups[name]),
        )
        for name in SHOWN
        if groups[name]
    ]


def svg(found: list[Finder], theme: str, caption: str) -> str:
    """Draw the finders as horizontal bars."""
    text, faint, own, other = THEMES[theme]
    height = TOP + ROW * len(found) + 34
    most_passes = max(each.passes for each in found)
    most_errors = max(each.errors for each in found) or 1.0
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui,sans-serif" font-size="14" role="img">',
        f"<title>{html.escape(caption)}</title>",
    ]

    def write(x: float, y: float, words: str, fill: str = text, more: str = "") -> None:
        lines.append(f'<text x="{x:g}" y="{y:g}" fill="{fill}" {more}>{html.escape(words)}</text>')

    bold = 'font-weight="600"'
    write(PASSES, 24, "forward passes per search", text, bold)
    write(ERRORS, 24, "out-of-memory errors per search", text, bold)
    write(RESULT, 24, "trains afresh", text, bold)
    for place, each in enumerate(found):
        y = TOP + ROW * place
        fill, weight = (own, bold) if each.name == "autoaccum" else (other, "")
        write(NAMES - 6, y + 5, each.name, text, f'text-anchor="end" {weight}')
        for x, value, most in ((PASSES, each.passes, most_passes), (ERRORS, each.errors, most_errors)):
            length = LONGEST_BAR * value / most
            lines.append(f'<rect x="{x}" y="{y - 8}" width="{length:.1f}" height="16" rx="2" fill="{fill}"/>')
            write(x + length + 6, y + 5, f"{value:.1f}".removesuffix(".0"), text, weight)
        write(RESULT, y + 5, f"{each.trained} of {each.cases}", text, weight)
    write(6, height - 10, caption, faint, 'font-size="12"')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Write both pictures."""
    path = max(RESULTS.glob("*-search-cost.csv"))
    with path.open(newline="") as file:
        found = finders(list(csv.DictReader(file)))
    caption = (
        "Means over the models of python -m benchmarks.search_cost; real allocator on a virtual GPU. "
        f"Drawn from {path.name}."
    )
    for theme in THEMES:
        target = DOCS / "pictures" / f"finders-{theme}.svg"
        target.write_text(svg(found, theme, caption))
        print(target)


if __name__ == "__main__":
    main()
