"""Reach the private names of torch that lanes need.

Autograd's order, and what torch keeps for a thread: torch/csrc/autograd/python_cpp_function.cpp, torch/overrides.py,
torch/csrc/autograd/init.cpp. The other private names are in torch_compat.py; tests/test_lanes.py and
tests/test_lanes_state.py call each function here.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...torch_compat import _find

SWAP = "give each lane its own state of torch"
Reader = Callable[[], Any]
_name = functools.cache(functools.partial(_find, torch))  # looked up at every switch


class Signature(NamedTuple):
    """An operation of ATen, as its schema has it.

    Attributes:
        name: Its name, without the overload's.
        overload: The overload's name; empty for the default one.
        written: The positions of the arguments that it writes to.
        written_names: The names of those that it takes by name alone.
    """

    name: str
    overload: str
    written: tuple[int, ...]
    written_names: tuple[str, ...]


def signature_of(func: Any) -> Signature | None:
    """Return an operation's signature; None of what isn't one.

    As a dispatch mode sees operations, of other libraries, too.
    """
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    written = [
        (at, argument)
        for at, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return Signature(
        schema.name.removeprefix("aten::"),
        schema.overload_name,
        tuple(at for at, argument in written if not argument.kwarg_only),
        tuple(argument.name for _, argument in written if argument.kwarg_only),
    )


def next_sequence_number() -> int:
    """Return the number that this thread's next node of a graph gets."""
    return int(_name("autograd._get_sequence_nr", "find where lanes go back")())


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
    off: AbstractContextManager[Any] = _name("_C.DisableTorchFunction", "run lanes' own backward")()
    return off


def storage_behind(weak: StorageWeakRef) -> torch.UntypedStorage:
    """Return the storage behind a weak reference, which is alive."""
    find = _name("UntypedStorage._new_with_weak_ptr", "compute again what lanes saved")
    storage: torch.UntypedStorage = find(weak.cdata)
    return storage


def state_readers() -> tuple[Reader, Reader]:
    """Return what reads two parts of a thread's state.

    Whether functions ask modes and subclasses, and why hooks of saved tensors are refused (None where they aren't).
    """
    return (
        _name("_C._get_torch_function_state", SWAP),
        _name("_C._autograd._saved_tensors_hooks_get_disabled_error_message", SWAP),
    )


def stack_readers() -> tuple[Reader, ...]:
    """Return what finds function modes, dispatch modes and saved tensors' hooks."""
    lengths = (_name(f"_C._len_torch_{kind}_stack", SWAP) for kind in ("function", "dispatch"))
    return (*lengths, _hooks_reader())


@functools.cache
def _hooks_reader() -> Reader:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return (lambda: _hooks.pushed) if top is None else functools.partial(top, True)


def has_saved_hooks() -> bool:
    """Return whether hooks see what this thread's operations save."""
    return bool(_hooks_reader()())


def take_functions() -> None:
    """Let torch's functions ask no modes or subclasses of tensors."""
    put_functions(_name("_C._TorchFunctionState", SWAP).ALL_DISABLED)


def put_functions(state: Any) -> None:
    """Set whether torch's functions ask modes and subclasses of tensors."""
    _name("_C._set_torch_function_state", SWAP)(state)


def take_modes() -> tuple[list[Any], list[Any]]:
    """Remove this thread's function modes and dispatch modes.

    Returns:
        Both, outermost first.
    """
    counts = (_name(f"_C._len_torch_{kind}_stack", SWAP)() for kind in ("function", "dispatch"))
    pops = _name("overrides._pop_mode", SWAP), _name("utils._python_dispatch._pop_mode", SWAP)
    functions, dispatches = ([pop() for _ in range(count)] for pop, count in zip(pops, counts, strict=True))
    return functions[::-1], dispatches[::-1]


def put_modes(modes: tuple[list[Any], list[Any]]) -> None:
    """Push modes that were taken, without entering them anew."""
    functions, dispatches = modes
    for mode in functions:
        _name("overrides._push_mode", SWAP)(mode)
    for mode in dispatches:
        _name("utils._python_dispatch._push_mode", SWAP)(mode)


class _Hooks(threading.local):
    """The hooks of saved tensors that a thread has pushed."""

    def __init__(self) -> None:
        self.pushed: list[Any] = []


_hooks = _Hooks()


@functools.cache
def track_saved_hooks() -> None:
    """Note hooks of saved tensors as they are pushed.

    Only where torch doesn't return them: 2.6 doesn't. Hooks from before the first call stay where they are, below those
    of lanes.
    """
    own: Any = torch._C._autograd
    if hasattr(own, "_top_saved_tensors_default_hooks"):
        return
    push, pop = own._push_saved_tensors_default_hooks, own._pop_saved_tensors_default_hooks

    def pushing(pack: Any, unpack: Any) -> None:
        push(pack, unpack)
        _hooks.pushed.append((pack, unpack))

    def popping() -> None:
        pop()
        del _hooks.pushed[-1:]

    own._push_saved_tensors_default_hooks, own._pop_saved_tensors_default_hooks = pushing, popping


def take_saved_hooks() -> list[Any]:
    """Remove this thread's hooks of saved tensors.

    Returns:
        Pairs of hooks, outermost first.
    """
    own = torch._C._autograd
    top = getattr(own, "_top_saved_tensors_default_hooks", None)
    taken = [] if top else _hooks.pushed[::-1]
    while top and (pair := top(True)) is not None:
        taken.append(pair)
        own._pop_saved_tensors_default_hooks()
    for _ in () if top else taken:
        own._pop_saved_tensors_default_hooks()
    return taken[::-1]


def put_saved_hooks(hooks: Sequence[Any]) -> None:
    """Push hooks of saved tensors that were taken."""
    for pack, unpack in hooks:
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def refuse_saved_hooks(why: str | None, *, beside_some: bool = False) -> None:
    """Refuse hooks of saved tensors in this thread, or allow them.

    Args:
        why: The reason; None to allow them.
        beside_some: Whether there are some that stay: newer versions of torch allow it.
    """
    if why is None:
        _name("_C._autograd._saved_tensors_hooks_enable", SWAP)()
    else:
        _name("_C._autograd._saved_tensors_hooks_disable", SWAP)(why, *([False] if beside_some else []))
