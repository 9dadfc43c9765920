"""Snapshot, restore and compare everything that a training step changes.

Knows how PyTorch keeps state: a model, an optimizer, a scheduler and a scaler are objects whose attributes lead
through dicts, lists and tuples to tensors. A snapshot therefore is three things: a shallow copy of every container on
the way (so that the *same objects* go back to their places, and what was added goes), the bytes of every storage
that a tensor on the way uses, copied once to the host however many tensors share it, and the state of every random
number generator. Putting it back writes into the same containers and the same storages, so that whoever holds a
reference (an optimizer, a captured graph) sees nothing move. `load_state_dict` is no use here: it casts.

Doesn't know what a step is, and doesn't follow an arbitrary object (a config, a cache class, a file handle, a lock):
such an attribute is compared, and put back, by identity; what happened inside it is neither seen nor undone. Nor is
what hooks do outside the model. An autograd graph that a step freed stays freed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import zip_longest
from operator import is_
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import RestoreError, UsageError
from .rng import is_generator, put_rng, read_generator, same_state, take_rng, write_generator
from .units import show_bytes

Place = tuple[Any, Any]  # (place of the owner, key in it); the first is (None, "model"). Names are made only if asked.

_CHECKED_BYTES = 1 << 20  # below this, reading /proc/meminfo (30 us) costs more than it tells
_SHOWN = 8
_ABSENT = object()
_NOTHING: MappingProxyType[Any, Any] = MappingProxyType({})
_FOLLOWED = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
_CONTAINERS = (OrderedDict, dict, list, deque, set)  # the more special first: its own methods keep it in order
_SAME_BY_VALUE = (int, float, complex, str, bytes, torch.device)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class _Kind(Enum):
    LEAF, CONTAINER, ITEMS, OBJECT, TENSOR, CELL = range(6)


_Step = tuple[Any, Place, _Kind]


class _Aspect(Enum):
    """Keys in a place that are no key of a container."""

    GRADIENT = "gradient of"
    REQUIRES_GRAD = "requires_grad of"
    HISTORY = "autograd history of"
    ATTRIBUTES = "attribute of"


class _Held(NamedTuple):
    """A tensor as it was; `alias` shares its storage, and is None where the storage isn't covered."""

    tensor: torch.Tensor
    alias: torch.Tensor | None
    requires_grad: bool
    grad: torch.Tensor | None
    grad_fn: Any
    place: Place


class _Stored(NamedTuple):
    """A storage, its size then, and its bytes on the host."""

    storage: torch.UntypedStorage
    nbytes: int
    host: torch.UntypedStorage
    place: Place


@dataclass(eq=False)
class Snapshot:
    """What `take` saw. It keeps every tensor that it saw alive, those on the device too.

    Attributes:
        host_bytes: Bytes of host memory that the copies take; for training on the CPU, committed by this process.
    """

    host_bytes: int = 0
    _containers: list[tuple[Any, Any, Place]] = field(default_factory=list)
    _tensors: dict[int, _Held] = field(default_factory=dict)
    _storages: list[_Stored] = field(default_factory=list)
    _cells: list[tuple[Any, Any, Place]] = field(default_factory=list)
    _rng: dict[str, Any] = field(default_factory=dict)

    def restore(self) -> None:
        """Puts everything back; may be called again.

        Raises:
            RestoreError: Something could not be put back. Everything else was.
        """
        failures: list[str] = []

        def attempt(place: Place | str, put: Callable[..., None], *args: Any) -> None:
            try:
                put(*args)
            except Exception as error:  # whatever it is, the rest must go back first
                name = place if isinstance(place, str) else self._name(place)
                failures.append(f"{name} ({type(error).__name__}: {str(error).partition(chr(10))[0]})")

        with torch.no_grad():
            for container, saved, place in self._containers:
                if not _identical(container, saved):
                    attempt(place, _put_container, container, saved)
            for held in self._tensors.values():
                attempt(held.place, _put_tensor, held)
            for stored in self._storages:
                attempt(stored.place, _put_storage, stored)
            for cell, state, place in self._cells:
                attempt(place, _put_cell, cell, state)
            for name, state in self._rng.items():
                attempt(name, put_rng, {name: state})
        if failures:
            raise RestoreError(
                f"{len(failures)} of the things that training changed could not be put back: {_some(failures)}.",
                "Everything else was put back.",
                "Make the model and its optimizer anew, or load them from a checkpoint, before you train.",
            )

    def differences(self) -> list[str]:
        """What differs now, bitwise, from what was taken: names such as `layers.0.weight` or `torch RNG`."""
        places = [place for entry in self._containers for place in _container_differences(*entry)]
        for held in self._tensors.values():
            places += _tensor_differences(held)
        for stored in self._storages:
            places += self._storage_differences(stored)
        places += [place for cell, state, place in self._cells if not same_state(_read_cell(cell), state)]
        now = take_rng()
        generators = [name for name, state in self._rng.items() if not same_state(now[name], state)]
        return list(dict.fromkeys([*map(self._name, places), *generators]))

    def _storage_differences(self, stored: _Stored) -> list[Place]:
        """The tensors in a storage whose bytes differ; the storage's first tensor where none of them covers it."""
        if stored.storage.nbytes() != stored.nbytes:
            return [stored.place]
        now = _host_copy(stored.storage) if stored.storage.device.type != "cpu" else stored.storage
        if _equal_bytes(now, stored.host):
            return []
        key = stored.storage._cdata
        inside = [held for held in self._tensors.values() if _storage_key(held.alias) == key]
        return [h.place for h in inside if not _equal_tensor(h.alias, now, stored.host)] or [stored.place]

    def _name(self, place: Place) -> str:
        """What a person calls a place."""
        keys: list[Any] = []
        owner: Any = place
        while owner is not None:
            owner, key = owner
            if key is _Aspect.ATTRIBUTES:
                return f"attribute {_from_first(keys)} of {self._name(owner)}"
            if isinstance(key, _Aspect):
                return f"{key.value} {self._name(owner)}{_indexed(keys)}"
            keys.insert(0, key)
        root, *rest = keys
        if root == "model":
            return _name_in_model(rest)
        if root == "optimizer" and len(rest) > 1 and rest[0] == "state":
            param = self._tensors.get(id(rest[1]))
            of = self._name(param.place) if param else "a parameter that came later"
            return f"optimizer state of {of}" + (f": {_from_first(rest[2:])}" if rest[2:] else "")
        return f"{root} attribute {_from_first(rest)}" if rest else str(root)


def take(
    *,
    model: nn.Module,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    storages: bool = True,
) -> Snapshot:
    """Takes a snapshot of all that a training step changes.

    Args:
        model: The module; all modules in it, their parameters, buffers and plain attributes.
        optimizer: Its state, its groups and its other attributes.
        scaler: A gradient scaler.
        scheduler: A learning rate scheduler.
        storages: False for the light form: buffers and tensors in attributes are copied, but neither the bytes of
            parameters nor the optimizer's state, and gradients go back by reference only.

    Returns:
        The snapshot; nothing was changed by taking it.

    Raises:
        UsageError: The host has less memory available than the copies need, or a parameter has no shape yet.
    """
    found = _Walk(storages)
    found.follow(model=model, optimizer=optimizer, scaler=scaler, scheduler=scheduler)
    _check_host(found.host_bytes)
    return Snapshot(
        found.host_bytes,
        found.containers,
        found.tensors,
        [_Stored(storage, storage.nbytes(), _host_copy(storage), place) for storage, place in found.storages.values()],
        [(cell, _read_cell(cell), place) for cell, place in found.cells],
        take_rng(),
    )


def host_bytes_needed(
    *,
    model: nn.Module,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    storages: bool = True,
) -> int:
    """Bytes of host memory that `take` with the same arguments would copy; copies nothing."""
    found = _Walk(storages)
    found.follow(model=model, optimizer=optimizer, scaler=scaler, scheduler=scheduler)
    return found.host_bytes


@contextlib.contextmanager
def kept(
    *,
    model: nn.Module,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    storages: bool = True,
) -> Iterator[Snapshot]:
    """Takes a snapshot and puts it back on every way out: the end, an exception, Ctrl-C.

    A further Ctrl-C while it is being put back waits until that is done, and counts then.

    Args:
        model: As for `take`, like the others.
        optimizer: The optimizer.
        scaler: The gradient scaler.
        scheduler: The learning rate scheduler.
        storages: False for the light form.

    Yields:
        The snapshot.

    Raises:
        RestoreError: Something could not be put back. Everything else was.
        UsageError: As `take`.
    """
    snapshot = take(model=model, optimizer=optimizer, scaler=scaler, scheduler=scheduler, storages=storages)
    try:
        yield snapshot
    finally:
        try:
            _uninterrupted(snapshot.restore)
        except KeyboardInterrupt:  # one that came in the moment before interrupts were held back
            _uninterrupted(snapshot.restore)
            raise


def _uninterrupted(action: Callable[[], None]) -> None:
    """Runs the action with SIGINT held back; it is delivered afterwards. Signals reach the main thread only."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        action()
        return
    arrived: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        action()
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)


@dataclass(eq=False)
class _Walk:
    """What is reached from the model, the optimizer and so on, before anything is copied but references."""

    full: bool
    containers: list[tuple[Any, Any, Place]] = field(default_factory=list)
    tensors: dict[int, _Held] = field(default_factory=dict)
    storages: dict[int, tuple[torch.UntypedStorage, Place]] = field(default_factory=dict)
    cells: list[tuple[Any, Place]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # ids; safe, as everything seen is kept alive by `containers`

    @property
    def host_bytes(self) -> int:
        cells = sum(_cell_bytes(cell) for cell, _ in self.cells)
        return cells + sum(storage.nbytes() for storage, _ in self.storages.values())

    def follow(self, **roots: Any) -> None:
        """Walks depth first and in order, so that what is shared is named as `named_parameters` names it."""
        for name, root in roots.items():
            if root is None:
                continue
            kind = _kind(type(root))  # type: ignore[arg-type]  # mypy finds no hash in type[Any]
            stack: list[_Step] = [(root, (None, name), _Kind.OBJECT if kind is _Kind.LEAF else kind)]
            while stack:
                value, place, kind = stack.pop()
                if id(value) not in self.seen:
                    self.seen.add(id(value))
                    inner = self._tensor(value, place) if kind is _Kind.TENSOR else self._other(value, place, kind)
                    stack.extend(reversed(inner))

    def _other(self, value: Any, place: Place, kind: _Kind) -> list[_Step]:
        if kind is _Kind.CELL:
            self.cells.append((value, place))
            return []
        if kind is _Kind.OBJECT:
            if not self.full and isinstance(value, torch.optim.Optimizer):
                self.seen.add(id(value.state))  # not to be followed
            value = vars(value)
        if kind is not _Kind.ITEMS:
            self.containers.append((value, _shallow(value), place))
        leaf, container, inner = _Kind.LEAF, _Kind.CONTAINER, []
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            kind = _kind(type(entry))  # type: ignore[arg-type]
            if kind is container and not entry and id(entry) not in self.seen:
                # Most are: every module has a dozen dicts of hooks. Straight away: this is the time a snapshot takes.
                self.seen.add(id(entry))
                self.containers.append((entry, _shallow(entry), (place, key)))
            elif kind is not leaf:
                inner.append((entry, (place, key), kind))
        return inner

    def _tensor(self, tensor: torch.Tensor, place: Place) -> list[_Step]:
        if is_lazy(tensor):
            raise UsageError(
                "A parameter or buffer has no shape yet, so its memory can't be planned.",
                "Lazy modules take their shapes from the first batch.",
                "Run one forward pass, model(batch), before planning.",
            )
        is_parameter = isinstance(tensor, nn.Parameter)
        covered = self.full or not is_parameter
        grad = tensor.grad if tensor.is_leaf else None
        alias = tensor.detach() if covered else None
        held = _Held(tensor, alias, tensor.requires_grad, grad, tensor.grad_fn, place)
        self.tensors[id(tensor)] = held
        inner: list[_Step] = []
        if is_parameter:
            inner.append((vars(tensor), (place, _Aspect.ATTRIBUTES), _Kind.CONTAINER))
        if grad is not None and self.full:
            inner.append((grad, (place, _Aspect.GRADIENT), _Kind.TENSOR))
        if is_traceable_wrapper_subclass(tensor):
            names = tensor.__tensor_flatten__()[0]
            inner += [(getattr(tensor, name), (place, name), _Kind.TENSOR) for name in names]
        elif not covered or tensor.device.type == "meta":
            pass  # only who it is, not what is in it
        elif tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self.storages.setdefault(storage._cdata, (storage, place))
        elif tensor.layout is torch.sparse_coo:
            self.cells.append((tensor, place))
        return inner


@lru_cache(maxsize=1024)
def _kind(cls: type) -> _Kind:
    """What to do with the objects of a class."""
    if issubclass(cls, torch.Tensor):
        return _Kind.TENSOR
    if issubclass(cls, _FOLLOWED):
        return _Kind.OBJECT
    if issubclass(cls, _CONTAINERS):
        return _Kind.CONTAINER
    if issubclass(cls, (tuple, frozenset)):
        return _Kind.ITEMS
    return _Kind.CELL if issubclass(cls, np.ndarray) or is_generator(cls) else _Kind.LEAF


def _shallow(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container) if container else _NOTHING  # a thousand new empty dicts would set off the collector
    return set(container) if isinstance(container, set) else list(container)


def _put_container(container: Any, saved: Any) -> None:
    """Puts the same objects back in the same order, with the methods of the plain class: a subclass may forbid them."""
    plain: Any = next(cls for cls in _CONTAINERS if isinstance(container, cls))
    plain.clear(container)
    if isinstance(container, dict):
        for key, value in saved.items():
            plain.__setitem__(container, key, value)
    elif isinstance(container, set):
        plain.update(container, saved)
    else:
        plain.extend(container, saved)


def _identical(container: Any, saved: Any) -> bool:
    if len(container) != len(saved):
        return False
    if not saved:
        return True
    if isinstance(container, set):
        return {*map(id, container)} == {*map(id, saved)}
    if isinstance(container, dict):
        return all(map(is_, container, saved)) and all(map(is_, container.values(), saved.values()))
    return all(map(is_, container, saved))


def _container_differences(container: Any, saved: Any, place: Place) -> list[Place]:
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
    """Whether two values are equal to the bit; tensors and arbitrary objects only where they are the same object."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, _SAME_BY_VALUE):
        return repr(one) == repr(other)  # tells 0.0 from -0.0 and finds nan equal to nan
    if isinstance(one, (set, frozenset)):
        return bool(one == other)
    if isinstance(one, dict):
        return _same([*one.keys()], [*other.keys()]) and _same([*one.values()], [*other.values()])
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(_same, one, other))
    return False


def _put_tensor(held: _Held) -> None:
    tensor = held.tensor
    if tensor.grad_fn is not held.grad_fn:
        if held.grad_fn is not None:
            raise RuntimeError("it was changed in place and is the output of another function now")
        tensor.detach_()  # `self.total += loss` made it an output of the step
    if held.alias is not None and _moved(tensor, held.alias):
        tensor.data = held.alias
    if tensor.requires_grad != held.requires_grad:
        tensor.requires_grad_(held.requires_grad)
    if tensor.is_leaf and tensor.grad is not held.grad:
        tensor.grad = held.grad


def _tensor_differences(held: _Held) -> Iterator[Place]:
    tensor = held.tensor
    if held.alias is not None and _moved(tensor, held.alias):
        yield held.place
    if tensor.grad_fn is not held.grad_fn:
        yield (held.place, _Aspect.HISTORY)
    if tensor.requires_grad != held.requires_grad:
        yield (held.place, _Aspect.REQUIRES_GRAD)
    if tensor.is_leaf and tensor.grad is not held.grad:
        yield (held.place, _Aspect.GRADIENT)


def _moved(tensor: torch.Tensor, alias: torch.Tensor) -> bool:
    """Whether `tensor.data = ...`, `set_` or `resize_` gave it another storage or shape."""
    if tensor.dtype != alias.dtype or tensor.shape != alias.shape or tensor.layout != alias.layout:
        return True
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return False
    geometry = [(t.stride(), t.storage_offset(), t.device) for t in (tensor, alias)]
    return geometry[0] != geometry[1] or _storage_key(tensor) != _storage_key(alias)


def _storage_key(tensor: torch.Tensor | None) -> int | None:
    """Which storage a tensor uses; None where it has none of its own."""
    if tensor is None or tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    return int(tensor.untyped_storage()._cdata)


def _host_copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return torch.UntypedStorage(storage.nbytes()).copy_(storage, False)  # type: ignore[no-untyped-call]


def _put_storage(stored: _Stored) -> None:
    storage = stored.storage
    if storage.nbytes() != stored.nbytes:
        storage.resize_(stored.nbytes)
    # A storage that nobody wrote to may be a read-only file, or pages of one that writing would make our own.
    if storage.device.type != "cpu" or not _equal_bytes(storage, stored.host):
        storage.copy_(stored.host, False)


def _equal_bytes(one: torch.UntypedStorage, other: torch.UntypedStorage) -> bool:
    """Whether two storages on the host hold the same bytes, as integers, so that nan equals itself."""
    size = one.nbytes()
    dtype = torch.uint8 if size % 8 else torch.int64  # 5 times as fast
    shape = ((size // dtype.itemsize,), (1,))
    views = [torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, *shape) for storage in (one, other)]
    return torch.equal(*views)


def _equal_tensor(tensor: torch.Tensor | None, one: torch.UntypedStorage, other: torch.UntypedStorage) -> bool:
    """Whether the elements of a tensor are the same bytes in two copies of its storage on the host."""
    assert tensor is not None
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    dtype = _WORDS[tensor.element_size()]
    views = [torch.empty(0, dtype=dtype, device="cpu").set_(storage, *place) for storage in (one, other)]
    return torch.equal(*(view.reshape(-1).view(torch.uint8) for view in views))


def _read_cell(cell: Any) -> Any:
    """A copy, on the host, of what is neither a container nor a strided tensor: an array, a sparse tensor, an RNG."""
    if isinstance(cell, np.ndarray):
        return cell.copy()
    if isinstance(cell, torch.Tensor):
        return cell._indices().clone().cpu(), cell._values().detach().clone().cpu(), cell.is_coalesced()
    return read_generator(cell)


def _put_cell(cell: Any, state: Any) -> None:
    if same_state(_read_cell(cell), state):
        return
    if isinstance(cell, np.ndarray):
        cell[...] = state
    elif isinstance(cell, torch.Tensor):
        indices, values, ordered = state
        cell.copy_(torch.sparse_coo_tensor(indices, values, cell.shape, check_invariants=False, is_coalesced=ordered))
    else:
        write_generator(cell, state)


def _cell_bytes(cell: Any) -> int:
    if isinstance(cell, torch.Tensor):
        return cell._indices().nbytes + cell._values().nbytes
    return cell.nbytes if isinstance(cell, np.ndarray) else 0


def _check_host(needed_bytes: int) -> None:
    available_bytes = _available_bytes() if needed_bytes > _CHECKED_BYTES else None
    if available_bytes is not None and needed_bytes > available_bytes:
        raise UsageError(
            f"A copy of the model and its optimizer takes {show_bytes(needed_bytes)} of host memory, "
            f"and {show_bytes(available_bytes)} are available (MemAvailable in /proc/meminfo).",
            "Planning trains real steps, and puts every bit back from that copy.",
            "Free host memory, or plan where there is more; before the first optimizer step the copy is smallest.",
        )


def _available_bytes() -> int | None:
    """Host memory that can be had without swapping; None where the system doesn't say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return "; ".join(names[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _name_in_model(keys: list[Any]) -> str:
    """The name of what these keys lead to from the model, as `named_parameters` and `named_modules` put it."""
    modules: list[str] = []
    while len(keys) > 1 and keys[0] == "_modules":
        modules.append(keys[1])
        keys = keys[2:]
    module = ".".join(modules)
    if not keys:
        return f"module {module}" if module else "model"
    if len(keys) == 2 and keys[0] in ("_parameters", "_buffers"):
        return ".".join([*modules, keys[1]])
    if keys == ["training"]:
        return f"training mode of {module or 'the model'}"
    return f"module attribute {'.'.join([*modules, keys[0]])}{_indexed(keys[1:])}"


def _from_first(keys: list[Any]) -> str:
    return f"{keys[0]}{_indexed(keys[1:])}"


def _indexed(keys: list[Any]) -> str:
    return "".join(f"[{key!r}]" if isinstance(key, (str, int)) else "[...]" for key in keys)
