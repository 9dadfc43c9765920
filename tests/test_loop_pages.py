"""Pages about loops and trainers: their blocks run and print what stands there; and the scripts in examples/."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import one_thread  # noqa: F401

from autoaccum.state.rng import put_rng, take_rng

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MOST_CHANGED_LINES = 5


@pytest.fixture(autouse=True)
def as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    dtype, rng = torch.get_default_dtype(), take_rng()
    yield
    torch.set_default_dtype(dtype)
    put_rng(rng)


def blocks_of(page: Path) -> Iterator[tuple[str, str, int]]:
    """Each program block of a page, the text block after it, and the line where it begins."""
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    for match, following in zip(found, [*found[1:], None], strict=True):
        if match[1] == "python":
            shown = following[2] if following is not None and following[1] == "text" else ""
            yield match[2], shown, text.count("\n", 0, match.start(2))


def printed_by(code: str, path: Path, line: int, names: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * line + code, str(path), "exec"), names)
    return out.getvalue()


def skip_without(trainer: str) -> None:
    """Skip a page or an example whose trainer is not installed."""
    if trainer in ("accelerate", "lightning"):
        pytest.importorskip(trainer)


@pytest.mark.parametrize("name", ["plain-loop.md", "training.md", "accelerate.md", "lightning.md"])
def test_a_page_prints_what_it_shows(name: str) -> None:
    page, names = ROOT / "docs" / name, {"__name__": "page"}
    skip_without(page.stem)
    for code, shown, line in blocks_of(page):
        assert printed_by(code, page, line, names) == shown, f"{page.name}:{line}"


def changed_lines(before: str, after: str) -> list[str]:
    """Lines of `after` that aren't in `before`, whatever their indentation."""
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in (before, after)]
    return [line for line in difflib.ndiff(*lines) if line.startswith("+ ")]


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "lightning_module"])
def test_an_example_changes_few_lines_and_runs(name: str) -> None:
    before, after = (ROOT / "examples" / folder / f"{name}.py" for folder in ("before", ""))
    skip_without(name.partition("_")[0])
    changed = changed_lines(before.read_text(), after.read_text())
    assert 0 < len(changed) <= MOST_CHANGED_LINES, changed
    for path in (before, after):
        assert "loss " in printed_by(path.read_text(), path, 0, {"__name__": "__main__"})
