"""Find all that a workload's functions hold besides the model.

All that a call of a loss can reach and change.

A loss reaches a teacher, the other network of a GAN, centres or a counter by its closure, its defaults and attributes,
by the globals that it names, by the object whose method it is. One walk finds them, for all who have to know: what is
put back after planning and after an out-of-memory, batch statistics, the test of exactness.

It goes where the user's code goes. Into classes of torch, of the standard library and of installed packages it doesn't
follow functions or plain attributes, only modules, tensors and containers of these. An iterator that a loss draws from
is not seen: nothing can put it back.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .rng import is_generator

_DEEPEST = 8  # steps from a function to what it holds
_MANY = 4096  # a container with more entries is data: it isn't looked through
_PLAIN: frozenset[type] = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device})
_STATE = (
    torch.Tensor, np.ndarray, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler,
)  # fmt: skip
_COLLECTIONS = (dict, list, deque, tuple, set, frozenset)
_OURS = frozenset({"torch", "numpy", "autoaccum"}) | sys.stdlib_module_names


@dataclass(frozen=True, eq=False)
class Slot:
    """A function's variable: a closure cell, global or class attribute.

    Attributes:
        name: What the code calls it.
        get: Reads it.
        put: Binds it to another value.
    """

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], None]


@dataclass(frozen=True, eq=False)
class Holdings:
    """What functions hold.

    Attributes:
        things: Modules, optimizers, tensors, arrays, generators, containers and objects, with their names.
        slots: Variables that may be bound to something else.
        modules: The modules among the things, and in objects of other packages.
        parameters: Theirs, without those of the model, by name.
    """

    things: tuple[tuple[str, Any], ...] = ()
    slots: tuple[Slot, ...] = ()
    modules: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def holdings(model: nn.Module, **functions: Any) -> Holdings:
    """Find what functions hold, without calling them.

    Args:
        model: The model: itself and the modules in it are no holdings.
        **functions: The functions by the names of a workload's arguments; None for those that there aren't.
    """
    search = _Search(model)
    for name, function in functions.items():
        search.run(function, name)
    own = {id(parameter) for parameter in model.parameters()}
    named = {
        f"{name}.{of}": parameter
        for name, module in search.modules.items()
        for of, parameter in module.named_parameters()
        if id(parameter) not in own
    }
    return Holdings(tuple(search.things), tuple(search.slots), search.modules, named)


def modules_of(loss: Any) -> list[nn.Module]:
    """Return the modules that a loss holds, or is."""
    return list(holdings(nn.Module(), loss=loss).modules.values())


class _Search:
    """Walk functions and objects breadth first, so the nearest name wins.

    That is the one that a person knows.
    """

    def __init__(self, model: nn.Module) -> None:
        self.things: list[tuple[str, Any]] = []
        self.slots: list[Slot] = []
        self.modules: dict[str, nn.Module] = {}
        self.seen: set[int] = {id(module) for module in model.modules()}
        self.taken = {name for name, _ in model.named_children()}
        self.called: set[str] = set()  # names that code met so far uses: of methods, maybe
        self.objects: list[tuple[Any, str, int]] = []
        self.waiting: deque[tuple[Any, str, int]] = deque()

    def run(self, function: Any, name: str) -> None:
        """Walk one function and all that it leads to."""
        self.waiting.append((function, name, 0))
        while self.waiting:
            while self.waiting:
                value, name, depth = self.waiting.popleft()
                if type(value) not in _PLAIN and id(value) not in self.seen and depth <= _DEEPEST:
                    self.seen.add(id(value))
                    self._look(value, name, depth)
            self._methods()

    def _look(self, value: Any, name: str, depth: int) -> None:
        if isinstance(value, nn.Module):
            self._module(value, name, depth)
        elif isinstance(value, _STATE) or is_generator(type(value)):
            self.things.append((name, value))
        elif isinstance(value, functools.partial):
            self._push((value.func, *value.args), name, depth)
            self._push_named(value.keywords, "", depth)
        elif inspect.ismethod(value):
            self.called.add(value.__func__.__name__)
            self._push((value.__func__, value.__self__), name, depth)
        elif inspect.isfunction(value):
            self._function(value, depth)
        elif isinstance(value, _COLLECTIONS):
            self._collection(value, name, depth)
        elif isinstance(value, type):
            self._class(value, depth)
        elif not isinstance(value, types.ModuleType) and hasattr(value, "__dict__"):
            self._object(value, name, depth)

    def _push(self, values: Any, name: str, depth: int) -> None:
        self.waiting.extend((value, name, depth + 1) for value in values)

    def _push_named(self, values: dict[str, Any], prefix: str, depth: int) -> None:
        self.waiting.extend((value, prefix + str(name), depth + 1) for name, value in values.items())

    def _module(self, module: nn.Module, name: str, depth: int) -> None:
        name = f"the loss's {name}" if name in self.taken else name
        self.taken.add(name)
        self.modules[name] = module
        self.things.append((name, module))
        if is_users(type(module).__module__):
            self.objects.append((module, name, depth))
            self._push_named(vars(module), f"{name}.", depth)

    def _function(self, function: Any, depth: int) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self._variable(Slot(name, partial(_read_cell, cell), partial(setattr, cell, "cell_contents")), depth)
        self._push_named(_defaults(function), "", depth)
        if function.__dict__:
            self.things.append((function.__name__, function.__dict__))
            self._push_named(function.__dict__, f"{function.__name__}.", depth)
        names = set(names_in(function.__code__))
        self.called |= names
        if is_users(function.__module__):
            for name in sorted(names & function.__globals__.keys()):
                self._global(function.__globals__, name, names, depth)

    def _global(self, variables: dict[str, Any], name: str, names: set[str], depth: int) -> None:
        value = variables[name]
        if not isinstance(value, types.ModuleType):
            self._variable(Slot(name, partial(variables.get, name), partial(variables.__setitem__, name)), depth)
        elif is_users(value.__name__):  # a file of the user's own, whose variables the code names after a dot
            for inner in sorted(names & vars(value).keys()):
                if not isinstance(vars(value)[inner], types.ModuleType):
                    self._global(vars(value), inner, names, depth)

    def _variable(self, slot: Slot, depth: int) -> None:
        value = slot.get()
        if not isinstance(value, type) and not inspect.isroutine(value):
            self.slots.append(slot)
        self.waiting.append((value, slot.name, depth + 1))

    def _collection(self, values: Any, name: str, depth: int) -> None:
        self.things.append((name, values))
        if len(values) <= _MANY:
            entries = values.items() if isinstance(values, dict) else enumerate(values)
            self._push_named({f"[{key!r}]": value for key, value in entries}, name, depth)

    def _class(self, cls: type, depth: int) -> None:
        """Walk a class that holds variables."""
        if not is_users(cls.__module__):
            return
        for name, value in list(vars(cls).items()):
            if not name.startswith("__") and not callable(value) and not hasattr(type(value), "__get__"):
                get = partial(getattr, cls, name)
                self._variable(Slot(f"{cls.__name__}.{name}", get, partial(setattr, cls, name)), depth)

    def _object(self, value: Any, name: str, depth: int) -> None:
        if is_users(type(value).__module__) or isinstance(value, (types.SimpleNamespace, argparse.Namespace)):
            self.things.append((name, value))
            self.objects.append((value, name, depth))
            self._push_named(vars(value), f"{name}.", depth)
            self.waiting.append((type(value), name, depth + 1))
        elif not type(value).__module__.startswith("torch."):  # of an installed package: an average of weights, say
            inside = {key: inner for key, inner in vars(value).items() if _is_of_tensors(inner)}
            self._push_named(inside, f"{name}.", depth)

    def _methods(self) -> None:
        """Walk the methods that code calls by name, for their globals."""
        for value, name, depth in self.objects:
            for cls in filter(lambda cls: is_users(cls.__module__), type(value).__mro__):
                methods = (vars(cls).get(method) for method in {"__call__", "forward", *self.called} & vars(cls).keys())
                found = [method for method in methods if inspect.isfunction(method) and id(method) not in self.seen]
                self._push(found, name, min(depth, _DEEPEST - 1))


def _is_of_tensors(value: Any) -> bool:
    """Whether it is a module or tensor, or holds only these.

    A logger's queue must not be restored.
    """
    if isinstance(value, (list, dict)):
        entries = list(value.values() if isinstance(value, dict) else value)
        return 0 < len(entries) <= _MANY and all(isinstance(entry, (nn.Module, torch.Tensor)) for entry in entries)
    return isinstance(value, (nn.Module, torch.Tensor))


def names_in(code: types.CodeType) -> Iterator[str]:
    """Return the names that code uses, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def _defaults(function: Any) -> dict[str, Any]:
    """Return defaults by parameter name; lists and dicts live between calls."""
    by_position = function.__defaults__ or ()
    names = function.__code__.co_varnames[: function.__code__.co_argcount][-len(by_position) or None :]
    return dict(zip(names, by_position, strict=False)) | (function.__kwdefaults__ or {})


def _read_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@lru_cache(maxsize=1024)
def is_users(module: str | None) -> bool:
    """Whether code is the user's: not of Python, torch or installed packages."""
    if module is None or module.partition(".")[0] in _OURS:
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file
