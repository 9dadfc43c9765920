"""What a child process does about garbage while it imports torch."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import pytest

from autoaccum.processes import quick_imports

LARGE = "import gc\nwas_collecting = gc.isenabled()\nmade = [[] for _ in range(1000)]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(quick_imports, "_LARGE", {"large_module": True, "late_module": False, "failing_module": True})
    monkeypatch.setattr(quick_imports, "_waits", False)
    (tmp_path / "large_module.py").write_text(LARGE)
    (tmp_path / "late_module.py").write_text(LARGE)
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


def test_what_is_dropped_after_a_late_import_is_collected(folder: Path) -> None:
    class Model:
        def __init__(self) -> None:
            self.itself = self  # a cycle, as hooks make them

    model = Model()
    dropped = weakref.ref(model)
    import late_module  # type: ignore[import-not-found]

    assert not late_module.was_collecting and gc.isenabled()
    del model
    gc.collect()
    assert dropped() is None


def test_a_complete_workload_is_left_out_once_where_it_is_the_only_one(folder: Path) -> None:
    for one, left_out in ((False, False), (True, True)):
        quick_imports.install(one_workload=one)
        before, there = gc.get_freeze_count(), [[]]
        quick_imports.leave_out()
        assert (gc.get_freeze_count() > before) == left_out
        assert (id(there) in {id(each) for each in gc.get_objects()}) != left_out
    before = gc.get_freeze_count()
    quick_imports.leave_out()
    assert gc.get_freeze_count() <= before


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
    assert quick_imports._Finder().find_spec("json") is None
    assert quick_imports._LARGE == {"torch": True, "torch._dynamo": False}
