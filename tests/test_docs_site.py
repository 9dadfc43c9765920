"""The documentation's site: it is built without warnings, from nothing but this repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {path.name for path in ROOT.glob("docs/*.md")}


def test_the_site_is_built_without_warnings_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    build = subprocess.run(
        [ROOT / "scripts" / "docs", "--site-dir", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert build.returncode == 0 and not build.stderr.strip() and not build.stdout.strip(), build.stderr + build.stdout
    reference = (tmp_path / "reference.html").read_text()
    assert "target_batch" in reference and "Hold a model and all that its optimizer step needs." in reference
    assert "autoaccum virtual-gpu" in (tmp_path / "cli.html").read_text()
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(
            r'(?:<script[^>]+src|<link[^>]+rel="stylesheet"[^>]+href)="(https?://[^"]+)"', page.read_text()
        )
        assert not loaded, (page.name, loaded)
