"""Runs a task in a fresh Python process: the one that asked never loads torch nor the user's code.

The parent side is `call`; the other side is `main`. They talk JSON, a line each, over a pipe of their own, so that
whatever the user's code prints (it goes to stderr) disturbs nothing. The child imports nothing from the folder that it
runs in (import_path.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import errors, handed
from .errors import AutoaccumError
from .import_path import ROOT

# -P keeps the current folder off the path. This very autoaccum is imported first, wherever it lies; its folder then
# comes last, so that no other module is taken from there.
_START = """import importlib, sys, typing
root = sys.argv.pop(1)
sys.path.insert(0, root)
import autoaccum
sys.path.remove(root)
if root not in sys.path: sys.path.append(root)
from autoaccum.child import start
start()"""

Say = Callable[[dict[str, Any]], None]


def call(
    task: str,
    arguments: dict[str, Any],
    *,
    on_message: Say | None = None,
    env: Mapping[str, str] | None = None,
    functions: bytes = b"",
) -> dict[str, Any]:
    """Runs a task in a child process and waits for it.

    Args:
        task: A name in `tasks.TASKS`.
        arguments: Its keyword arguments, JSON.
        on_message: Called with what it says on the way.
        env: Its environment; left out, this process's.
        functions: Functions that it is handed (handed.py).

    Returns:
        Its result.

    Raises:
        AutoaccumError: What the task raised, as the same class; or how the process ended.
    """
    reading, writing = os.pipe()
    theirs, ours = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _START, ROOT, task, str(writing), str(theirs)],
        pass_fds=[writing, theirs],
        stdin=subprocess.PIPE,
        env={"KINETO_LOG_LEVEL": "5", **(os.environ if env is None else env)},
        process_group=0,  # a terminal's Ctrl-C reaches this process only, which hands it on: once, not twice
        text=True,
    )
    os.close(writing)
    os.close(theirs)
    handed.send(functions, ours)
    result: dict[str, Any] = {}
    with _handed_on(process), os.fdopen(reading, encoding="utf-8") as lines:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: what it printed and its exit code will tell
            process.stdin.write(json.dumps(arguments))  # an argument of a command line ends at 128 KiB
            process.stdin.close()
        for line in lines:
            message = json.loads(line)
            if "result" in message or "error" in message:
                result = message
                break  # a process that the user's code left behind may hold the pipe open
            if on_message is not None:
                on_message(message)
        code = process.wait()
    if "error" in result:
        raise _rebuilt(result["error"])
    if "result" not in result:
        raise _died(task, code)
    answer: dict[str, Any] = result["result"]
    return answer


@contextlib.contextmanager
def _handed_on(process: subprocess.Popen[str]) -> Iterator[None]:
    """While the child works, it is for the child to say what an interrupt means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def hand_on(number: int, frame: Any) -> None:
        if process.poll() is None:
            process.send_signal(number)
        elif callable(before[number]):  # it has ended already
            before[number](number, frame)

    for number in numbers:
        signal.signal(number, hand_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _died(task: str, code: int) -> AutoaccumError:
    if code == -signal.SIGKILL:
        return errors.OutOfMemory(
            f"The process for `{task}` was killed (SIGKILL).",
            "The kernel does that when the machine's memory is used up.",
            "Name less memory than the machine has free: --memory SIZE.",
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return AutoaccumError(f"The process for `{task}` ended with {how} and no answer.", "What it printed stands above.")


def _rebuilt(error: dict[str, Any]) -> AutoaccumError:
    if error["class"] == "KeyboardInterrupt":
        raise KeyboardInterrupt
    kind = getattr(errors, error["class"], AutoaccumError)
    rebuilt: AutoaccumError = kind(error["what"], error["why"], error["hint"])
    if isinstance(rebuilt, errors.DoesNotFit):
        rebuilt.missing_bytes = error["missing_bytes"]
    rebuilt.add_note(error["traceback"])
    return rebuilt


def _described(error: BaseException) -> dict[str, Any]:
    told = {"traceback": "".join(traceback.format_exception(error)).rstrip(), "missing_bytes": 0}
    if isinstance(error, AutoaccumError):
        told["missing_bytes"] = getattr(error, "missing_bytes", 0)
        return told | {"class": type(error).__name__, "what": error.what, "why": error.why, "hint": error.hint}
    if isinstance(error, KeyboardInterrupt):
        return told | {"class": "KeyboardInterrupt", "what": "interrupted", "why": "", "hint": ""}
    place = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" at {place.filename}:{place.lineno}" if place else ""
    first = (str(error).strip().splitlines() or [""])[0]
    return told | {
        "class": "AutoaccumError",
        "what": f"{type(error).__name__}: {first}",
        "why": f"Raised{where}.",
        "hint": "The same command with --traceback shows all of it.",
    }


def main(argv: list[str]) -> int:
    """The child's side: TASK, the descriptors to answer on and to be handed functions by; JSON arguments on stdin."""
    task, descriptor, functions = argv
    die_with_parent()
    handed.receive(int(functions))
    arguments = sys.stdin.read()
    os.set_inheritable(int(descriptor), False)
    os.dup2(2, 1)  # whatever is printed from here on is no result
    pipe = os.fdopen(int(descriptor), "w", encoding="utf-8", buffering=1)

    def say(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    try:
        from .tasks import TASKS

        say({"result": TASKS[task](say=say, **json.loads(arguments))})
        return 0
    except BrokenPipeError:
        return 1
    except BaseException as error:
        say({"error": _described(error)})
        return 1


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that waits for it is killed (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def start() -> None:
    """What the child's process runs."""
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's threads may still be ending, and an abort on the way out would look like a failure
