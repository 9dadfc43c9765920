"""Run a task in a fresh Python process.

The process that asks never loads torch or the user's code.

The parent side is `call`; the other side is `main`. They talk JSON, a line each, over a pipe of their own, so that
whatever the user's code prints (it goes to stderr) disturbs nothing. The child imports nothing from the folder that it
runs in (processes/import_path.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .. import errors
from ..errors import AutoaccumError
from ..files.escape import OneLine
from ..process_memory import hide_page_cache
from . import function_pipe, interrupts, quick_imports
from .error_origin import explained
from .import_path import ROOT
from .interrupts import Interrupted

# -P keeps the current folder off the path. This very autoaccum is imported first, wherever it lies; its folder then
# comes last, so that no other module is taken from there.
_START = """import importlib, sys, typing
root = sys.argv.pop(1)
sys.path.insert(0, root)
import autoaccum
sys.path.remove(root)
if root not in sys.path: sys.path.append(root)
from autoaccum.processes.child import start
start()"""

Say = Callable[[dict[str, Any]], None]

FINISHES = "finishes"  # a message: whether an interrupted child ends by itself once what it is at is done
GRACE_SECONDS = 2.0  # what any other has for ending once it was asked to
POLL_SECONDS = 0.25
CLOSED = 97  # exit code of a child that can't answer
_in_child = False  # whether this process is a child itself: its children belong to its own process group then


def call(
    task: str,
    arguments: dict[str, Any],
    *,
    on_message: Say | None = None,
    env: Mapping[str, str] | None = None,
    functions: bytes = b"",
) -> dict[str, Any]:
    """Run a task in a child process and wait for it.

    Args:
        task: MODULE:FUNCTION within autoaccum; it takes `say` and its arguments as keywords.
        arguments: Its keyword arguments, JSON.
        on_message: Called with what it says on the way.
        env: Its environment; left out, this process's.
        functions: Functions that it is handed (processes/function_pipe.py).

    Returns:
        Its result.

    Raises:
        AutoaccumError: What the task raised, as the same class; or how the process ended.
        Interrupted: A signal asked for the end, and the task didn't answer that it had stopped in order.
    """
    with contextlib.ExitStack() as stack:
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        theirs, ours = os.pipe()
        # Until both sides can answer one, they are held back
        with os.fdopen(writing, "wb"), os.fdopen(theirs, "rb"), interrupts.held_back():
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, ROOT, task, str(writing), str(theirs)],
                pass_fds=[writing, theirs],
                stdin=subprocess.PIPE,
                env={**_quiet(task), **(os.environ if env is None else env)},
                # A terminal's Ctrl-C reaches this process only, which hands it on: once, not twice. And whatever a
                # child starts can be ended with it.
                process_group=None if _in_child else 0,
                text=True,
            )
            asked = _Asked(process, leads=not _in_child)
            stack.enter_context(interrupts.handled_by(lambda number, frame: asked.ask(number)))
        function_pipe.send(functions, ours)
        result = _answer(process, reading, arguments, asked, on_message)
        code = asked.wait()
    if asked.number is not None and not result.get("result", {}).get("interrupted"):
        signal.raise_signal(asked.number)  # for whoever handles it in this process
        raise Interrupted(asked.number)
    if "error" in result:
        raise _rebuilt(result["error"])
    if "result" not in result:
        raise _died(task, code, arguments.get("workload"))
    answer: dict[str, Any] = result["result"]
    return answer


def _quiet(task: str) -> dict[str, str]:
    """Return settings that keep torch's libraries from logging recordings.

    The profiler logs when it starts, and where a window frees what was there before.
    """
    records = task.partition(".")[0] in ("planning", "tuning")
    return {"KINETO_LOG_LEVEL": "5", **({"TORCH_CPP_LOG_LEVEL": "ERROR"} if records else {})}


def _answer(
    process: subprocess.Popen[str],
    reading: int,
    arguments: dict[str, Any],
    asked: _Asked,
    on_message: Say | None,
) -> dict[str, Any]:
    """Send the arguments, read messages; return the last, or {} without one."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: what it printed and its exit code will tell
        process.stdin.write(json.dumps(arguments))  # an argument of a command line ends at 128 KiB
        process.stdin.close()
    try:
        for message in _messages(process, reading, asked):
            if "result" in message or "error" in message:
                return message  # a process that the user's code left behind may hold the pipe open
            if FINISHES in message:
                asked.finishes = message[FINISHES]
            elif on_message is not None:
                on_message(message)
    except BaseException:  # who asked is gone: stdout is closed, say
        asked.ask(signal.SIGTERM)
        for _ in _messages(process, reading, asked):
            pass
        asked.number = None  # nobody else needs to know
        raise
    return {}


def _messages(process: subprocess.Popen[str], reading: int, asked: _Asked) -> Iterator[dict[str, Any]]:
    """Yield the child's messages until it ends."""
    begun = b""
    while True:
        ended = process.poll() is not None
        if select.select([reading], [], [], 0.0 if ended else POLL_SECONDS)[0]:
            part = os.read(reading, 1 << 16)
            if not part:
                return
            *lines, begun = (begun + part).split(b"\n")
            yield from map(json.loads, lines)
        elif ended:
            return
        asked.enforce()


class _Asked:
    """Forward interrupts to the working child, and make sure it ends.

    Args:
        process: The child.
        leads: Whether it leads a process group of its own, which is ended with it.

    Attributes:
        number: The signal that was asked on; None for none.
        finishes: Whether the child has said that it ends by itself, once what it is at is done.
    """

    def __init__(self, process: subprocess.Popen[str], *, leads: bool) -> None:
        self._process, self._leads = process, leads
        self.number: int | None = None
        self.finishes = False
        self._asked_at = 0.0

    def ask(self, number: int) -> None:
        """Hands a signal on; a second one ends the child at once."""
        now = time.monotonic()
        if self.number is None:
            self.number, self._asked_at = number, now
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
        elif now - self._asked_at > interrupts.SAME_SECONDS:
            self._kill()

    def enforce(self) -> None:
        """End a child that was asked to end and continues.

        It dropped the exception, or native code runs for long.
        """
        if self.number is None or self.finishes or self._process.poll() is not None:
            return
        if time.monotonic() - self._asked_at > GRACE_SECONDS:
            self._kill()

    def wait(self) -> int:
        """Wait for its end; if asked to end, its descendants end too."""
        while True:
            try:
                code = self._process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                self.enforce()
        if self.number is not None:
            self._kill()
        return code

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._leads:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()


def _died(task: str, code: int, workload: str | None = None) -> AutoaccumError:
    task = task.partition(":")[2]
    whose = f"the code of {workload}" if workload else "code of the workload's"
    if code == CLOSED:
        return AutoaccumError(
            f"The process for `{task}` can't answer: the descriptor for that was closed, or made another file's.",
            f"Only {whose}, or of what it imports, does that: os.closerange, os.close, a library that makes a daemon.",
            "Close what was opened there, and nothing else.",
        )
    if -code in interrupts.NUMBERS:
        raise Interrupted(-code)
    if code == -signal.SIGKILL:
        return errors.OutOfMemory(
            f"The process for `{task}` was killed (SIGKILL).",
            "The kernel does that when the machine's memory is used up.",
            "Name less memory than the machine has free: --memory SIZE.",
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    cause = "crashed in native code" if code < 0 else "ended it, by os._exit say"
    return AutoaccumError(
        f"The process for `{task}` ended with {how} and no answer.",
        f"What it printed stands above; {whose}, or of a library's, {cause}.",
        "python -X faulthandler FILE.py shows where, once FILE.py calls its function at its end.",
    )


def _rebuilt(error: dict[str, Any]) -> AutoaccumError:
    if error["class"] == "KeyboardInterrupt":
        raise Interrupted(error["number"])
    kind = getattr(errors, error["class"], AutoaccumError)
    rebuilt: AutoaccumError = kind(error["what"], error["why"], error["hint"])
    if isinstance(rebuilt, errors.DoesNotFit):
        rebuilt.missing_bytes = error["missing_bytes"]
    rebuilt.add_note(error["traceback"])
    return rebuilt


def _described(error: BaseException) -> dict[str, Any]:
    description = {"traceback": "".join(traceback.format_exception(error)).rstrip(), "missing_bytes": 0}
    if isinstance(error, AutoaccumError):
        description["missing_bytes"] = getattr(error, "missing_bytes", 0)
        return description | {"class": type(error).__name__, "what": error.what, "why": error.why, "hint": error.hint}
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        return description | {
            "class": "KeyboardInterrupt",
            "what": "interrupted",
            "why": "",
            "hint": "",
            "number": number,
        }
    what, why, hint = explained(error)
    return description | {"class": "AutoaccumError", "what": what, "why": why, "hint": hint}


def _task(name: str) -> Callable[..., dict[str, Any]]:
    module, _, function = name.partition(":")
    task: Callable[..., dict[str, Any]] = getattr(importlib.import_module(f"autoaccum.{module}"), function)
    return task


def main(argv: list[str]) -> int:
    """Run the child's side: TASK and descriptors; JSON arguments on stdin.

    It answers on the first descriptor, and receives functions through the second.
    """
    global _in_child
    interrupts.watch()
    _in_child = True
    hide_page_cache(os.environ)
    task, descriptor, functions = argv
    die_with_parent()
    quick_imports.install(one_workload=task.partition(".")[0] in ("planning", "cli"))
    function_pipe.receive(int(functions))
    arguments = sys.stdin.read()
    logging.getLogger("autoaccum").addFilter(OneLine())
    os.dup2(2, 1)  # whatever is printed from here on is no result
    pipe = _out_of_reach(int(descriptor))
    there = _identity(pipe)
    finishes = False

    def send(message: dict[str, Any]) -> None:
        if _identity(pipe) != there:
            raise _Closed
        left = memoryview(f"{json.dumps(message)}\n".encode())
        while left:
            left = left[os.write(pipe, left) :]

    def say(message: dict[str, Any]) -> None:
        nonlocal finishes
        finishes = message.get(FINISHES, finishes)
        if not finishes:
            interrupts.raise_if_received()  # one that was dropped
        send(message)

    try:
        result = _task(task)(say=say, **json.loads(arguments))
        if not result.get("interrupted"):
            interrupts.raise_if_received()
        send({"result": result})
        return 0
    except BrokenPipeError:
        return 1
    except _Closed:
        return CLOSED
    except BaseException as error:
        try:
            send({"error": _described(error)})
        except _Closed:
            return CLOSED
        return 1


class _Closed(BaseException):
    """The answering descriptor was replaced; no `except Exception` catches this."""


def _out_of_reach(descriptor: int) -> int:
    """Duplicate the descriptor to a high number.

    Code that closes all descriptors mostly stops at 256.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(3, min(soft, 1 << 16) - 64))
    except OSError:
        os.set_inheritable(descriptor, False)
        return descriptor
    os.close(descriptor)
    return copy


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent is killed.

    prctl(2), PR_SET_PDEATHSIG.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def start() -> None:
    """Run the code that the child's process starts with."""
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # before it could answer
        code = interrupts.exit_code(interrupts.received() or signal.SIGINT)
    gc.collect()  # loaders' workers and their semaphores, which the next line leaves behind
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the user's code may have closed them
            stream.flush()
    os._exit(code)  # torch's threads may still be ending, and an abort on the way out would look like a failure
