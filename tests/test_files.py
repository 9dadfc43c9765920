"""Files that are whole or not there, and nothing left beside them for long."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from strategies import made_up_plan
from typer.testing import CliRunner

from autoaccum import UsageError
from autoaccum.cli import app
from autoaccum.files.whole import check_output, write_whole
from autoaccum.processes import child

WRITER = """
import sys, time
from autoaccum.files.whole import write_whole

def content(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)

write_whole(sys.argv[1], content)
"""


def _begin(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    (left,) = target.parent.glob(".*.part")
    os.utime(left, (0, 0))  # as if it had been there for long
    return process


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    target = tmp_path / "file [1].pt"
    write_whole(target, b"old")
    process = _begin(target)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(tmp_path.iterdir())) == 2 and target.read_bytes() == b"old"
    write_whole(target, b"new")
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"new"


def test_what_a_living_writer_writes_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "file.pt"
    process = _begin(target)
    write_whole(target, b"mine")
    assert len(list(tmp_path.glob(".*.part"))) == 1
    process.kill()
    process.communicate()
    write_whole(target, b"mine again")
    assert list(tmp_path.iterdir()) == [target]


def test_other_files_of_that_look_are_not_touched(tmp_path: Path) -> None:
    others = [tmp_path / name for name in (".file.pt", ".file.pt.notes", ".other.x.part", "file.pt.x.part")]
    for other in others:
        other.write_text("")
        os.utime(other, (0, 0))
    write_whole(tmp_path / "file.pt", b"")
    assert all(other.exists() for other in others)


# --- links, devices, pipes -----------------------------------------------------------------------------------------


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    target, link, second = tmp_path / "target", tmp_path / "link", tmp_path / "second"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to("target")
    second.symlink_to(link)
    with pytest.raises(UsageError, match="exists already"):
        check_output(second)
    check_output(second, force=True)
    write_whole(second, b"new")
    assert target.read_bytes() == b"new" and second.is_symlink() and link.is_symlink() and not target.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("leads_to", ["nowhere", "missing/folder", "itself"])
def test_a_link_to_nothing_is_refused_and_stays(leads_to: str, tmp_path: Path) -> None:
    link = tmp_path / "itself"
    link.symlink_to(leads_to)
    for attempt in (lambda: check_output(link), lambda: check_output(link, force=True), lambda: write_whole(link, b"")):
        with pytest.raises(UsageError, match="can't be written"):
            attempt()
    assert list(tmp_path.iterdir()) == [link] and link.is_symlink()


def test_another_users_link_where_everybody_may_make_some_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to("target")
    tmp_path.chmod(0o1777)
    write_whole(tmp_path / "link", b"mine")
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    if os.getuid():
        write_whole(tmp_path / "link", b"mine")  # the folder's owner made it
        return
    os.chown(tmp_path / "link", 4_000_001, -1, follow_symlinks=False)
    with pytest.raises(UsageError, match="another user's link"):
        check_output(tmp_path / "link", force=True)


def test_a_pipe_is_written_into_and_stays(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    check_output(pipe)  # nothing is lost there, so no --force is asked for
    write_whole(pipe, b"plan")
    reader.join(10)
    assert read == [b"plan"] and stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize(("minor", "full"), [(3, False), (7, True)])
def test_a_device_is_written_into_and_stays(minor: int, full: bool, tmp_path: Path) -> None:
    device = tmp_path / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        device.open("wb").close()
    except OSError:
        pytest.skip("no devices can be made here")
    check_output(device)
    if full:
        with pytest.raises(UsageError, match="can't be written"):
            write_whole(device, b"plan")
    else:
        write_whole(device, b"plan")
    assert stat.S_ISCHR(device.stat().st_mode) and list(tmp_path.iterdir()) == [device]


def test_a_disk_is_refused(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 77))
    except OSError:
        pytest.skip("no devices can be made here")
    with pytest.raises(UsageError, match="is a disk"):
        check_output(tmp_path / "disk", force=True)
    with pytest.raises(UsageError, match="is a disk"):
        write_whole(tmp_path / "disk", b"")


def test_an_open_file_is_written_on_not_replaced(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb", buffering=0) as out:  # as stdout is, where a shell sends it to a file
        out.write(b"before ")
        write_whole(f"/dev/fd/{out.fileno()}", b"plan")
        assert os.fstat(out.fileno()).st_ino == (tmp_path / "out").stat().st_ino
    assert (tmp_path / "out").read_bytes() == b"before plan"


def test_a_planted_pipe_beside_the_target_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".file.pt.x.part")
    write_whole(tmp_path / "file.pt", b"new")
    assert (tmp_path / "file.pt").read_bytes() == b"new"


# --- outputs are tried before the work -----------------------------------------------------------------------------

COMMANDS = {
    "plan": ["plan", "--target-batch", "8", "-o"],
    "tune": ["tune", "--target-batch", "8", "-o"],
    "run": ["run", "plan.json", "--checkpoint"],
    "report": ["report", "plan.json", "-o"],
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def call(task: str, arguments: Any, **how: Any) -> dict[str, Any]:
        raise AssertionError(f"{task} was begun")

    monkeypatch.setattr(child, "call", call)
    monkeypatch.setattr("autoaccum.tuning.compare.comparison.call", call)
    monkeypatch.setattr("autoaccum.reporting.write", lambda plan, path: call("report", None))
    monkeypatch.chdir(tmp_path)
    made_up_plan(workload="digits").save("plan.json")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("output", ["missing/out.html", "plan.json/out.html", "folder.html", f"{'x' * 300}.html"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(command: str, output: str) -> None:
    Path("folder.html").mkdir()
    found = CliRunner().invoke(app, [*COMMANDS[command], output])
    assert isinstance(found.exception, UsageError), found.exception
    assert "no folder" in found.exception.what or "can't be written" in found.exception.what


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_rights_is_found_before_the_work(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkstemp(**how: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    found = CliRunner().invoke(app, [*COMMANDS[command], "out.html"])
    assert isinstance(found.exception, UsageError) and "Permission denied" in found.exception.why


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_a_plan_that_cannot_be_written_after_all_is_printed(
    json: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = made_up_plan(), tmp_path / "gone"
    folder.mkdir()

    def call(task: str, arguments: Any, **how: Any) -> dict[str, Any]:
        shutil.rmtree(folder)
        return {"plan": plan.to_json()}

    monkeypatch.setattr(child, "call", call)
    found = CliRunner().invoke(app, ["plan", "--target-batch", "512", "-o", str(folder / "plan.json"), *json])
    assert isinstance(found.exception, UsageError) and "on stdout" in found.exception.hint
    assert type(plan).from_json(found.stdout) == plan
