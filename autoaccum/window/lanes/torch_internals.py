"""Reach the private names of torch that lanes need.

Autograd's order, and the modes of a thread: torch/csrc/autograd/python_cpp_function.cpp, torch/overrides.py. The other
private names are in torch_compat.py; tests/test_lanes.py calls each function here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ...torch_compat import _find


def next_sequence_number() -> int:
    """Return the number that this thread's next node of a graph gets."""
    return int(_find(torch, "autograd._get_sequence_nr", "order the backward of lanes")())


def sequence_number(node: Any) -> int:
    """Return a node's number: autograd runs nodes with higher ones first."""
    return int(node._sequence_nr())


def set_sequence_number(node: Any, number: int) -> None:
    """Set a node's number."""
    node._set_sequence_nr(number)


def edges(node: Any) -> tuple[tuple[Any, int], ...] | None:
    """Return what follows a node; None of one that is gone.

    In older versions of torch a custom function's node ends with its outputs, whoever holds its Python object; asked
    for its number, that ends the process.
    """
    try:
        return tuple(node.next_functions)
    except RuntimeError:
        return None


def run_backward(loss: torch.Tensor | None, anchors: Sequence[torch.Tensor] = ()) -> None:
    """Run backward of a scalar with this thread's function modes on.

    `torch.autograd.backward` is itself a function that modes see, and while it runs they are off.

    Args:
        loss: The scalar; None to begin from the anchors alone.
        anchors: Scalars that it begins from as well, with a gradient of 0.
    """
    run = _find(torch, "autograd.graph._engine_run_backward", "repeat checkpointed blocks in lanes")
    ones = [] if loss is None else [torch.ones_like(loss, memory_format=torch.preserve_format)]
    zeros = [torch.zeros_like(each) for each in anchors]
    roots = (*([] if loss is None else [loss]), *anchors)
    run(roots, (*ones, *zeros), False, False, (), allow_unreachable=True, accumulate_grad=True)


def modes_off() -> AbstractContextManager[Any]:
    """Return a context manager in which no function mode sees what runs."""
    off: AbstractContextManager[Any] = _find(torch, "_C.DisableTorchFunction", "run lanes' own backward")()
    return off


def current_modes() -> tuple[list[Any], list[Any]]:
    """Return this thread's function modes and dispatch modes, outermost first."""
    functions = _find(torch, "overrides._get_current_function_mode_stack", "carry modes into another thread")
    dispatches = _find(
        torch, "utils._python_dispatch._get_current_dispatch_mode_stack", "carry modes into another thread"
    )
    return list(functions()), list(dispatches())


@contextlib.contextmanager
def entered_modes(modes: tuple[list[Any], list[Any]]) -> Iterator[None]:
    """Push another thread's modes in this one, without entering them anew."""
    functions, dispatches = modes
    entering = (
        (functions, torch.overrides._push_mode, torch.overrides._pop_mode),
        (dispatches, torch.utils._python_dispatch._push_mode, torch.utils._python_dispatch._pop_mode),
    )
    with contextlib.ExitStack() as stack:
        for found, push, pop in entering:
            for mode in found:
                push(mode)
                stack.callback(pop)
        yield
