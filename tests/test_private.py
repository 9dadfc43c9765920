"""What is preloaded or locked is the user's own: folders, compiled libraries, lock files."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoaccum import UsageError
from autoaccum.devices import virtual
from autoaccum.devices.compiled_library import DIGEST
from autoaccum.devices.virtual import build
from autoaccum.files.private import lock_file, private_folder, runtime_folder
from autoaccum.tuning.study import timing_lock

MODE = 0o777
NAME = build.LIBRARY.name


def test_a_private_folder_is_made_or_made_private(tmp_path: Path) -> None:
    (tmp_path / "cache" / "autoaccum").mkdir(parents=True)
    (tmp_path / "cache" / "autoaccum").chmod(0o755)  # as an earlier version made it
    made = private_folder(tmp_path / "cache", "autoaccum", "virtual")
    assert made == tmp_path / "cache" / "autoaccum" / "virtual"
    assert [path.stat().st_mode & MODE for path in (made, made.parent)] == [0o700, 0o700]
    (tmp_path / "link").symlink_to(tmp_path / "cache")  # the user's own: a cache on another disk
    assert private_folder(tmp_path / "link", "autoaccum") == made.parent


def planted_link(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "autoaccum").symlink_to(folder / "elsewhere")


def planted_file(folder: Path) -> None:
    (folder / "autoaccum").write_text("")


def planted_folder(folder: Path) -> None:
    (folder / "autoaccum").mkdir()
    (folder / "autoaccum").chmod(0o770)


def open_above(folder: Path) -> None:
    folder.chmod(0o777)


@pytest.mark.parametrize("plant", [planted_link, planted_file, planted_folder, open_above])
def test_what_others_can_write_to_is_refused(plant: Callable[[Path], None], tmp_path: Path) -> None:
    plant(tmp_path)
    with pytest.raises(UsageError, match=r"is a link|is no folder|so others can|File exists"):
        private_folder(tmp_path, "autoaccum")


def test_what_belongs_to_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "autoaccum").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    with pytest.raises(UsageError, match="belongs to"):
        private_folder(tmp_path, "autoaccum")


def test_a_sticky_folder_will_do(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    assert private_folder(tmp_path, "autoaccum").stat().st_mode & MODE == 0o700


# --- the compiled library ------------------------------------------------------------------------------------------

Spoil = Callable[[Path], None]


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A cache with a library that a compiler of the test's made; and how often it did."""
    calls: list[Path] = []

    def compiles(torch: Any, making: Path) -> None:
        calls.append(making)
        for name in (NAME, build._STUBS):
            (making / name).write_bytes(b"compiled " * 100)
        build.LIBRARY.seal(making)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_torch", lambda: None)
    monkeypatch.setattr(build, "_key", lambda torch: "key")
    monkeypatch.setattr(build, "_compile", compiles)
    build.built_library()
    return calls


def replaced(folder: Path) -> None:
    (folder / NAME).write_bytes(b"elsewhere " * 90)


def truncated(folder: Path) -> None:
    os.truncate(folder / NAME, 10)


def empty(folder: Path) -> None:
    (folder / NAME).write_bytes(b"")


def more(folder: Path) -> None:
    (folder / "libc.so.6").write_bytes(b"found first along LD_LIBRARY_PATH")


def aliased(folder: Path) -> None:
    (folder / build.ALIASES[0]).unlink()
    (folder / build.ALIASES[0]).symlink_to("/elsewhere.so")


def without_digest(folder: Path) -> None:
    (folder / DIGEST).unlink()


@pytest.mark.parametrize("spoil", [replaced, truncated, empty, more, aliased, without_digest])
def test_a_library_that_is_not_what_was_compiled_is_compiled_anew(spoil: Spoil, compiled: list[Path]) -> None:
    library = build.built_library()
    assert len(compiled) == 1
    with library.open("rb") as held:  # as by a process that has loaded it
        before = os.fstat(held.fileno()).st_size
        spoil(library.parent)
        assert build.built_library() == library and len(compiled) == 2
        assert library.read_bytes() == b"compiled " * 100
        assert os.fstat(held.fileno()).st_size in (before, 10, 0, 900)
    assert build.built_library() == library and len(compiled) == 2
    assert [path.name for path in library.parent.parent.iterdir()] == ["key"]


def linked(folder: Path) -> None:
    shutil.copy(folder / NAME, folder.parent / "elsewhere.so")
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(folder.parent / "elsewhere.so")


def group_writable(folder: Path) -> None:
    (folder / NAME).chmod(0o660)


def linked_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def linked_above(folder: Path) -> None:
    above = folder.parent
    above.rename(above.parent / "elsewhere")
    above.symlink_to(above.parent / "elsewhere")


def open_folder(folder: Path) -> None:
    folder.chmod(0o777)


@pytest.mark.parametrize("spoil", [linked, group_writable, linked_folder, linked_above, open_folder])
def test_a_library_that_may_be_anothers_is_refused(spoil: Spoil, compiled: list[Path]) -> None:
    spoil(build.built_library().parent)
    with pytest.raises(UsageError, match=r"is no folder|is no file|so others can write"):
        build.built_library()
    assert len(compiled) == 1


def test_another_users_library_is_refused(compiled: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    with pytest.raises(UsageError, match="belongs to"):
        build.built_library()


INIT = "import ctypes; raise SystemExit(ctypes.CDLL('libcuda.so.1').cuInit(0))"


@pytest.mark.skipif(virtual.available() is not None, reason=str(virtual.available()))
@pytest.mark.slow
def test_a_truncated_library_is_rebuilt_before_a_process_maps_it(tmp_path: Path) -> None:
    """Mapped as it is, it would end every process on a virtual GPU by SIGBUS."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "autoaccum", "virtual-gpu", "--memory", "1GiB", "--", sys.executable, "-c", INIT]

    def run() -> Path:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stderr) == (0, "")
        (library,) = tmp_path.rglob(NAME)
        return library

    whole = run().read_bytes()
    (library,) = tmp_path.rglob(NAME)
    os.truncate(library, 4096)
    assert len(run().read_bytes()) == len(whole)


# --- locks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_lock_lies_in_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    assert runtime_folder() == tmp_path
    for mode in (0o755, 0o777, 0o500):
        tmp_path.chmod(mode)
        if mode != 0o777 and (mode != 0o500 or os.geteuid()):
            assert runtime_folder() == tmp_path / "cache" / "autoaccum" / "run"
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert runtime_folder() == tmp_path / "cache" / "autoaccum" / "run"


@pytest.mark.usefixtures("no_runtime_folder")
def test_a_link_where_the_lock_belongs_makes_nothing(tmp_path: Path) -> None:
    target, lock = tmp_path / "made", runtime_folder() / "autoaccum.lock"
    lock.symlink_to(target)
    with pytest.raises(UsageError, match="it is a link"), timing_lock(None):
        pass
    (tmp_path / "study.db.lock").symlink_to(target)
    with pytest.raises(UsageError, match="it is a link"), timing_lock(str(tmp_path / "study.db")):
        pass
    assert not target.exists()


def test_a_lock_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(UsageError, match="a FIFO"), lock_file(tmp_path / "lock"):
        pass


@pytest.mark.usefixtures("no_runtime_folder")
def test_the_lock_still_locks() -> None:
    with timing_lock(None), lock_file(runtime_folder() / "autoaccum.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with timing_lock(None):
        pass
