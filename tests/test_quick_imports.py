"""What a child process does about garbage while it imports torch."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from autoaccum.processes import quick_imports

LARGE = "import gc\nwas_collecting = gc.isenabled()\nmade = [[] for _ in range(1000)]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(quick_imports, "_LARGE", ("large_module", "failing_module"))
    (tmp_path / "large_module.py").write_text(LARGE)
    (tmp_path / "small_module.py").write_text(LARGE)
    (tmp_path / "failing_module.py").write_text("raise ImportError('no')")
    quick_imports.install()
    return tmp_path


def test_nothing_is_collected_while_a_large_module_is_imported_nor_its_objects_afterwards(folder: Path) -> None:
    import small_module  # type: ignore[import-not-found]

    before = gc.get_freeze_count()
    import large_module  # type: ignore[import-not-found]

    assert small_module.was_collecting and not large_module.was_collecting and gc.isenabled()
    assert gc.get_freeze_count() > before + 1000
    seen = {id(each) for each in gc.get_objects()}
    assert id(large_module.made) not in seen and id(folder) not in seen


@pytest.mark.parametrize("collects", [True, False])
def test_an_import_that_fails_leaves_the_collector_as_it_was(folder: Path, collects: bool) -> None:
    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(ImportError, match="no"):
            import failing_module  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was else gc.disable)()


def test_only_large_modules_are_looked_for() -> None:
    assert quick_imports._Finder().find_spec("json") is None and {"torch", "torch._dynamo"} == set(quick_imports._LARGE)
