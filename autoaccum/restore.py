"""Snapshot, restore and compare everything that a training step changes.

A snapshot is three things: a shallow copy of every container that reach.py finds (so that the *same objects* go back
to their places, and what was added goes), the bytes of every storage that a tensor uses, copied once to the host
however many tensors share it, and the state of every random number generator. Putting it back writes into the same
containers and the same storages, so that whoever holds a reference (an optimizer, a captured graph) sees nothing
move. `load_state_dict` is no use here: it casts.

Doesn't know what a step is, nor where things are. An attribute that leads to an arbitrary object is compared, and put
back, by identity; what happened inside it is neither seen nor undone. Nor is what hooks do outside the model. An
autograd graph that a step freed stays freed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from operator import is_
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .errors import RestoreError, UsageError
from .reach import CONTAINERS, Aspect, Held, Place, Walk, has_storage, name_of, parts
from .rng import put_rng, read_generator, same_state, take_rng, write_generator
from .units import show_bytes

_CHECKED_BYTES = 1 << 20  # below this, reading /proc/meminfo (30 us) costs more than it tells
_SMALL_BYTES = 1 << 14  # storages up to this are copied together: a copy each takes 4 us, and on a GPU a wait each
_SHOWN = 8  # names in a message
_ABSENT = object()
_SAME_BY_VALUE = (int, float, complex, str, bytes, torch.device)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


_Entry = tuple[torch.UntypedStorage, Place]


class _Copies(NamedTuple):
    """Storages, their sizes then, and their bytes on the host, one after the other."""

    entries: list[_Entry]
    sizes: list[int]
    host: torch.UntypedStorage


class _Stored(NamedTuple):
    """A storage, its size then, and its bytes on the host."""

    storage: torch.UntypedStorage
    nbytes: int
    host: torch.UntypedStorage
    place: Place


@dataclass(eq=False, frozen=True)
class Snapshot:
    """What `take` saw. It keeps every tensor that it saw alive, those on the device too.

    Attributes:
        host_bytes: Bytes of host memory that the copies take; for training on the CPU, committed by this process.
    """

    host_bytes: int
    _found: Walk
    _copies: list[_Copies]
    _cells: list[tuple[Any, Any, Place]]
    _rng: dict[str, Any]

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
            for container, saved, place in self._found.containers:
                if not _identical(container, saved):
                    attempt(place, _put_container, container, saved)
            for held in self._found.tensors.values():
                attempt(held.place, _put_tensor, held)
            for stored in self._stored():
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
        places = [place for entry in self._found.containers for place in _container_differences(*entry)]
        for held in self._found.tensors.values():
            places += _tensor_differences(held)
        for stored in self._stored():
            places += self._storage_differences(stored)
        places += [place for cell, state, place in self._cells if not same_state(_read_cell(cell), state)]
        now = take_rng()
        generators = [name for name, state in self._rng.items() if not same_state(now[name], state)]
        return list(dict.fromkeys([*map(self._name, places), *generators]))

    def _stored(self) -> Iterator[_Stored]:
        """Every storage with its own part of the copies."""
        for entries, sizes, host in self._copies:
            ends = accumulate(sizes)
            for (storage, place), nbytes, end in zip(entries, sizes, ends, strict=True):
                yield _Stored(storage, nbytes, host[end - nbytes : end], place)  # a slice shares the bytes

    def _storage_differences(self, stored: _Stored) -> list[Place]:
        """The tensors in a storage whose bytes differ; the storage's first tensor where none of them covers it."""
        if stored.storage.nbytes() != stored.nbytes:
            return [stored.place]
        now = _host_copy([stored.storage]) if stored.storage.device.type != "cpu" else stored.storage
        if _equal_bytes(now, stored.host):
            return []
        key = stored.storage._cdata
        strided = [held for held in self._found.tensors.values() if has_storage(held.alias)]
        inside = [held for held in strided if held.alias.untyped_storage()._cdata == key]
        return [held.place for held in inside if not _equal_tensor(held.alias, now, stored.host)] or [stored.place]

    def _name(self, place: Place) -> str:
        return name_of(place, self._found.tensors)


def take(
    *, model: nn.Module, optimizer: Any = None, scaler: Any = None, scheduler: Any = None, storages: bool = True
) -> Snapshot:
    """Takes a snapshot of all that a training step changes.

    The light form is for what a forward or a backward changes, and quick enough for every window (0.4 ms for a
    ResNet-18 on the CPU). It covers the random number generators, the scaler, and of the modules the buffers, the
    plain attributes and who is in them. Parameters, their gradients, optimizer and scheduler stay as they are, as do
    hooks; and in torch's own modules (`torch.nn.modules`) the insides of attributes: those go back by reference.

    Args:
        model: The module; all modules in it, their parameters, buffers and plain attributes.
        optimizer: Its state, its groups and its other attributes.
        scaler: A gradient scaler.
        scheduler: A learning rate scheduler.
        storages: False for the light form.

    Returns:
        The snapshot; nothing was changed by taking it.

    Raises:
        UsageError: The host has less memory available than the copies need, or a parameter has no shape yet.
    """
    found = _walk(model, optimizer, scaler, scheduler, storages)
    host_bytes = found.host_bytes
    _check_host(host_bytes)
    cells = [(cell, _read_cell(cell), place) for cell, place in found.cells]
    return Snapshot(host_bytes, found, _copy(found.storages.values()), cells, take_rng())


def host_bytes_needed(
    *, model: nn.Module, optimizer: Any = None, scaler: Any = None, scheduler: Any = None, storages: bool = True
) -> int:
    """Bytes of host memory that `take` with the same arguments would copy; copies nothing."""
    return _walk(model, optimizer, scaler, scheduler, storages).host_bytes


def _walk(model: nn.Module, optimizer: Any, scaler: Any, scheduler: Any, full: bool) -> Walk:
    found = Walk(full)
    found.follow(model=model, scaler=scaler, **({"optimizer": optimizer, "scheduler": scheduler} if full else {}))
    return found


@contextlib.contextmanager
def kept(
    *, model: nn.Module, optimizer: Any = None, scaler: Any = None, scheduler: Any = None, storages: bool = True
) -> Iterator[Snapshot]:
    """Takes a snapshot and puts it back on every way out: the end, an exception, Ctrl-C.

    A further Ctrl-C while it is being put back waits until that is done, and counts then.

    Yields:
        The snapshot, which `take` made of the same arguments.

    Raises:
        RestoreError: Something could not be put back. Everything else was.
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


def _put_container(container: Any, saved: Any) -> None:
    """Puts the same objects back in the same order, with the methods of the plain class: a subclass may forbid them."""
    plain: Any = next(cls for cls in CONTAINERS if isinstance(container, cls))
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
    if isinstance(one, (set, frozenset)):
        return bool(one == other)
    if isinstance(one, dict):
        return _same([*one.items()], [*other.items()])
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, _SAME_BY_VALUE) and repr(one) == repr(other)  # tells 0.0 from -0.0; nan equals nan


def _put_tensor(held: Held) -> None:
    tensor = held.tensor
    if tensor.grad_fn is not held.grad_fn:
        if held.grad_fn is not None:
            raise RuntimeError("it was changed in place and is the output of another function now")
        tensor.detach_()  # `self.total += loss` made it an output of the step
    if _moved(tensor, held.alias):
        tensor.data = held.alias
    if tensor.requires_grad != held.requires_grad:
        tensor.requires_grad_(held.requires_grad)
    if tensor.is_leaf and tensor.grad is not held.grad:
        tensor.grad = held.grad


def _tensor_differences(held: Held) -> Iterator[Place]:
    tensor = held.tensor
    if _moved(tensor, held.alias):
        yield held.place
    if tensor.grad_fn is not held.grad_fn:
        yield (held.place, Aspect.HISTORY)
    if tensor.requires_grad != held.requires_grad:
        yield (held.place, Aspect.REQUIRES_GRAD)
    if tensor.is_leaf and tensor.grad is not held.grad:
        yield (held.place, Aspect.GRADIENT)


def _moved(tensor: torch.Tensor, alias: torch.Tensor) -> bool:
    """Whether `tensor.data = ...`, `set_` or `resize_`, or an addition to a sparse one, gave it other bytes or a shape."""
    if tensor.dtype != alias.dtype or tensor.shape != alias.shape or tensor.layout != alias.layout:
        return True
    if has_storage(tensor):
        return tensor.stride() != alias.stride() or _bytes_of(tensor) != _bytes_of(alias)
    return tensor.layout is torch.sparse_coo and (
        tensor.is_coalesced() != alias.is_coalesced()
        or any(_moved(one, other) for (_, one), (_, other) in zip(parts(tensor), parts(alias), strict=True))
    )


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Which storage a tensor uses, from where on."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _copy(entries: Iterable[_Entry]) -> list[_Copies]:
    """Copies storages to the host, the small ones of a device together."""
    groups: dict[Any, list[_Entry]] = {}
    for entry in entries:
        storage = entry[0]
        key = storage.device if storage.nbytes() <= _SMALL_BYTES else storage._cdata
        groups.setdefault(key, []).append(entry)
    return [
        _Copies(group, [storage.nbytes() for storage, _ in group], _host_copy([storage for storage, _ in group]))
        for group in groups.values()
    ]


def _host_copy(storages: list[torch.UntypedStorage]) -> torch.UntypedStorage:
    """A copy of the storages' bytes, one after the other."""
    together, device = storages[0], storages[0].device
    if len(storages) > 1:
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        together = torch.cat([empty.detach().set_(storage) for storage in storages]).untyped_storage()
        if device.type == "cpu":
            return together
    return torch.UntypedStorage(together.nbytes()).copy_(together, False)  # type: ignore[no-untyped-call]


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


def _equal_tensor(tensor: torch.Tensor, one: torch.UntypedStorage, other: torch.UntypedStorage) -> bool:
    """Whether the elements of a tensor are the same bytes in two copies of its storage on the host."""
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    dtype = _WORDS[tensor.element_size()]
    views = [torch.empty(0, dtype=dtype, device="cpu").set_(storage, *place) for storage in (one, other)]
    return torch.equal(*(view.reshape(-1).view(torch.uint8) for view in views))


def _read_cell(cell: Any) -> Any:
    return cell.copy() if isinstance(cell, np.ndarray) else read_generator(cell)


def _put_cell(cell: Any, state: Any) -> None:
    if same_state(_read_cell(cell), state):
        return
    if isinstance(cell, np.ndarray):
        cell[...] = state
    else:
        write_generator(cell, state)


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
