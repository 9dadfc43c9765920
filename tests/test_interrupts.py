"""SIGINT and SIGTERM: every command ends with 130 or 143, whenever they come and whatever drops the exception."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import TINY

from autoaccum.processes import child, early_signals, interrupts

SWALLOWS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(own.pid, flush=True)
time.sleep(60)
"""
DROPS = """
import gc, os, signal, time, weakref
from autoaccum.processes import interrupts
interrupts.watch(end_if_dropped=True)
class Thing: pass
def send(): os.kill(os.getpid(), signal.{name}); time.sleep(0.01)
weakref.finalize(Thing(), send)  # raised in a weak reference's callback, which Python prints and forgets
print("went on", flush=True)
time.sleep(60)
"""

EARLY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Sends:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Sends())
before = set(sys.modules)
from autoaccum.__main__ import main
print(*sorted({{"typing", "threading", "contextlib"}} & (set(sys.modules) - before)), flush=True)
main()
"""


def started(*args: str, cwd: Path) -> subprocess.Popen[str]:
    """The command, with SIGINT as a terminal's programs have it: a job in the background has it ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", "autoaccum", *args],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def processes_in(folder: Path) -> list[int]:
    """Processes whose working folder that is."""
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if each.name.isdecimal() and (each / "cwd").readlink() == folder and (each / "cmdline").read_bytes():
                found.append(int(each.name))
    return found


def interrupted_at(seconds: float, number: signal.Signals, *args: str, cwd: Path) -> tuple[int, str, str]:
    """How the command ends that is sent a signal so long after its start; nothing of it may be left."""
    process = started(*args, cwd=cwd)
    time.sleep(seconds)
    assert process.poll() is None, "it had ended already"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert processes_in(cwd) == []
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("seconds", "number"), [(0.25, signal.SIGINT), (0.7, signal.SIGTERM), (1.2, signal.SIGINT)], ids=str
)
def test_a_signal_ends_a_command_whenever_it_comes(seconds: float, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    args = ("check", "--workload", "tiny.py:workload")
    code, out, err = interrupted_at(seconds, number, *args, cwd=tmp_path)
    assert (code, out) == (128 + number, "") and err.endswith("interrupted\n")


@pytest.mark.parametrize(
    ("module", "number"),
    [("autoaccum.processes.interrupts", "SIGINT"), ("autoaccum.processes.interrupts", "SIGTERM"), ("typer", "SIGINT")],
)
def test_a_signal_ends_the_command_while_it_imports_its_own(module: str, number: str) -> None:
    """Before the handler is there, only Python's start and two modules that it has loaded by then are run."""
    code = EARLY.format(module=module, number=number)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 128 + signal.Signals[number]
    assert (out.stdout, out.stderr) == ("\n", "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_ends_the_command_as_soon_as_anything_of_ours_is_imported(number: signal.Signals) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "autoaccum", "doctor", "--gpus"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    assert process.stderr is not None
    assert any("autoaccum.processes.early_signals" in line for line in process.stderr)
    assert process.stderr.readline()  # what is imported next
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (128 + number, "") and "interrupted\n" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "orig_argv", "ours"),
    [
        (["-m"], ["python", "-X", "dev", "-m", "autoaccum", "plan"], True),
        (["/usr/bin/autoaccum", "plan"], ["python", "/usr/bin/autoaccum", "plan"], True),
        (["-m"], ["python", "-m", "autoaccum.processes.child"], False),  # its parent says it
        (["-m"], ["python", "-m", "mine", "autoaccum"], False),
        (["train.py"], ["python", "train.py"], False),
        ([""], ["python"], False),
    ],
)
def test_only_the_command_ends_at_once(
    argv: list[str], orig_argv: list[str], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in interrupts.NUMBERS}
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    try:
        early_signals.end_at_once()
        assert all((signal.getsignal(number) is not handler) == ours for number, handler in before.items())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_ends_planning_at_24_moments(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    args = ("plan", "--target-batch", "512", "--workload", "tiny.py:slow")
    codes = [interrupted_at(0.1 + 0.11 * i, number, *args, cwd=tmp_path)[0] for i in range(24)]
    assert codes == [128 + number] * 24


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [6.0, 12.0])
def test_a_signal_ends_a_comparison_and_not_one_candidate(seconds: float, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    args = ("bench", "--target-batch", "512", "--workload", "tiny.py:slow", "--tune-trials", "2")
    code, out, _ = interrupted_at(seconds, signal.SIGTERM, *args, cwd=tmp_path)
    assert (code, out) == (143, "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_exception_that_python_drops_ends_the_process_all_the_same(name: str) -> None:
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", DROPS.format(name=name)], capture_output=True, text=True)
    assert out.returncode == 128 + signal.Signals[name] and out.stdout == "went on\n"
    assert time.monotonic() - began < 10


def test_a_child_that_goes_on_is_ended_with_whatever_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.2)
    with _group(SWALLOWS) as process:
        asked = child._Asked(process, leads=True)
        own = int(process.stdout.readline())  # type: ignore[union-attr]
        asked.ask(signal.SIGTERM)
        assert asked.wait() == -signal.SIGKILL
        assert _has_ended(own)


def test_a_second_signal_ends_a_child_that_finishes_what_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.0)
    with _group(SWALLOWS) as process:
        asked = child._Asked(process, leads=True)
        asked.finishes = True
        process.stdout.readline()  # type: ignore[union-attr]
        asked.ask(signal.SIGINT)
        asked.ask(signal.SIGINT)  # at once: the same signal, sent to the process and to its group
        asked.enforce()
        assert process.poll() is None
        time.sleep(interrupts.SAME_SECONDS + 0.05)
        asked.ask(signal.SIGINT)
        assert asked.wait() == -signal.SIGKILL


def test_a_childs_own_end_by_a_signal_is_no_failure() -> None:
    with pytest.raises(interrupts.Interrupted) as caught:
        raise child._died("plan", -signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        child._rebuilt({"class": "KeyboardInterrupt", "number": signal.SIGINT})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_process_that_waits_for_a_child_has_the_signal_handled_by_its_own_handler(number: signal.Signals) -> None:
    """`tune` in a notebook: Ctrl-C is a KeyboardInterrupt there, and SIGTERM what it was before."""
    seen: list[int] = []

    def own(number: int, frame: Any) -> None:
        seen.append(number)

    before = {each: signal.signal(each, own) for each in interrupts.NUMBERS}
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    try:
        timer.start()
        with pytest.raises(interrupts.Interrupted):
            child.call("cli.tasks:doctor", {})
        assert seen == [number] and signal.getsignal(number) is own
    finally:
        timer.join()
        for each, handler in before.items():
            signal.signal(each, handler)


def test_what_typer_makes_of_an_interrupt_is_one_still() -> None:
    from autoaccum.cli import _code_of, app

    def command() -> Any:
        try:
            raise interrupts.Interrupted(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise SystemExit(130) from error

    assert app is not None
    with pytest.raises(interrupts.Interrupted) as caught:
        _code_of(command, with_traceback=False)
    assert interrupts.exit_code(caught.value.number) == 143


@contextlib.contextmanager
def _group(source: str) -> Any:
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, process_group=0)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _has_ended(pid: int) -> bool:
    """Whether a process has ended; it may wait to be reaped by somebody else."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False
