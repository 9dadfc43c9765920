"""Find what an optimizer's `step` requires.

Before any window is run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UsageError


def refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose step runs forward and backward itself.

    LBFGS, sharpness-aware minimization.

    Raises:
        UsageError: Its `step` doesn't work without a closure, by its signature or by its source.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and (closure.default is inspect.Parameter.empty or _insists(type(optimizer).step)):
        raise closure_needed(optimizer)


def closure_needed(optimizer: torch.optim.Optimizer) -> UsageError:
    """Return the refusal of an optimizer that requires a closure."""
    return UsageError(
        f"{type(optimizer).__name__} calls for a closure: it runs forward and backward itself, several times.",
        "A window's micro-batches are run once, and then the optimizer steps with their gradient.",
        "Use an optimizer whose step() works without a closure: torch.optim.AdamW, SGD, Muon.",
    )


def is_for_want_of_a_closure(optimizer: torch.optim.Optimizer, error: Exception) -> bool:
    """Whether an error says that a step needs a closure."""
    if "closure" not in inspect.signature(optimizer.step).parameters:
        return False
    said = f"{type(error).__name__} {error}".lower()
    return "closure" in said or (isinstance(error, TypeError) and "'nonetype' object is not callable" in said)


def _insists(step: Callable[..., Any]) -> bool:
    """Whether a step's source raises where its closure is None.

    By an assert, or by an `if`.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(step))))
    except (OSError, SyntaxError, TypeError):  # made without a file
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and _compares(node.test, ast.IsNot):
            return True
        if isinstance(node, ast.If) and _compares(node.test, ast.Is) and isinstance(node.body[0], ast.Raise):
            return True
    return False


def _compares(test: ast.expr, how: type[ast.cmpop]) -> bool:
    """Whether it is `closure is None`, or `closure is not None`."""
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id == "closure"
        and isinstance(test.ops[0], how)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value is None
    )
