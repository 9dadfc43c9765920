"""Find everything that a training step can change, and name it.

Knows how PyTorch keeps state: a model, an optimizer, a scheduler and a scaler are objects whose attributes lead
through dicts, lists and tuples to tensors. A walk goes along all of them and writes down every container, tensor,
storage and generator that it meets, once, with its place. It copies references, and no tensor's bytes.

Doesn't follow an arbitrary object (a config, a cache class, a file handle, a lock): that is a leaf, known by its
identity. Doesn't know what becomes of what it found: state/snapshot.py copies it, compares it and puts it back.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import zip_longest
from operator import is_
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import UsageError
from ..torch_compat import (
    BUFFERS,
    MODULES,
    PARAMETERS,
    is_lazy,
    is_traceable_wrapper_subclass,
    sparse_parts,
    storage_id,
    write_count,
)
from .closures import Holdings, Slot
from .rng import is_generator

Place = tuple[Any, Any]  # (place of the owner, key in it); the first is (None, "model"). Names are made only if asked.

_Step = tuple[Any, Place, int]  # value, place, kind
# Kinds of values, as integers: reading an Enum's member takes 90 ns in Python 3.11.
_LEAF, _CONTAINER, _ITEMS, _TENSOR, _CELL, _OBJECT, _MODULE, _BUILT_IN = range(8)

CONTAINERS = (OrderedDict, dict, list, deque, set)  # the more special first: its own methods keep it in order

_ABSENT = object()
_SAME_BY_VALUE = (int, float, complex, str, bytes, torch.device)
_NOTHING: MappingProxyType[Any, Any] = MappingProxyType({})
_FOLLOWED = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
# What leads nowhere. Most containers hold nothing else: a thousand of those are what a walk spends its time on.
_PLAIN: frozenset[type] = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
_PLAIN_IF_LIGHT = _PLAIN | {nn.Parameter}
# What torch itself keeps in every module and no forward changes: hooks and flags. The light walk leaves them out.
_LEFT_OUT = frozenset(vars(nn.Module())) - {"training", PARAMETERS, BUFFERS, MODULES}
_OBJECTS = {_OBJECT, _MODULE, _BUILT_IN}
# Of what functions hold outside of modules, how many bytes a tensor and how many entries a container may have to be
# followed: in full, and in the light form, which has to be quick. A data set that an object holds is neither copied
# nor gone through.
_LIMITS = {True: (1 << 26, 4096), False: (1 << 22, 256)}
_COLLECTIONS = {_CONTAINER, _ITEMS}


class Aspect(Enum):
    """Keys in a place that are no key of a container."""

    GRADIENT = "gradient of"
    REQUIRES_GRAD = "requires_grad of"
    HISTORY = "autograd history of"
    ATTRIBUTES = "attribute of"


class HeldName(str):
    """The first key to what a function holds: its code's name."""

    __slots__ = ()


class Held(NamedTuple):
    """A tensor as it was; `alias` shares its storage."""

    tensor: torch.Tensor
    alias: torch.Tensor
    requires_grad: bool
    grad: torch.Tensor | None
    grad_fn: Any
    place: Place


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a storage; others have `parts`."""
    is_wrapper = type(tensor) is not torch.Tensor and is_traceable_wrapper_subclass(tensor)
    return tensor.layout is torch.strided and not is_wrapper


def parts(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors that a sparse or wrapper tensor consists of."""
    if is_traceable_wrapper_subclass(tensor):
        named = ((name, getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return [(name, part) for name, part in named if isinstance(part, torch.Tensor)]  # DTensor names its mesh, too
    if tensor.layout is torch.sparse_coo and not tensor.is_meta:
        return sparse_parts(tensor)
    return []


@dataclass(eq=False)
class Walk:
    """What is reached from the model, the optimizer and so on.

    Attributes:
        full: Whether to follow all. If not, only what a forward changes: no parameter, no optimizer, no hook.
        containers: Each with a shallow copy.
        tensors: By their ids.
        storages: By their addresses; each with the place of the first tensor in it.
        cells: NumPy arrays and random number generators.
        slots: Variables of functions, with what they are bound to.
        held: The storages that were reached only from what functions hold, by their addresses, with their tensors.
        watched: Tensors that are too large to copy, with how often they were written to in place.
        gradients: Parameters of modules that a loss holds, with their gradients; for the light form.
        seen: Ids of all of them; safe, as `containers` and `tensors` keep whatever was seen alive.
    """

    full: bool = True
    containers: list[tuple[Any, Any, Place]] = field(default_factory=list)
    tensors: dict[int, Held] = field(default_factory=dict)
    storages: dict[int, tuple[torch.UntypedStorage, Place]] = field(default_factory=dict)
    cells: list[tuple[Any, Place]] = field(default_factory=list)
    slots: list[tuple[Slot, Any]] = field(default_factory=list)
    held: dict[int, list[tuple[torch.Tensor, Place]]] = field(default_factory=dict)
    watched: list[tuple[torch.Tensor, int, Place]] = field(default_factory=list)
    gradients: list[tuple[nn.Parameter, torch.Tensor | None, Place]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    _limits: tuple[int, int] | None = None  # while it follows what functions hold

    @property
    def host_bytes(self) -> int:
        """Bytes of all storages and arrays."""
        arrays = [cell.nbytes for cell, _ in self.cells if isinstance(cell, np.ndarray)]
        return sum(arrays) + sum(storage.nbytes() for storage, _ in self.storages.values())

    def follow(self, root: Any, name: str) -> None:
        """Walk depth first, in order, so shared tensors get `named_parameters`' names."""
        kind = _kind(type(root), self.full)  # type: ignore[arg-type]  # mypy finds no hash in type[Any]
        stack: list[_Step] = [(root, (None, name), _OBJECT if kind == _LEAF else kind)]
        while stack:
            value, place, kind = stack.pop()
            if id(value) in self.seen:
                continue
            self.seen.add(id(value))
            if inner := self._inside(value, place, kind):
                stack.extend(reversed(inner))

    def follow_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Walk the objects in an optimizer's state, of any class.

        A projection that some steps move (GaLore's) is one.
        """
        for state in optimizer.state.values():
            for key, value in state.items() if isinstance(state, dict) else ():
                if _kind(type(value), True) == _LEAF and hasattr(value, "__dict__") and not callable(value):  # type: ignore[arg-type]
                    self.follow(value, f"optimizer state {key}")

    def follow_held(self, held: Holdings) -> None:
        """Walk from what functions hold now."""
        self._limits = _LIMITS[self.full]
        for slot in held.slots:
            value = slot.get()
            self.slots.append((slot, value))
            if _kind(type(value), self.full) != _LEAF:  # type: ignore[arg-type]
                self.follow(value, HeldName(slot.name))
        for name, thing in held.things:
            self.follow(thing, HeldName(name))
        for name, parameter in held.parameters.items() if not self.full else ():
            if parameter.requires_grad:
                place = (None, HeldName(name))
                self.gradients.append((parameter, parameter.grad, place))
                if parameter.grad is not None:
                    self._bytes(parameter.grad, (place, Aspect.GRADIENT))
        self._limits = None

    def _inside(self, value: Any, place: Place, kind: int) -> list[_Step]:
        """Record one object; return what it leads to."""
        if kind == _TENSOR:
            return self._tensor(value, place)
        if self._limits is not None and kind in (_CELL, _CONTAINER, _ITEMS) and self._is_data(value, place, kind):
            return []
        if kind == _CELL:
            self.cells.append((value, place))
            return []
        if kind == _ITEMS:
            return self._entries(enumerate(value), place)
        if kind in _OBJECTS:
            value = vars(value)
        self.containers.append((value, _shallow(value), place))
        if kind == _BUILT_IN:
            return self._built_in(value, place)
        if kind == _MODULE:
            return self._entries([item for item in value.items() if item[0] not in _LEFT_OUT], place)
        return self._entries(value.items() if isinstance(value, dict) else enumerate(value), place)

    def _is_data(self, value: Any, place: Place, kind: int) -> bool:
        """Whether it is too large to follow."""
        assert self._limits is not None
        most_bytes, most_entries = self._limits
        if kind == _CELL:
            return isinstance(value, np.ndarray) and value.nbytes > most_bytes
        if len(value) <= most_entries:
            return False
        if self.full and kind == _CONTAINER:
            self.containers.append((value, _shallow(value), place))
        return True

    def _entries(self, entries: Iterable[tuple[Any, Any]], place: Place) -> list[_Step]:
        """Return a container's entries; record plain values directly."""
        plain, seen, inner = _PLAIN if self.full else _PLAIN_IF_LIGHT, self.seen, list[_Step]()
        for key, entry in entries:
            if type(entry) in plain:
                continue
            kind = _kind(type(entry), self.full)  # type: ignore[arg-type]  # mypy finds no hash in type[Any]
            if kind == _LEAF or id(entry) in seen:
                continue
            large = self._limits is not None and kind in _COLLECTIONS and len(entry) > self._limits[1]
            if kind in _COLLECTIONS and not large and plain.issuperset(map(type, _values(entry))):
                if kind == _CONTAINER:
                    seen.add(id(entry))
                    self.containers.append((entry, _shallow(entry), (place, key)))
            else:
                inner.append((entry, (place, key), kind))
        return inner

    def _built_in(self, attributes: dict[str, Any], place: Place) -> list[_Step]:
        """Walk one of torch's modules lightly: only its buffers change."""
        inner: list[_Step] = []
        if buffers := attributes[BUFFERS]:
            where = (place, BUFFERS)
            self.containers.append((buffers, _shallow(buffers), where))
            for name, buffer in buffers.items():
                inner += self._bytes(buffer, (where, name)) if buffer is not None else []
        if attributes[MODULES]:
            inner.append((attributes[MODULES], (place, MODULES), _CONTAINER))
        return inner

    def _tensor(self, tensor: torch.Tensor, place: Place) -> list[_Step]:
        if is_lazy(tensor):
            raise UsageError(
                "A parameter or buffer has no shape yet, so its memory can't be planned.",
                "Lazy modules take their shapes from the first batch.",
                "Run one forward pass, model(batch), before planning.",
            )
        inner: list[_Step] = []
        if isinstance(tensor, nn.Parameter):
            if not self.full:
                return []
            inner.append((vars(tensor), (place, Aspect.ATTRIBUTES), _CONTAINER))
        grad = tensor.grad if tensor.is_leaf else None
        self.tensors[id(tensor)] = Held(tensor, tensor.detach(), tensor.requires_grad, grad, tensor.grad_fn, place)
        if grad is not None:
            inner.append((grad, (place, Aspect.GRADIENT), _TENSOR))
        return inner + self._bytes(tensor, place)

    def _bytes(self, tensor: torch.Tensor, place: Place) -> list[_Step]:
        if not tensor.is_meta and has_storage(tensor):
            storage = tensor.untyped_storage()
            name = storage_id(storage)
            if self._limits is not None and (name in self.held or name not in self.storages):
                if storage.nbytes() > self._limits[0] and not _is_of_module(place):
                    self.watched.append((tensor, write_count(tensor), place))
                    return []
                self.held.setdefault(name, []).append((tensor, place))
            self.storages.setdefault(name, (storage, place))
            return []
        return [(part, (place, name), _TENSOR) for name, part in parts(tensor)]


def _is_of_module(place: Place) -> bool:
    owner = place[0]
    return place[1] is Aspect.GRADIENT or (owner is not None and owner[1] in (BUFFERS, PARAMETERS))


def walk(full: bool, held: Holdings | None = None, **roots: Any) -> Walk:
    """Walk model, optimizer, scaler, scheduler and held objects."""
    found = Walk(full)
    for name, root in roots.items():
        if root is not None and (full or name in ("model", "scaler")):
            found.follow(root, name)
    if full and isinstance(roots.get("optimizer"), torch.optim.Optimizer):
        found.follow_state(roots["optimizer"])
    if held is not None:
        found.follow_held(held)
    return found


@lru_cache(maxsize=1024)
def _kind(cls: type, full: bool) -> int:
    """Return how to treat the objects of a class."""
    if not full and issubclass(cls, (nn.Parameter, torch.optim.Optimizer)):
        return _LEAF
    if issubclass(cls, torch.Tensor):
        return _TENSOR
    if issubclass(cls, nn.Module) and not full:
        return _BUILT_IN if cls.__module__.startswith("torch.nn.modules.") else _MODULE
    if issubclass(cls, _FOLLOWED):
        return _OBJECT
    if issubclass(cls, CONTAINERS):
        return _CONTAINER
    if issubclass(cls, (tuple, frozenset)):
        return _ITEMS
    return _CELL if issubclass(cls, np.ndarray) or is_generator(cls) else _LEAF


def _shallow(container: Any) -> Any:
    if not container and isinstance(container, dict):
        return _NOTHING  # a thousand new empty dicts would set off the collector
    if isinstance(container, dict):
        return container.copy() if type(container) is dict else dict(container)  # copy() takes a fifth of the time
    return set(container) if isinstance(container, set) else list(container)


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def identical(container: Any, saved: Any) -> bool:
    """Whether a container holds its shallow copy's very objects, in order."""
    if isinstance(container, set):
        return {*map(id, container)} == {*map(id, saved)}
    if isinstance(container, dict) and not all(map(is_, container.values(), saved.values())):
        return False
    return len(container) == len(saved) and all(map(is_, container, saved))


def container_differences(container: Any, saved: Any, place: Place) -> list[Place]:
    """Where a container differs, bitwise, from its shallow copy."""
    if isinstance(container, set):
        return [] if container == saved else [place]
    if not isinstance(container, dict):
        pairs = enumerate(zip_longest(container, saved, fillvalue=_ABSENT))
        return [(place, index) for index, (item, old) in pairs if not _same(item, old)]
    keys = dict.fromkeys([*saved, *container])
    changed = [key for key in keys if not _same(container.get(key, _ABSENT), saved.get(key, _ABSENT))]
    reordered = not changed and [*map(id, keys)] != [*map(id, container)]
    return [place] if reordered else [(place, key) for key in changed]


def _same(one: Any, other: Any) -> bool:
    """Whether two values are bitwise equal; tensors and objects by identity."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (set, frozenset)):
        return bool(one == other)
    if isinstance(one, dict):
        return _same([*one.items()], [*other.items()])
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, _SAME_BY_VALUE) and repr(one) == repr(other)  # tells 0.0 from -0.0; nan equals nan
