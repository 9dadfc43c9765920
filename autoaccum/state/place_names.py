"""Name the places of a walk in the model's terms."""

from __future__ import annotations

from typing import Any

from ..torch_compat import BUFFERS, MODULES, PARAMETERS
from .traversal import Aspect, Held, HeldName, Place


def name_of(place: Place, tensors: dict[int, Held]) -> str:
    """Return a place's readable name; `tensors` are the walk's."""
    keys: list[Any] = []
    owner: Any = place
    while owner is not None:
        owner, key = owner
        if key is Aspect.ATTRIBUTES:
            return f"attribute {_from_first(keys)} of {name_of(owner, tensors)}"
        if isinstance(key, Aspect):
            return f"{key.value} {name_of(owner, tensors)}{_indexed(keys)}"
        keys.insert(0, key)
    root, *rest = keys
    if isinstance(root, HeldName):
        return _name_in_held(rest, root)
    if root == "model":
        return _name_in_model(rest)
    if root == "optimizer" and len(rest) > 1 and rest[0] == "state":
        param = tensors.get(id(rest[1]))
        of = name_of(param.place, tensors) if param else "a parameter that came later"
        return f"optimizer state of {of}" + (f": {_from_first(rest[2:])}" if rest[2:] else "")
    return f"{root} attribute {_from_first(rest)}" if rest else str(root)


def _name_in_model(keys: list[Any], root: str = "") -> str:
    """Return the name that `named_parameters` or `named_modules` would give.

    Args:
        keys: The keys.
        root: For what a function holds: its name, which comes first.
    """
    modules: list[str] = [root] if root else []
    while len(keys) > 1 and keys[0] == MODULES:
        modules.append(keys[1])
        keys = keys[2:]
    module = ".".join(modules)
    if not keys:
        return f"module {module}" if module else "model"
    if len(keys) == 2 and keys[0] in (PARAMETERS, BUFFERS):
        return ".".join([*modules, keys[1]])
    if keys == ["training"]:
        return f"training mode of {module or 'the model'}"
    return f"module attribute {'.'.join([*modules, keys[0]])}{_indexed(keys[1:])}"


def _name_in_held(keys: list[Any], root: str) -> str:
    """Return the name of a place in what a function holds."""
    if keys and keys[0] in (MODULES, PARAMETERS, BUFFERS, "training"):
        return _name_in_model(keys, root)
    return root + "".join(f".{key}" if isinstance(key, str) and key.isidentifier() else _indexed([key]) for key in keys)


def _from_first(keys: list[Any]) -> str:
    return f"{keys[0]}{_indexed(keys[1:])}"


def _indexed(keys: list[Any]) -> str:
    return "".join(f"[{key!r}]" if isinstance(key, (str, int)) else "[...]" for key in keys)
