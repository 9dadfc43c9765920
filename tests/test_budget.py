"""The budget on a CPU: which limits there are, which is the tightest, and what is said of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoaccum.budget import Budget, BudgetItem
from autoaccum.devices.cpu import budget
from autoaccum.devices.cpu.budget import read_cpu_budget
from autoaccum.errors import UsageError

MIB, GIB = 2**20, 2**30
MAX = "max"


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the limits that are found."""

    def set_limits(**limits: int) -> None:
        found = [BudgetItem(name, size, f"why {name}") for name, size in limits.items()]
        monkeypatch.setattr(budget, "_limits", lambda: list(found))

    return set_limits


def terms(found: Budget) -> dict[str, int]:
    return {term.name: term.bytes for term in found.terms}


def test_the_tightest_limit_binds_and_every_number_has_its_reason(only: Any) -> None:
    only(available=900, cgroup=800)
    found = read_cpu_budget()
    assert (found.bytes, found.limit_bytes, found.headroom_bytes, found.binding_constraint) == (720, 800, 80, "cgroup")
    assert terms(found) == {"available": 900, "cgroup": 800, "headroom": 80}
    assert all(term.why for term in found.terms)


def test_memory_that_was_named_is_used_whole_where_it_is_the_tightest(only: Any) -> None:
    only(available=8 * GIB)
    found = read_cpu_budget("2GiB")
    assert (found.bytes, found.headroom_bytes, found.binding_constraint) == (2 * GIB, 0, "asked")


def test_memory_that_was_named_beyond_what_is_there_does_not_make_it_more(only: Any) -> None:
    only(available=GIB)
    found = read_cpu_budget(4 * GIB)
    assert found.binding_constraint == "available"
    assert found.bytes == GIB - GIB // 10


@pytest.mark.parametrize(("headroom", "kept"), [("25%", 250), (100, 100), ("0", 0), (0, 0), ("0%", 0), ("100B", 100)])
@pytest.mark.parametrize("memory", [None, 1000])
def test_a_headroom_is_bytes_or_a_part_of_the_limit(
    only: Any, memory: int | None, headroom: str | int, kept: int
) -> None:
    only(available=1000)
    found = read_cpu_budget(memory, headroom)
    assert (found.headroom_bytes, found.bytes) == (kept, 1000 - kept)
    assert found.terms[-1] == BudgetItem("headroom", kept, f"you asked for {headroom}")


@pytest.mark.parametrize(
    ("memory", "headroom"),
    [("lots", None), (0, None), ("-2GiB", None), (1000, 1000), (1000, "2KiB"), (1000, "100%"), (1000, "some")],
)
def test_what_leaves_nothing_or_cannot_be_read_is_an_error_in_three_parts(
    only: Any, memory: str | int | None, headroom: str | int | None
) -> None:
    only(available=5000)
    with pytest.raises(UsageError) as raised:
        read_cpu_budget(memory, headroom)
    assert all((raised.value.what, raised.value.why, raised.value.hint))


def in_a_child(limit: str, size: int) -> dict[str, Any]:
    code = (
        "import json, resource, sys\n"
        f"resource.setrlimit(resource.{limit}, ({size}, {size}))\n"
        "from autoaccum.devices.cpu.budget import read_cpu_budget, committed_bytes, _address_space_bytes\n"
        "found = read_cpu_budget()\n"
        "print(json.dumps({'binds': found.binding_constraint, 'bytes': found.bytes, 'limit': found.limit_bytes,\n"
        "    'files': _address_space_bytes() - committed_bytes(), 'why': {t.name: t.why for t in found.terms}}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_limit_of_data_is_found_and_is_the_limit() -> None:
    found = in_a_child("RLIMIT_DATA", 200 * MIB)
    assert (found["binds"], found["limit"], found["bytes"]) == ("data limit", 200 * MIB, 180 * MIB)
    assert "RLIMIT_DATA" in found["why"]["data limit"]


def test_a_limit_of_address_space_is_found_less_the_mapped_files() -> None:
    found = in_a_child("RLIMIT_AS", 300 * MIB)
    assert found["binds"] == "address space limit"
    assert found["limit"] == pytest.approx(300 * MIB - found["files"], abs=2 * MIB)
    assert 0 < found["limit"] < 300 * MIB
    assert "RLIMIT_AS" in found["why"]["address space limit"]


def group(folder: Path, limit: str, used: int = 0, inactive_file: int | None = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    if inactive_file is not None:
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A process's /proc/self/cgroup, which names /a/b of version 2, beside one of version 1."""
    path = tmp_path / "cgroup"
    path.write_text("4:memory:/elsewhere\n0::/a/b\n")
    return path


def test_a_nested_cgroup_is_bound_by_the_tightest_about_it(tmp_path: Path, own: Path) -> None:
    root = tmp_path / "fs"
    group(root / "a/b", "1000", 100)
    group(root / "a", "2000", 1500, inactive_file=200)
    assert budget._cgroup_bytes(root, own) == (2000, 1300)
    group(root / "a", "3000", 1500)
    assert budget._cgroup_bytes(root, own) == (1000, 100)


def test_a_cgroup_without_a_limit_does_not_count(tmp_path: Path, own: Path) -> None:
    root = tmp_path / "fs"
    group(root / "a/b", MAX, 10)
    group(root / "a", MAX, 10)
    assert budget._cgroup_bytes(root, own) is None
    group(root / "a", "500", 10)
    assert budget._cgroup_bytes(root, own) == (500, 10)


def test_a_limit_above_the_root_is_not_this_processs(tmp_path: Path, own: Path) -> None:
    group(tmp_path / "fs", "7", 1)
    group(tmp_path, "3", 1)
    assert budget._cgroup_bytes(tmp_path / "fs", own) == (7, 1)


def test_a_limit_counts_though_the_kernel_does_not_say_what_is_cache(tmp_path: Path, own: Path) -> None:
    group(tmp_path / "fs/a/b", "1000", 400, inactive_file=None)
    assert budget._cgroup_bytes(tmp_path / "fs", own) == (1000, 400)


def test_no_cgroup_of_version_2_is_no_limit(tmp_path: Path, own: Path) -> None:
    assert budget._cgroup_bytes(tmp_path / "fs", tmp_path / "missing") is None
    assert budget._cgroup_bytes(tmp_path / "fs", own) is None
    own.write_text("4:memory:/elsewhere\n")
    assert budget._cgroup_bytes(tmp_path / "fs", own) is None


def test_version_1_of_cgroups_is_read_too(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "memory/jobs/mine"
    own.write_text("5:cpu:/jobs\n4:memory,hugetlb:/jobs/mine\n")
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert budget._cgroup_bytes(tmp_path, own) is None
    (folder.parent / "memory.limit_in_bytes").write_text("5000\n")
    (folder.parent / "memory.usage_in_bytes").write_text("700\n")
    (folder.parent / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 200\n")
    assert budget._cgroup_bytes(tmp_path, own) == (5000, 500)


def test_what_others_in_the_cgroup_use_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "read_memory", lambda: (700 * MIB, 500 * MIB))
    monkeypatch.setattr(budget, "_cgroup_bytes", lambda: (1000 * MIB, 600 * MIB))
    found = {term.name: term for term in budget._limits()}
    assert found["cgroup"].bytes == 900 * MIB  # of 600 used, 500 are this process's own
    assert found["available"].bytes > 500 * MIB
