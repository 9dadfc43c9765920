"""Modules that count their own forwards, told from the source of these before any was run.

A warm-up, an annealed temperature, a moving average or a queue that moves in each forward moves once per micro-batch,
and so runs ahead of the optimizer. What the source doesn't show, the first windows do (runner/state_changes.py). What
happens behind a flag that the same code sets, a first batch's statistics say, happens once and is no counting.
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
    for node in _each_time(definition, own):
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


def _each_time(definition: ast.FunctionDef, own: str) -> Iterator[ast.AST]:
    """The nodes of a method without those that a flag of the object lets run once only."""
    once = [
        guarded
        for node in ast.walk(definition)
        for block in _blocks(node)
        for index, statement in enumerate(block)
        if isinstance(statement, ast.If)
        for guarded in (statement.body, block[index + 1 :] if isinstance(statement.body[-1], ast.Return) else [])
        if _attributes(statement.test, own) & _flags(guarded, own)
    ]
    left_out = {id(node) for guarded in once for statement in guarded for node in ast.walk(statement)}
    return (node for node in ast.walk(definition) if id(node) not in left_out)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    return (block for name in ("body", "orelse") if isinstance(block := getattr(node, name, None), list))


def _attributes(node: ast.AST, own: str) -> set[str]:
    """The object's attributes that an expression reads."""
    return {name for inner in ast.walk(node) if isinstance(inner, ast.expr) for name, _ in _named(inner, own)}


def _flags(statements: list[ast.stmt], own: str) -> set[str]:
    """The attributes that these statements set to a constant."""
    found: set[str] = set()
    for node in (inner for statement in statements for inner in ast.walk(statement)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {name for target in node.targets for name, _ in _named(target, own)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fill_":
            found |= {name for name, _ in _named(node.func.value, own)}
    return found


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
