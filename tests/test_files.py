"""Files that are whole or not there, and nothing left beside them for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from autoaccum.files import write_whole

WRITER = """
import sys, time
from autoaccum.files import write_whole

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
