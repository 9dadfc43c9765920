"""End every command on SIGINT and SIGTERM: one handler, and a flag.

Python raises an interrupt wherever the main thread is. Where that is a weak reference's callback, a `__del__`, or a
library's bare `except:`, the exception is dropped and the program goes on. So the handler keeps the signal's number as
well as raising; the command line's own process ends itself where nobody has taken the exception in `DROPPED_SECONDS`,
and it ends its child process where that hasn't ended by itself (`child.call`).

Nothing heavy is imported here: this is installed before anything else is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
DROPPED_SECONDS = 0.5  # after so long without an end, the exception was dropped
SAME_SECONDS = 0.25  # a second signal so soon is the first one again: timeout(1) signals the process and its group
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it

_received: list[tuple[int, float]] = []
_watched = False


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def received() -> int | None:
    """Return the signal that asked this process to end, or None."""
    return _received[0][0] if _received else None


def received_more_than_one() -> bool:
    """Return whether it was asked again."""
    return len(_received) > 1


def is_watched() -> bool:
    """Return whether `watch` was called in this process."""
    return _watched


def exit_code(number: int) -> int:
    """Return a shell's exit code: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


def watch(*, end_if_dropped: bool = False) -> None:
    """Make the first signal raise `Interrupted`, and the second end the process.

    Whatever handled them before.

    Args:
        end_if_dropped: End this process where the exception led to no end within `DROPPED_SECONDS` (see `taken`). For
            processes that have nothing to put back; takes SIGALRM.
    """
    global _watched

    def handle(number: int, frame: object) -> None:
        if is_repeated(number):
            return
        if received_more_than_one():
            end_now(_received[0][0])
        if end_if_dropped:
            signal.signal(signal.SIGALRM, lambda *_: end_now(number))
            signal.setitimer(signal.ITIMER_REAL, DROPPED_SECONDS)
        raise Interrupted(number)

    for number in NUMBERS:
        signal.signal(number, handle)
    _watched = True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)


def is_repeated(number: int) -> bool:
    """Note a signal; return whether it repeats the last one."""
    now = time.monotonic()
    again = bool(_received) and _received[-1][0] == number and now - _received[-1][1] < SAME_SECONDS
    if not again:
        _received.append((number, now))
    return again


def taken() -> None:
    """Says that the exception has arrived where it leads to the end."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def raise_if_received() -> None:
    """Raise the exception again where the program continued after a signal."""
    number = received()
    if number is not None:
        raise Interrupted(number)


def end_now(number: int) -> NoReturn:
    """End this process without running anything else."""
    with contextlib.suppress(OSError):
        os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"interrupted\n")
    os._exit(exit_code(number))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Block both signals, here and in started processes, until released.

    They are delivered then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handled_by(handle: Any) -> Iterator[None]:
    """Call `handle(number, frame)` for both signals; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
