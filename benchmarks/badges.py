"""Draw the README's badges from what they state: `python -m benchmarks.badges`.

Python and the licence as pyproject.toml has them; torch from the lowest version that is allowed there to the highest
under which no test failed (the newest results/*-torch-versions.md). Writes docs/pictures/badge-*.svg.
"""

from __future__ import annotations

import html
import re
import tomllib

from .tables import DOCS, RESULTS

ROOT = DOCS.parent
CHARACTER, PAD, HEIGHT = 6.7, 9, 20  # pixels, of 11 px sans-serif
NAME, VALUE = "#444d58", "#0a6e4b"  # white text on both has a contrast above 6


def badges() -> dict[str, tuple[str, str]]:
    """Return each badge's name and value, by the name of its file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [each.rpartition(" ")[2] for each in project["classifiers"] if re.search(r":: 3\.\d+$", each)]
    lowest = next(re.split("[<>=~]+", each)[1] for each in project["dependencies"] if each.startswith("torch>="))
    table = max(RESULTS.glob("*-torch-versions.md")).read_text()
    tested = [
        (int(a), int(b)) for a, b in re.findall(r"^\| (\d+)\.(\d+)\.\S+ \|(?:[^|]*\|){3} 0 \|", table, re.MULTILINE)
    ]
    highest = ".".join(map(str, max(tested)))
    return {
        "python": ("python", f"{pythons[0]} to {pythons[-1]}"),
        "torch": ("torch", f"{lowest} to {highest}"),
        "license": ("license", project["license"]),
    }


def draw(name: str, value: str) -> str:
    """Return a badge as SVG."""
    left, right = (round(len(text) * CHARACTER) + 2 * PAD for text in (name, value))
    shown = [(html.escape(text), x) for text, x in ((name, left / 2), (value, left + right / 2))]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="{HEIGHT}" role="img" '
            f'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff" text-anchor="middle">',
            f"<title>{html.escape(name)}: {html.escape(value)}</title>",
            f'<clipPath id="r"><rect width="{left + right}" height="{HEIGHT}" rx="3"/></clipPath>',
            f'<g clip-path="url(#r)"><rect width="{left}" height="{HEIGHT}" fill="{NAME}"/>'
            f'<rect x="{left}" width="{right}" height="{HEIGHT}" fill="{VALUE}"/></g>',
            *(f'<text x="{x}" y="14">{text}</text>' for text, x in shown),
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Write the badges."""
    for file, (name, value) in badges().items():
        target = DOCS / "pictures" / f"badge-{file}.svg"
        target.write_text(draw(name, value))
        print(f"{target.relative_to(ROOT)}: {name} {value}")


if __name__ == "__main__":
    main()
