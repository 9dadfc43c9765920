"""Import torch without garbage collections, in a process that is autoaccum's own.

An import makes many objects and little garbage. Python's collector walks through all of them again and again while
there are more, and at each full collection later: a fifth of the seconds that a small plan takes. So it pauses for
these imports, and leaves out what they made afterwards (`gc.freeze`, made for processes that load much at their start).
Processes that plan and processes that train both do that, so that their memory is the same.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# By name, whether none of the user's objects is there yet. What a first optimizer imports by torch._compile is as large
# as torch. It is not imported before it is asked for: its settings are read from the environment then, which the user's
# code may change until then.
_LARGE = {"torch": True, "torch._dynamo": False}
_waits = False  # for `leave_out`


def install(*, one_workload: bool = False) -> None:
    """Pause the collector for torch's imports, whoever starts them.

    Args:
        one_workload: Whether the process has one workload until its end, so that `leave_out` may leave it out.
    """
    global _waits
    sys.meta_path.insert(0, _Finder())
    _waits = one_workload


def leave_out() -> None:
    """Leave out all objects, once, where there is one workload."""
    global _waits
    if _waits:
        _waits = False
        gc.collect()
        gc.freeze()


class _Finder:
    """Find the large modules as Python does, and no other."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a large module, whose loader pauses the collector."""
        if name not in _LARGE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                _run_paused(lambda: load(module), freezes=_LARGE[name])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _run_paused(load: Callable[[], None], *, freezes: bool) -> None:
    collects = gc.isenabled()
    gc.collect()  # what is garbage by now would be kept with the rest
    gc.disable()
    try:
        load()
        if freezes:
            gc.freeze()
    finally:
        if collects:
            gc.enable()
