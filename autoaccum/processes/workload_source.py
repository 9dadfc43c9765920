"""Where a workload comes from: a built-in's name, or FILE.py:FUNCTION."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import sys
import tokenize
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files.escape import one_line
from ..workload import Workload
from . import function_pipe
from .examples import BUILT_IN, built_in
from .import_path import add_folders
from .source_check import check_text

log = logging.getLogger("autoaccum")

_FUNCTION = "workload"  # of a file that is named alone
_FORM = "--workload FILE.py:FUNCTION, where FUNCTION() or FUNCTION(device) returns an autoaccum.Workload"


def load_workload(source: str | None, device: str = "cpu", *, made_there: bool = False) -> Workload:
    """Make the workload that `source` names, for every command.

    Args:
        source: A built-in's name, or FILE.py:FUNCTION; None for the function that this process was handed.
        device: Where it will be trained, "cpu" or "cuda". A function with a parameter of that name is given it.
        made_there: Make the tensors of any other function there at once, which on a virtual GPU takes no memory. Their
            values are meaningless then, so a function that looks at values may fail: it is called anew on the CPU.

    Returns:
        Its workload, named after the source; its model is where the function put it.

    Raises:
        UsageError: There is no such thing, it asks for something else, or it returned something else.
    """
    return make_workload(load_function(source), source, device, made_there=made_there)


def make_workload(
    function: Callable[..., Any], source: str | None, device: str = "cpu", *, made_there: bool = False
) -> Workload:
    """Call a workload's function, as `load_workload` does."""
    import torch

    at = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    if takes_device(function, source):
        return named(function(device=str(at)), source)
    if not made_there:
        return named(function(), source)
    failure: Exception | None = None
    try:
        with at:
            return named(function(), source)
    except Exception as error:  # whatever it tripped over: on the CPU it may work
        log.debug("the workload can't be made on the virtual GPU at once, so it is made on the CPU", exc_info=True)
        failure = error
    try:
        return named(function(), source)
    except Exception:  # what it tripped over first is said
        log.debug("nor on the CPU", exc_info=True)
    raise failure


def takes_device(function: Callable[..., Any], source: str | None) -> bool:
    """Return whether a workload's function has a parameter `device`.

    Raises:
        UsageError: It has another one without a default, which nothing could be given for.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C have none
        return False
    kinds = inspect.Parameter
    others = [
        name
        for name, each in parameters.items()
        if each.default is kinds.empty
        and each.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        and (name != "device" or each.kind is kinds.POSITIONAL_ONLY)
    ]
    if others:
        raise UsageError(
            f"{source or 'The function'} asks for {', '.join(others)}, and is called without.",
            "Of what it may ask for only `device` is known here: 'cpu', or 'cuda:0'.",
            "Give them defaults, or write a function without parameters that calls it.",
        )
    return "device" in parameters


def load_function(source: str | None) -> Callable[..., Any]:
    """Return the function that `source` names, or that was handed over.

    Raises:
        UsageError: There is no such thing.
    """
    if source is None:
        return _handed()
    check_source(source)
    if source in BUILT_IN:
        return built_in(source)
    file, function = _file_and_function(source)
    path = Path(file).resolve()
    add_folders([str(path.parent)])
    name = module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    known = set(sys.modules)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for text in overlooked(path.parent, set(sys.modules) - known):
            warnings.warn(one_line(text), stacklevel=2)
    make = getattr(module, function, None)
    if isinstance(make, Workload):
        return lambda: make
    if not callable(make):
        near = difflib.get_close_matches(function, [n for n in vars(module) if callable(getattr(module, n))], n=1)
        raise UsageError(
            f"{file} has no function {function!r}.",
            hint=f"Did you mean {file}:{near[0]}?" if near else f"Write {_FORM}.",
        )
    return make  # type: ignore[no-any-return]


def _is_file(file: str) -> bool:
    try:
        return Path(file).is_file()
    except (OSError, ValueError):  # a name that is too long, or that no system has
        return False


def _handed() -> Callable[..., Any]:
    function = function_pipe.workload_function()
    if function is None:
        raise UsageError("This process was handed no workload.", hint=f"Write {_FORM}.")
    return function


def module_name(path: Path) -> str:
    """Return the import name of a workload's file.

    Its own, unless another module has that name.
    """
    name = path.stem
    if not name.isidentifier():
        return name
    known = sys.modules.get(name)
    if known is not None:
        is_own = getattr(known, "__file__", None) == str(path)
    else:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        is_own = name not in sys.stdlib_module_names and (found is None or found.origin == str(path))
    return name if is_own else f"{name} of {path.parent}"


def overlooked(folder: Path, loaded: Iterable[str]) -> list[str]:
    """Return a warning of modules hidden by installed ones.

    They are beside the workload's file, and have an installed module's name.
    """
    found = []
    for name in sorted(loaded):
        file = getattr(sys.modules.get(name), "__file__", None)
        own = next((p for p in (folder / f"{name}.py", folder / name / "__init__.py") if p.is_file()), None)
        if file is not None and own is not None and Path(file).resolve() != own:
            found.append(
                f"`import {name}` gives {file}, which is installed, not {own}: rename yours. "
                "A workload's folder comes after what is installed, so that none of its files stands in for it."
            )
    return found


def named(workload: Any, source: str | None) -> Workload:
    """Return the function's workload, named after its source.

    Raises:
        UsageError: It is no workload.
    """
    if not isinstance(workload, Workload):
        raise UsageError(
            f"{source or 'The function'} returned {type(workload).__name__}, not an autoaccum.Workload.",
            hint=f"Write {_FORM}.",
        )
    return replace(workload, name=source)


def check_source(source: str) -> None:
    """Raise UsageError for an invalid source; import nothing of the user's."""
    if source in BUILT_IN:
        return
    file, function = _file_and_function(source)
    if not file.endswith(".py") or not function.isidentifier():
        near = difflib.get_close_matches(source, BUILT_IN, n=1)
        raise UsageError(
            f"{source!r} is neither a built-in workload ({', '.join(BUILT_IN)}) nor FILE.py:FUNCTION.",
            hint=f"Did you mean --workload {near[0]}?" if near else f"Write {_FORM}.",
        )
    if not _is_file(file):
        raise UsageError(f"There is no file {file!r} (seen from {Path.cwd()}).", hint=f"Write {_FORM}.")
    check_text(_text_of(Path(file)), file, function)


def _file_and_function(source: str) -> tuple[str, str]:
    """Return the file and the function of FILE.py:FUNCTION, or of module:function.

    FILE.py alone stands for its function `workload`.
    """
    file, colon, function = source.rpartition(":")
    if not colon:
        return (source, _FUNCTION) if source.endswith(".py") else ("", source)
    if not file.endswith((".py", "/")) and all(part.isidentifier() for part in file.split(".")):
        return file.replace(".", "/") + ".py", function
    return file, function


def _text_of(path: Path) -> str:
    """Return a file's source, in the encoding that it declares.

    Raises:
        UsageError: It can't be read.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}.", hint=f"Write {_FORM}.") from None
