"""Modules that count their own forwards, told from the source of these before any was run.

A warm-up, an annealed temperature, a moving average or a queue that moves in each forward moves once per micro-batch,
and so runs ahead of the optimizer. What the source doesn't show, the first window does (refuse.told_of_changes).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

_CONVERSIONS = frozenset(
    ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu", "contiguous", "detach", "clone")
)  # self.x = self.x.to(...) changes where it is, or its dtype, and nothing else


def own_counts(model: nn.Module, held: Mapping[str, nn.Module] | None = None) -> list[str]:
    """Buffers, numbers and tensors of modules that their own forward changes from what they were: `1.num_updates`.

    Torch's own modules are left out: what they keep (batch statistics, power iterations) is known of.

    Args:
        model: The model.
        held: Modules that the loss holds, by name.
    """
    return [
        ".".join(filter(None, [root, name, attribute]))
        for root, top in {"": model, **(held or {})}.items()
        for name, module in top.named_modules()
        if not type(module).__module__.startswith("torch.")
        for attribute in sorted(_changed_by(cast(Hashable, type(module))))
        if _is_state(module, attribute)
    ]


def _is_state(module: nn.Module, attribute: str) -> bool:
    value = module._buffers.get(attribute, vars(module).get(attribute))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number or (isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter))


@functools.lru_cache(maxsize=1024)
def _changed_by(kind: Any) -> frozenset[str]:
    """Attributes that the forward of a class, and the methods that it calls, change by way of what they were."""
    found: set[str] = set()
    todo, seen = ["forward"], set[str]()
    while todo:
        method = todo.pop()
        function = inspect.unwrap(getattr(kind, method, None) or _nothing)
        if method in seen or not inspect.isfunction(function):
            continue
        seen.add(method)
        for attribute, called in _found_in(function):
            (todo.append if called else found.add)(attribute)
    return frozenset(found)


def _nothing() -> None:
    """Stands for a method that isn't there."""


def _found_in(function: object) -> Iterator[tuple[str, bool]]:
    """What a method changes (False), and what it calls of its own object (True)."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    except (OSError, SyntaxError, TypeError):  # made without a file
        return
    definition = parsed.body[0]
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return
    own = definition.args.args[0].arg
    for node in ast.walk(definition):
        if isinstance(node, ast.AugAssign):
            yield from _named(_base(node.target), own)
        elif isinstance(node, ast.Assign):
            yield from _assigned(node, own)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func.attr
            if isinstance(node.func.value, ast.Name) and node.func.value.id == own:
                yield called, True
            elif called.endswith("_") and not called.startswith("_"):  # add_, copy_
                yield from _named(node.func.value, own)


def _assigned(node: ast.Assign, own: str) -> Iterator[tuple[str, bool]]:
    """Elements that are assigned to, and what is made anew of itself."""
    for target in node.targets:
        if isinstance(target, ast.Subscript):
            yield from _named(target.value, own)
            continue
        for attribute, _ in _named(target, own):
            if _reads(node.value, attribute, own) and not _converts(node.value, attribute, own):
                yield attribute, False


def _base(target: ast.expr) -> ast.expr:
    return target.value if isinstance(target, ast.Subscript) else target


def _named(node: ast.expr, own: str) -> Iterator[tuple[str, bool]]:
    """The attribute, where the expression is one of the object itself."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own:
        yield node.attr, False


def _reads(value: ast.expr, attribute: str, own: str) -> bool:
    attributes = (node for node in ast.walk(value) if isinstance(node, ast.Attribute))
    return any(name == attribute for node in attributes for name, _ in _named(node, own))


def _converts(value: ast.expr, attribute: str, own: str) -> bool:
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr in _CONVERSIONS
        and any(name == attribute for name, _ in _named(value.func.value, own))
    )
