"""Hooks of the documentation's build: the command line's reference, and links that leave the folder docs/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMANDS = "<!-- commands -->"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in the commands, and print the targets of links that the site doesn't contain."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return LINK.sub(lambda found: _link(found, Path(page.file.abs_src_path).parent), markdown)


def commands() -> str:
    """Return the reference of the command line, as typer prints it."""
    call = [sys.executable, "-m", "typer", "autoaccum.cli", "utils", "docs", "--name", "autoaccum"]
    text = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    return text.partition("\n")[2]  # without its title, which the page has


def _link(found: re.Match[str], folder: Path) -> str:
    """Keep a link within docs/, and turn one that leads to the repository into the file's name."""
    label, target = found.groups()
    if "://" in target or target.startswith(("#", "mailto:")):
        return found.group()
    path = (folder / target.partition("#")[0]).resolve()
    if path.is_relative_to(DOCS):
        return found.group()
    return f"{label} (`{path.relative_to(DOCS.parent)}` in the repository)"
