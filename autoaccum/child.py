"""Runs a task in a fresh Python process: the one that asked never loads torch nor the user's code.

The parent side is `call`; the other side is `python -m autoaccum.child`. They talk JSON, a line each, over a pipe of
their own, so that whatever the user's code prints (it goes to stderr) disturbs nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from . import errors
from .errors import AutoaccumError

Say = Callable[[dict[str, Any]], None]


def call(task: str, arguments: dict[str, Any], *, on_message: Say | None = None) -> dict[str, Any]:
    """Runs a task in a child process and waits for it.

    Args:
        task: A name in `tasks.TASKS`.
        arguments: Its keyword arguments, JSON.
        on_message: Called with what it says on the way.

    Returns:
        Its result.

    Raises:
        AutoaccumError: What the task raised, as the same class; or how the process ended.
    """
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "autoaccum.child", task, json.dumps(arguments), str(writing)]
    environment = {"KINETO_LOG_LEVEL": "5", **os.environ}
    process = subprocess.Popen(command, pass_fds=[writing], stdin=subprocess.DEVNULL, env=environment)
    os.close(writing)
    result: dict[str, Any] = {}
    try:
        with os.fdopen(reading, encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                if "result" in message or "error" in message:
                    result = message
                elif on_message is not None:
                    on_message(message)
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if "error" in result:
        raise _rebuilt(result["error"])
    if "result" not in result:
        raise _died(task, code)
    answer: dict[str, Any] = result["result"]
    return answer


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
    """The child's side: TASK, its arguments as JSON, the descriptor to answer on."""
    task, arguments, descriptor = argv
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


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's threads may still be ending, and an abort on the way out would look like a failure
