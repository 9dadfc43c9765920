"""Run a function in a forked copy of this process.

With its model and all its state, and without its profiler.

A fork copies one thread only. OpenMP's pool and torch's profiler belong to the thread that made them (libgomp keeps
the pool, torch the profiler's state, per thread), so the copy does its work in a thread of its own: it has its own
pool, and no profiler. In the forking thread itself the first OpenMP region would wait for ever for workers that weren't
copied.

Nor may the copy free what it inherited: the destructor of a process group, say, joins its threads, which the copy
doesn't have, and crashes. What only reference cycles keep alive is freed whenever Python next collects garbage, so the
copy takes all that it inherited out of the garbage collection.
"""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .child import die_with_parent

T = TypeVar("T")

STUCK_SECONDS = 60.0  # a copy that uses no processor time for so long waits for a thread that wasn't copied


class ForkFailed(Exception):
    """The copy ended without an answer; says why."""


class Died(ForkFailed):
    """The copy was ended by a signal, or ended itself; says how."""


def _is_memory_error(error: BaseException) -> bool:
    return isinstance(error, MemoryError)


def in_copy(
    work: Callable[[], T],
    *,
    own_thread: bool = True,
    prepare: Callable[[], object] = lambda: None,
    is_out_of_memory: Callable[[BaseException], bool] = _is_memory_error,
) -> T:
    """Run `work` in a forked copy of this process.

    Args:
        work: What it changes is changed in the copy only. Its result has to pickle.
        is_out_of_memory: Asked in the copy of an error that ended the work (devices/oom.py has the whole rule).
        prepare: Called first in the copy, in the thread that forked: for what belongs to that thread.
        own_thread: False only where this thread has computed nothing yet: the copy then works as a fresh process would.

    Returns:
        Its result.

    Raises:
        ForkFailed: It raised something that isn't a lack of memory, or the copy hung.
        Died: The copy crashed.
        MemoryError: It ran out of memory, in the words of the error that it got there.
    """
    reading, writing = os.pipe()
    child = _fork()
    if not child:
        _be_the_copy(prepare, lambda: _attempt(work, is_out_of_memory), reading, writing, own_thread)
    os.close(writing)
    try:
        kind, answer = _answer(child, reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # it has answered, or never will
        _, status = os.waitpid(child, 0)
    if kind == "result":
        result: T = answer
        return result
    if kind == "memory":
        raise MemoryError(answer)
    if kind == "died":
        raise Died(_ending(status))
    raise ForkFailed(answer)


def _fork() -> int:
    """Fork; in the copy, garbage collection leaves alone what it inherited.

    Collections are off from before the fork on: at-fork hooks allocate, and could start one.

    Returns:
        0 in the copy, its process id here.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of what this module takes care of
            child = os.fork()
        if not child:
            gc.freeze()
    finally:
        if collects:
            gc.enable()
    return child


def _ending(status: int) -> str:
    """Describe how a process ended, from `waitpid`'s status.

    A signal sent to a process that has ended changes nothing.
    """
    if os.WIFSIGNALED(status):
        return f"it was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"it ended itself with exit code {os.waitstatus_to_exitcode(status)}"


def _be_the_copy(
    prepare: Callable[[], object], attempt: Callable[[], tuple[str, Any]], reading: int, writing: int, own_thread: bool
) -> None:
    """Run the copy's side; never return to the caller's program."""
    try:
        die_with_parent()
        os.close(reading)
        prepare()
        said: list[tuple[str, Any]] = []
        if own_thread:
            thread = threading.Thread(target=lambda: said.append(attempt()))
            thread.start()
            thread.join()
        else:
            said.append(attempt())
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(said[0], pipe)
    finally:
        os._exit(0)


def _attempt(work: Callable[[], Any], is_out_of_memory: Callable[[BaseException], bool]) -> tuple[str, Any]:
    try:
        result = work()
        pickle.dumps(result)
        return "result", result
    except BaseException as error:
        if is_out_of_memory(error):
            return "memory", str(error)
        return "failed", f"{type(error).__name__}: {error}"


def _answer(child: int, reading: int) -> tuple[str, Any]:
    """Read the copy's messages while it sends or computes something."""
    message = bytearray()
    while True:
        wait_for_word(child, reading)
        part = os.read(reading, 1 << 20)
        if not part:
            break
        message += part
    if not message:
        return "died", ""
    kind, answer = pickle.loads(message)
    return kind, answer


def wait_for_word(child: int, reading: int) -> None:
    """Wait until a copy has sent something or ended.

    Raises:
        ForkFailed: It does nothing.
    """
    used, since = -1, time.monotonic()
    while not select.select([reading], [], [], 0.5)[0]:
        now_used = _processor_ticks(child)
        if now_used != used:
            used, since = now_used, time.monotonic()
        elif time.monotonic() - since > STUCK_SECONDS:
            raise ForkFailed(f"it did nothing for {STUCK_SECONDS:.0f} s")


def _processor_ticks(child: int) -> int:
    """Return the copy's processor time in kernel ticks.

    proc(5), /proc/pid/stat: utime, stime.
    """
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return -1
