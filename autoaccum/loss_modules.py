"""The modules that a loss holds, wherever it holds them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

_DEEPEST = 3  # functions called by functions, partials of methods


def modules_of(loss: Any) -> list[nn.Module]:
    """The modules that a loss holds: itself, in its closure, as defaults, as attributes, among the globals it names."""
    found: list[nn.Module] = []
    seen: set[int] = set()

    def look(thing: Any, depth: int) -> None:
        if id(thing) in seen or depth > _DEEPEST:
            return
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found.append(thing)
        elif isinstance(thing, functools.partial):
            for inner in (thing.func, *thing.args, *thing.keywords.values()):
                look(inner, depth + 1)
        elif inspect.ismethod(thing):
            look(thing.__self__, depth + 1)
            look(thing.__func__, depth + 1)
        elif inspect.isfunction(thing):
            named = (thing.__globals__.get(name) for name in thing.__code__.co_names)
            for inner in (*_closure(thing), *(thing.__defaults__ or ()), *named):
                if isinstance(inner, nn.Module) or callable(inner):
                    look(inner, depth + 1)
        elif not isinstance(thing, type) and hasattr(thing, "__dict__") and depth < _DEEPEST:
            for inner in vars(thing).values():
                if isinstance(inner, nn.Module):
                    look(inner, depth + 1)

    look(loss, 0)
    return found


def _closure(function: Any) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return cells
