"""What a user's file and a user's machine do wrong is said in our words, with the user's own line."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoaccum.errors import UsageError
from autoaccum.processes import child, error_origin, standard_streams
from autoaccum.processes.workload_source import load_workload

FILES = {
    "no_text": "class Bad(Exception):\n    def __str__(self):\n        1 / 0\ndef workload():\n    raise Bad\n",
    "relative": "from .models import net\ndef workload(): ...\n",
    "syntax": "import torch\ndef workload(:\n    pass\n",
    "exits": "import sys\ndef workload():\n    sys.exit(0)\n",
    "exits_at_once": "import sys\nsys.exit('no data')\ndef workload(): ...\n",
    "deep": "import torch\ndef workload():\n    torch.nn.Linear(4, 2)(torch.ones(3, 3))\n",
    "missing": "import there_is_no_such_module\ndef workload(): ...\n",
    "generator_exit": "def workload():\n    raise GeneratorExit\n",
    "null_byte": "def workload():\n    '\0'\n",
    "own_exception": "def workload():\n    raise type('Ow\\nn', (Exception,), {})('a\\nb')\n",
}


def explained(folder: Path, name: str) -> tuple[str, str, str]:
    file = folder / f"{name}.py"
    file.write_text(FILES[name])
    try:
        load_workload(f"{file}:workload")
    except BaseException as error:
        found = child._described(error)
        json.dumps(found)
        return found["what"], found["why"], found["hint"]
    raise AssertionError("it was loaded")


@pytest.mark.parametrize(
    ("name", "line", "what", "hint"),
    [
        ("no_text", 5, "Bad: (its text can't be shown: asking for it raised ZeroDivisionError)", "--traceback"),
        ("relative", 1, "attempted relative import", "loaded by itself, not as a part of a package"),
        ("syntax", 2, "SyntaxError: invalid syntax", "Mend"),
        ("exits", 3, "ended the process: sys.exit(0)", "Raise an exception"),
        ("exits_at_once", 2, "ended the process: sys.exit('no data')", "Raise an exception"),
        ("deep", 3, ": mat1 and mat2 shapes", "--traceback"),
        ("missing", 1, "No module named 'there_is_no_such_module'", "Install there_is_no_such_module"),
        ("generator_exit", 2, "GeneratorExit", "--traceback"),
    ],
)
def test_an_error_names_the_users_own_line(name: str, line: int, what: str, hint: str, tmp_path: Path) -> None:
    said = explained(tmp_path, name)
    assert what in said[0] and hint in said[2]
    assert f"{tmp_path / name}.py:{line}" in said[1]
    assert name != "deep" or "linear.py" in said[1]


def test_what_has_no_line_is_said_without() -> None:
    assert error_origin.explained(ValueError())[0] == "ValueError"
    assert error_origin.explained(ValueError())[1] == ""
    assert error_origin.explained(SystemExit())[0].endswith("sys.exit().")


def test_a_lack_of_room_is_reported_with_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[int, int] = {resource.RLIMIT_AS: 300 << 20, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(error_origin.resource, "getrlimit", lambda which: (limits[which], limits[which]))
    _, why, hint = error_origin.explained(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert "limited to 300.0 MiB (ulimit -v)" in why and "Raise that limit" in hint
    assert "300.0 MiB" in error_origin.explained(MemoryError())[1]
    assert "300.0 MiB" not in error_origin.explained(ImportError("no such thing"))[1]
    full = OSError(28, "No space left on device", "/cache/library.so")
    assert "no room for /cache/library.so" in error_origin.explained(full)[1]


def with_pipe(work: Callable[[int], None]) -> int | None:
    """What a child's pipe is taken for after some code has run."""
    reading, writing = os.pipe()
    pipe = child._out_of_reach(writing)
    before = child._identity(pipe)
    try:
        work(pipe)
        return None if child._identity(pipe) == before else 0
    finally:
        for descriptor in (reading, pipe):
            if child._identity(descriptor) is not None:
                os.close(descriptor)


def test_the_childs_pipe_is_out_of_reach_and_no_other_file_is_taken_for_it(tmp_path: Path) -> None:
    assert with_pipe(lambda pipe: None) is None
    numbers: list[int] = []
    with_pipe(numbers.append)
    assert numbers[0] > 255

    def reopened(pipe: int) -> None:
        os.close(pipe)
        with (tmp_path / "log").open("w") as file:
            os.dup2(file.fileno(), pipe)

    assert with_pipe(os.close) == 0 and with_pipe(reopened) == 0
    assert "closed" in str(child._died("plan", child.CLOSED, "mine.py:workload"))
    assert "the code of mine.py:workload" in str(child._died("plan", 3, "mine.py:workload"))


CLOSES = """
import os
from autoaccum import Workload
import torch

def workload():
    os.closerange({first}, {last})
    return Workload(torch.nn.Linear(4, 2), (torch.randn(4, 4), torch.randint(2, (4,))))
"""


@pytest.mark.parametrize(
    ("first", "last", "code"), [(0, 256, 0), pytest.param(3, 1 << 16, 1, marks=pytest.mark.slow)], ids=str
)
def test_a_workload_may_close_what_it_finds(first: int, last: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CLOSES.format(first=first, last=last))
    command = [sys.executable, "-m", "autoaccum", "check", "--workload", "mine.py:workload"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == code and "Traceback" not in out.stderr, out.stderr
    assert (out.stdout if code == 0 else out.stderr).count("exact" if code == 0 else "mine.py:workload") >= 1


LIST = [sys.executable, "-m", "autoaccum", "doctor", "--gpus"]


def test_results_that_cannot_be_printed_are_an_error_of_ours() -> None:
    with Path("/dev/full").open("w") as full:
        out = subprocess.run(LIST, stdout=full, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 1 and "can't be written to standard output" in out.stderr
    assert "No space left" in out.stderr and "autoaccum's own" not in out.stderr and "Exception" not in out.stderr


def test_whoever_reads_may_stop_and_streams_may_be_closed() -> None:
    shell = " ".join(LIST)
    out = subprocess.run(["bash", "-c", f"{shell} | true; {shell} >&- <&-"], capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "")
    assert subprocess.run(["bash", "-c", f"{shell} >&- 2>&- <&-"]).returncode == 0


def test_missing_streams_are_opened_for_processes_too() -> None:
    source = (
        "import os, subprocess, sys\nos.closerange(0, 3)\nsys.stdout = sys.stderr = None\n"
        "from autoaccum.processes import standard_streams\nstandard_streams.open_missing()\n"
        "print('x', file=sys.stderr)\n"
        "raise SystemExit(subprocess.call([sys.executable, '-c', 'import os; [os.fstat(n) for n in range(3)]']))"
    )
    assert subprocess.run([sys.executable, "-c", source]).returncode == 0
    assert standard_streams.is_lost(sys.stdout) is False


@pytest.mark.parametrize("content", [b"not a study", b"\0" * 100, b"SQLite format 2\0"], ids=repr)
def test_a_foreign_study_is_refused_at_once(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoaccum import tune

    def started(*args: Any, **how: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("autoaccum.processes.child.call", started)
    (tmp_path / "study.db").write_bytes(content)
    with pytest.raises(UsageError, match="is not a SQLite file"):
        tune("digits", target_batch=64, study=tmp_path / "study.db")
    with pytest.raises(UsageError, match="is a folder"):
        tune("digits", target_batch=64, study=tmp_path)
    assert (tmp_path / "study.db").read_bytes() == content
