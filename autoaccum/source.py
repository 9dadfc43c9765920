"""Where a workload comes from: a built-in's name, or FILE.py:FUNCTION."""

from __future__ import annotations

import base64
import difflib
import importlib.util
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import UsageError
from .workload import Workload
from .workloads import BUILT_IN, built_in

PICKLED = "pickled:"  # and a function, for a child process of the same program
_FORM = "--workload FILE.py:FUNCTION, where FUNCTION() returns an autoaccum.Workload"


def load_workload(source: str) -> Workload:
    """Calls the function that `source` names.

    Args:
        source: A built-in's name, or FILE.py:FUNCTION.

    Returns:
        Its workload, named after the source.

    Raises:
        UsageError: There is no such thing, or it returned something else.
    """
    return named(load_function(source)(), source)


def load_function(source: str) -> Callable[..., Any]:
    """The function that `source` names.

    Raises:
        UsageError: There is no such thing.
    """
    check_source(source)
    if source in BUILT_IN:
        return built_in(source)
    if source.startswith(PICKLED):
        return unpickled(source)  # type: ignore[no-any-return]
    file, _, function = source.rpartition(":")
    path = Path(file).resolve()
    sys.path.insert(0, str(path.parent))  # as `python FILE.py` would, so that the file's own imports work
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        near = difflib.get_close_matches(function, [n for n in vars(module) if callable(getattr(module, n))], n=1)
        raise UsageError(
            f"{file} has no function {function!r}.",
            hint=f"Did you mean {file}:{near[0]}?" if near else f"Write {_FORM}.",
        )
    return make  # type: ignore[no-any-return]


def named(workload: Any, source: str) -> Workload:
    """What the function returned, named after its source.

    Raises:
        UsageError: It is no workload.
    """
    if not isinstance(workload, Workload):
        raise UsageError(
            f"{source} returned {type(workload).__name__}, not an autoaccum.Workload.", hint=f"Write {_FORM}."
        )
    return replace(workload, name=None if source.startswith(PICKLED) else source)


def check_source(source: str) -> None:
    """Raises UsageError where it can't name a workload; imports nothing of the user's."""
    if source in BUILT_IN or source.startswith(PICKLED):
        return
    file, colon, function = source.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        near = difflib.get_close_matches(source, BUILT_IN, n=1)
        raise UsageError(
            f"{source!r} is neither a built-in workload ({', '.join(BUILT_IN)}) nor FILE.py:FUNCTION.",
            hint=f"Did you mean --workload {near[0]}?" if near else f"Write {_FORM}.",
        )
    if not Path(file).is_file():
        raise UsageError(f"There is no file {file!r} (seen from {Path.cwd()}).", hint=f"Write {_FORM}.")


def pickled(what: Any, name: str) -> str:
    """A function, or a mapping of some, for a child process of this program.

    Raises:
        UsageError: It can't be pickled: a lambda, or a function within another.
    """
    try:
        return PICKLED + base64.b64encode(pickle.dumps((sys.path, pickle.dumps(what)))).decode()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{name} can't be given to another process: {error}.",
            "It is called there, so that nothing of yours is changed here.",
            "Give a function that stands by itself in a module, or FILE.py:FUNCTION.",
        ) from None


def unpickled(text: str) -> Any:
    """What `pickled` was given, imported from where it was there."""
    paths, what = pickle.loads(base64.b64decode(text.removeprefix(PICKLED)))
    sys.path += [path for path in paths if path not in sys.path]
    return pickle.loads(what)
