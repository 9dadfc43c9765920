"""Digest live objects: what a training's memory depends on, as bytes.

A model's tree with its plain attributes, tensors by their form and ties, functions by their code and all that they hold
or name. Two processes that make the same objects get the same digest. What can't be looked into, such as a tokenizer of
native code, is refused: `Opaque` names it.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import inspect
import logging
import random
import re
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from ..state.closures import is_users, names_in
from ..torch_compat import (
    accumulation_hooks,
    compiled_call,
    gradient_hooks,
    is_compiled_function,
    is_compiled_wrapper,
    storage_id,
)

_MOST_OBJECTS = 300_000
_MOST_VALUES = 4096  # integers of a buffer; an index of relative positions has some 2,400
_FEW_VALUES = 16  # of any type: a gate, a temperature
_SAMPLE_VALUES = 1 << 24
_PLAIN: frozenset[type] = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type(Ellipsis), range, slice, torch.dtype, torch.device}
)
_BY_TEXT = (
    torch.layout, torch.memory_format, np.dtype, np.generic, PurePath, datetime.date, datetime.time, datetime.timedelta,
    decimal.Decimal, fractions.Fraction, np.ufunc,
)  # fmt: skip
_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_OPERATORS = (type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor))
_BY_TYPE = (type(threading.Lock()), type(threading.RLock()))  # they hold nothing
_OBJECT_BYTES = object.__basicsize__ + 2 * 8  # and references to its attributes and to what refers weakly to it


class Opaque(Exception):
    """Something can't be looked into; says what."""


class LiveDigest:
    """Adds objects up to a digest.

    Args:
        reads: Whether the values of a tensor may be read: on a virtual GPU they mean nothing.
    """

    def __init__(self, reads: Callable[[torch.Tensor], bool]) -> None:
        self._hash = hashlib.sha256()
        self._numbers: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is an object's only while that lives
        self._reads = reads

    def add(self, name: str, value: Any) -> None:
        """Add an object.

        Raises:
            Opaque: It, or something in it, can't be looked into.
        """
        self._write(name)
        try:
            self._feed(value, name)
        except RecursionError:
            raise Opaque(f"{name} is nested too deep") from None

    def add_values(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor with all its values.

        Raises:
            Opaque: They are too many.
        """
        self.add(name, tensor)
        if tensor.numel() > _SAMPLE_VALUES:
            raise Opaque(f"{name} has more than {_SAMPLE_VALUES:,} values")
        if self._reads(tensor):
            self._values(tensor.contiguous())

    def hexdigest(self) -> str:
        """Return the digest of all that was added."""
        return self._hash.hexdigest()

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._hash.update(b"%d:" % len(data) + data)

    def _feed(self, value: Any, name: str) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self._write(f"{kind.__name__} {value!r}")
            return
        if id(value) in self._numbers:
            self._write(f"again {self._numbers[id(value)]}")
            return
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        if len(self._alive) > _MOST_OBJECTS:
            raise Opaque(f"{name} and what it holds are more than {_MOST_OBJECTS:,} objects")
        self._write(f"{kind.__module__}.{kind.__qualname__}")
        self._look_into(value, name)

    def _look_into(self, value: Any, name: str) -> None:
        """Add what an object is made of, by its kind."""
        if isinstance(value, torch.Tensor):
            self._tensor(value, name)
        elif isinstance(value, nn.Module):
            self._module(value, name)
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._pairs(value.items(), name)
            self._attributes(value, name)
        elif isinstance(value, (list, tuple, deque)):
            for index, entry in enumerate(value):
                self._feed(entry, f"{name}[{index}]")
            self._attributes(value, name)
        elif isinstance(value, (set, frozenset)):
            self._set(value, name)
        elif isinstance(value, (type, types.ModuleType)):
            self._named(value, name)
        elif not self._function(value, name) and not self._by_value(value):
            self._object(value, name)

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], name: str) -> None:
        for key, entry in pairs:
            self._feed(key, name)
            if isinstance(key, str) and "_hooks" in key and isinstance(entry, dict):
                entry = list(entry.values())  # by numbers, which count all hooks of the process
            self._feed(entry, f"{name}.{key}" if isinstance(key, str) else name)

    def _attributes(self, value: Any, name: str) -> None:
        if attributes := getattr(value, "__dict__", None):
            self._pairs(attributes.items(), name)

    def _set(self, values: Any, name: str) -> None:
        """Add a set in an order that doesn't depend on addresses."""
        plain = all(type(entry) in _PLAIN for entry in values)
        known = all(id(entry) in self._numbers for entry in values)
        if not plain and not known:
            raise Opaque(f"{name} is a set of objects")
        self._write(" ".join(sorted(repr(entry) if plain else f"{self._numbers[id(entry)]:9}" for entry in values)))

    def _module(self, module: nn.Module, name: str) -> None:
        if is_compiled_wrapper(module) or compiled_call(module) is not None:
            raise Opaque(f"{name} is compiled")
        if isinstance(module, torch.jit.ScriptModule):
            raise Opaque(f"{name} is scripted")
        self._class(type(module), name)
        self._pairs(vars(module).items(), name)

    def _tensor(self, tensor: torch.Tensor, name: str) -> None:
        self._write(f"{tensor.shape} {tensor.dtype} {tensor.device} {tensor.layout} {tensor.requires_grad}")
        if tensor.layout is torch.strided and not tensor.is_meta:
            storage = tensor.untyped_storage()
            self._alive.append(storage)
            tie = self._storages.setdefault(storage_id(storage), len(self._storages))
            self._write(f"{tensor.stride()} {tensor.storage_offset()} {storage.nbytes()} {tie}")
        is_small = tensor.numel() <= (_FEW_VALUES if tensor.is_floating_point() else _MOST_VALUES)
        if is_small and not tensor.is_complex() and self._reads(tensor):
            self._values(tensor)
        if tensor.grad_fn is None and tensor.grad is not None:
            self._feed(tensor.grad, f"{name}.grad")
        self._attributes(tensor, name)
        self._feed([*gradient_hooks(tensor), *accumulation_hooks(tensor)], f"hooks of {name}")

    def _values(self, tensor: torch.Tensor) -> None:
        if tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_quantized:
            self._hash.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())

    def _function(self, value: Any, name: str) -> bool:
        """Add a function of any kind; return whether it is one."""
        if is_compiled_function(value):
            raise Opaque(f"{name} is compiled")
        if isinstance(value, types.FunctionType):
            self._python_function(value, name)
        elif isinstance(value, types.MethodType):
            self._feed(value.__func__, name)
            self._feed(value.__self__, f"the object of {name}")
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            self._feed((value.func, value.args, value.keywords), name)
        elif isinstance(value, (staticmethod, classmethod)) or hasattr(value, "cache_info"):
            self._feed(value.__wrapped__, name)
        elif isinstance(value, property):
            self._feed((value.fget, value.fset), name)
        elif isinstance(value, _BUILT_IN):
            self._write(f"{getattr(value, '__module__', '')} {value.__qualname__}")
        elif isinstance(value, _OPERATORS):
            self._write(str(value))
        else:
            return False
        return True

    def _python_function(self, function: Any, name: str) -> None:
        self._write(f"{function.__module__}.{function.__qualname__}")
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                self._feed(cell.cell_contents, variable)
            except ValueError:
                self._write("an empty cell")
        if not is_users(function.__module__):
            return  # its file has a stamp
        self._code(function.__code__)
        self._feed((function.__defaults__, function.__kwdefaults__, vars(function)), name)
        names = sorted(set(names_in(function.__code__)) & function.__globals__.keys())
        for variable in names:
            found = function.__globals__[variable]
            self._feed(found, variable)
            if isinstance(found, types.ModuleType) and is_users(found.__name__):
                inner = sorted(set(names_in(function.__code__)) & vars(found).keys())
                self._pairs(((each, vars(found)[each]) for each in inner), variable)

    def _code(self, code: types.CodeType) -> None:
        self._hash.update(code.co_code)
        self._write(f"{code.co_names} {code.co_varnames} {code.co_freevars} {code.co_flags}")
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._write(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant))

    def _named(self, value: Any, name: str) -> None:
        if isinstance(value, types.ModuleType):
            self._write(value.__name__)
            return
        self._write(f"{value.__module__}.{value.__qualname__}")
        self._class(value, name)

    def _class(self, cls: type, name: str) -> None:
        """Add what the user's code put into a class and its bases."""
        for each in cls.__mro__:
            if id(each) in self._numbers and each is not cls:
                continue
            if is_users(each.__module__):
                kept = {key: value for key, value in vars(each).items() if not key.startswith("__") or callable(value)}
                kept = {key: value for key, value in kept.items() if not _is_of_the_class(value)}
            else:  # an installed package's: only what was put in the place of its own
                found = {key: value for key, value in vars(each).items() if inspect.isfunction(value)}
                kept = {key: value for key, value in found.items() if is_users(value.__module__)}
            for key in sorted(kept):
                self._feed(kept[key], f"{each.__qualname__}.{key}")

    def _by_value(self, value: Any) -> bool:
        """Add what equals another by its value; return whether it was that."""
        if isinstance(value, np.ndarray) and value.dtype != object:
            self._write(f"{value.dtype} {value.shape} {value.strides}")
            self._hash.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, torch.Generator):
            self._hash.update(value.get_state().numpy().tobytes())
        elif isinstance(value, (np.random.RandomState, random.Random)):
            state: Any = value.get_state() if isinstance(value, np.random.RandomState) else value.getstate()
            self._feed(state, "a random state")
        elif isinstance(value, np.random.Generator):
            self._feed(value.bit_generator.state, "a random state")
        elif isinstance(value, re.Pattern):
            self._write(f"{value.pattern!r} {value.flags}")
        elif isinstance(value, (enum.Enum, logging.Logger)):
            self._write(value.name)
        elif isinstance(value, weakref.ref):
            self._feed(value(), "what a weak reference leads to")
        elif isinstance(value, _BY_TEXT):
            self._write(str(value))
        elif not isinstance(value, (types.SimpleNamespace, *_BY_TYPE)):
            return False
        else:
            self._attributes(value, "a namespace")
        return True

    def _object(self, value: Any, name: str) -> None:
        """Add an object of a Python class, by all its attributes."""
        cls = type(value)
        slots = [slot for each in cls.__mro__ for slot in _slots(each)]
        if cls.__basicsize__ > _OBJECT_BYTES + 8 * len(slots) or not (slots or hasattr(value, "__dict__")):
            raise Opaque(f"{name} is a {cls.__module__}.{cls.__qualname__}, which can't be looked into")
        self._class(cls, name)
        self._attributes(value, name)
        for slot in sorted(slots):
            if hasattr(value, slot):
                self._feed(getattr(value, slot), f"{name}.{slot}")


def _slots(cls: type) -> list[str]:
    found = vars(cls).get("__slots__", ())
    names = [found] if isinstance(found, str) else list(found)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _is_of_the_class(value: Any) -> bool:
    """Return whether Python made it with the class, and it says nothing."""
    return isinstance(value, (types.GetSetDescriptorType, types.MemberDescriptorType)) or type(value).__name__ in (
        "_abc_data",
        "_tuplegetter",
    )
