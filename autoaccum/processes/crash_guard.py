"""Run a test whose crash is a result, not the process's end.

A loss may reach native code that doesn't check what it is given. A copy of this process can crash in its place. With
CUDA there is none: a copied process can't use the device, nor can autograd there once it has threads for one. Then the
test runs here, and all that protects it is that nothing but the sample's own values is tried where an operator doesn't
check them (see `uses`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from ..torch_compat import load_compiler
from .fork import Died, ForkFailed, in_copy

T = TypeVar("T")


class Crashed(Exception):
    """The copy was ended by a signal, or by itself; says how."""


def run(work: Callable[[], T], is_out_of_memory: Callable[[BaseException], bool]) -> T:
    """Run `work` in a forked copy where possible, otherwise here.

    Args:
        work: What it changes may be lost. Its result has to pickle.
        is_out_of_memory: As for `fork.in_copy`.

    Raises:
        Crashed: The copy crashed.
    """
    if sys.platform != "linux" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return work()
    load_compiler()  # optimizers do: here once, and not in each copy again
    try:
        return in_copy(lambda: _able(work), is_out_of_memory=is_out_of_memory)
    except Died as death:
        raise Crashed(str(death)) from None
    except ForkFailed:  # it raised, or the copy can't compute: what it is, is said here
        return work()


def _able(work: Callable[[], T]) -> T:
    """Run it after a backward pass.

    That fails in a forked copy of a process whose autograd has threads.
    """
    torch.autograd.backward(torch.zeros(1, requires_grad=True).sum())
    return work()
