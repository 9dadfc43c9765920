"""The table of torch versions says what pytest's own report says, and a second run of what failed is added to it."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """
import os
import pytest

@pytest.mark.parametrize("path", ["a/b.py", "c d"])
def test_fails_at_first(path):
    assert os.environ.get("MENDED")

def test_passes():
    pass

@pytest.mark.skip(reason="torch 2.6.0 lacks\\n this")
@pytest.mark.parametrize("number", range(3))
def test_is_skipped(number):
    pass

@pytest.fixture
def broken():
    raise KeyError

def test_with_a_broken_fixture(broken):
    pass
"""


@pytest.fixture
def matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose tree and results are in a folder of the test's."""
    loader = importlib.machinery.SourceFileLoader("script_matrix", str(ROOT / "scripts" / "matrix"))
    spec = importlib.util.spec_from_loader("script_matrix", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_few.py").write_text(TESTS)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("read_results", "write_results"):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), folder=tmp_path / "results"))
    return module


def run(matrix: Any, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = matrix.run_tests(Path(sys.executable), ["-o", "addopts=", *arguments], tmp_path / "log")
    return found


def test_a_row_holds_what_failed_and_why_tests_were_skipped(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"torch": "2.6.0", "Python": "3.11.7", "CUDA build": "12.4", "commit": "abc", "remark": ""}
    first |= run(matrix, tmp_path, "tests")
    assert [first[name] for name in ("passed", "failed", "skipped")] == [1, 3, 3]
    names = json.loads(first["failures"])
    assert names[0] == "tests/test_few.py::test_fails_at_first[a/b.py]" and names[2].endswith("broken_fixture")
    assert json.loads(first["reasons"]) == {"torch 2.6.0 lacks this": 3}
    matrix.store({"torch": "2.15.0", "Python": "3.14.1", "passed": 9, "failed": 0, "skipped": 0}, "scripts/matrix")
    matrix.store(first, "scripts/matrix")

    monkeypatch.setenv("MENDED", "1")
    (stored, other) = matrix.read_results("torch-versions")
    assert matrix.existing(Path(sys.executable), [names[0], "tests/test_few.py::test_gone"]) == [names[0]]
    again = matrix.merged(stored, run(matrix, tmp_path, *json.loads(stored["failures"])), "def")
    path = matrix.store(again, "scripts/matrix")
    assert [again[name] for name in ("passed", "failed", "skipped")] == [3, 1, 3] and other["passed"] == 9
    assert again["remark"].startswith("3 failed at abc; run again at def: 2 passed")
    text = path.read_text()
    assert "| 2.6.0 | 3.11.7 | 12.4 | 3 | 1 | 3 |" in text and "- 3 x torch 2.6.0 lacks this" in text
    assert text.count("test_few.py::") == 1 and text.count("| 2.6.0 |") == text.count("| 2.15.0 |") == 1


def test_an_interrupted_run_says_that_it_is_not_whole(matrix: Any, tmp_path: Path) -> None:
    (tmp_path / "tests" / "test_few.py").write_text("def test_one(): pass\n\ndef test_two(): raise KeyboardInterrupt\n")
    found = run(matrix, tmp_path, "tests")
    assert found["remark"] == "not whole: pytest ended with 2" and not found["failed"]


def test_a_run_without_a_report_and_an_environment_without_torch_say_why(matrix: Any, tmp_path: Path) -> None:
    found = run(matrix, tmp_path, "--no-such-option")
    assert found["failed"] == 1 and "pytest ended with 4" in found["remark"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    with pytest.raises(matrix.NotInstalled, match="can't import torch: ModuleNotFoundError"):
        matrix.describe(tmp_path / "bare" / "bin" / "python")


def test_versions_that_are_not_in_the_list_are_refused(matrix: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["2.5.0"])
    assert "2.5.0 is not in the list: 2.6.0@3.11" in capsys.readouterr().err
