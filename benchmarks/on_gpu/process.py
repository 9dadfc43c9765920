"""Run a command with a time limit that ends all of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for a signal.
        seconds: How long it took.
        was_stopped: Whether it was killed at its limit, or since the run was interrupted.
        said: The end of what it wrote to stderr.
    """

    code: int
    seconds: float
    was_stopped: bool
    said: str


class Command:
    """A command that runs in a separate session.

    Whatever it starts ends with it.

    Args:
        command: What is run.
        environment: Its variables.
        on_line: Called with each line of its stdout, as soon as it is written.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        self._command, self._environment, self._on_line = command, environment, on_line
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()

    def run(self, limit_seconds: float) -> Ended:
        """Run it to its end, or kill it at the limit."""
        started = time.monotonic()
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                self._command, env=dict(self._environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=errors, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            self._process = process
            if self._stopped.is_set():  # it was stopped while it was started
                self.stop()
            timer = threading.Timer(limit_seconds, self.stop)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    self._on_line(line.rstrip("\n"))
                code = process.wait()
            finally:
                timer.cancel()
                kill_session(process.pid)
                process.wait()
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4000))
            return Ended(code, time.monotonic() - started, self._stopped.is_set(), errors.read())

    def stop(self) -> None:
        """Kill it and all that it started."""
        self._stopped.set()
        if self._process is not None:
            kill_session(self._process.pid)


def kill_session(leader: int) -> None:
    """Kill every process of a session, whatever its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)  # where /proc shows no sessions
    for _ in range(10):
        members = session_members(leader)
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def session_members(leader: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        state, session = after_name[0], int(after_name[3])  # proc(5): state, ppid, pgrp, session
        if session == leader and state not in "ZX":
            found.append(int(folder.name))
    return found
