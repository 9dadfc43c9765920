"""Snapshot, restore and compare everything that a training step changes.

A snapshot is three things: a shallow copy of every container that state/traversal.py finds (so that the *same objects*
go back to their places, and what was added goes), the bytes of every storage that a tensor uses, copied once to the
host however many tensors share it, and the state of every random number generator. Putting it back writes into the same
containers and the same storages, so that whoever holds a reference (an optimizer, a captured graph) sees nothing move.
`load_state_dict` is no use here: it casts.

What a loss and the other functions hold (state/closures.py) is part of it. In full it is copied as far as half of the
host's free memory goes, smallest first; of what is larger only the count of in-place writes is kept, and a change is an
error by name.

Doesn't know what a step is. An attribute that is an arbitrary object is compared, and put back, by identity; what
happened inside it is neither seen nor undone, nor is what hooks do outside the model. A freed graph stays freed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import RestoreError, UsageError
from ..process_memory import available_bytes as _available_bytes
from ..torch_compat import storage_id, write_count
from ..units import show_bytes
from . import traversal
from .closures import Holdings, Slot
from .place_names import name_of
from .rng import put_rng, read_generator, same_state, take_rng, write_generator
from .traversal import Aspect, Held, HeldName, Place, Walk

_CHECKED_BYTES = 1 << 20  # below this, reading /proc/meminfo (30 us) costs more than it tells
_SMALL_BYTES = 1 << 14  # storages up to this are copied together: a copy each takes 4 us, and on a GPU a wait each
_SHOWN = 8  # names in a message
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

_Entry = tuple[torch.UntypedStorage, Place]
_Copies = tuple[list[_Entry], list[int], torch.UntypedStorage]  # storages, their sizes, their bytes one after the other
_Stored = tuple[torch.UntypedStorage, int, torch.UntypedStorage, Place]  # a storage, its size, its bytes on the host


@dataclass(eq=False, frozen=True)
class Snapshot:
    """A snapshot by `take`, which keeps the tensors it saw alive.

    Those on the device too.

    Attributes:
        host_bytes: Bytes of host memory that the copies take; for training on the CPU, committed by this process.
    """

    host_bytes: int
    _found: Walk
    _copies: list[_Copies]
    _cells: list[tuple[Any, Any, Place]]
    _rng: dict[str, Any]

    def restore(self) -> None:
        """Restore everything; may be called again.

        Raises:
            RestoreError: Something could not be put back. Everything else was.
        """
        failures: list[str] = []

        def attempt(place: Place, put: Callable[..., None], *args: Any) -> None:
            try:
                put(*args)
            except Exception as error:  # whatever it is, the rest must go back first
                name = name_of(place, self._found.tensors)
                failures.append(f"{name} ({type(error).__name__}: {str(error).partition(chr(10))[0]})")

        with torch.no_grad():
            for container, saved, place in self._found.containers:
                if not traversal.identical(container, saved):
                    attempt(place, _put_container, container, saved)
            for held in self._found.tensors.values():
                attempt(held.place, _put_tensor, held)
            for storage, nbytes, host, place in self._stored():
                attempt(place, _put_storage, storage, nbytes, host)
            for cell, state, place in self._cells:
                attempt(place, _put_cell, cell, state)
            for slot, value in self._found.slots:
                attempt((None, HeldName(slot.name)), _put_slot, slot, value)
            for parameter, gradient, place in self._found.gradients:
                attempt(place, _put_gradient, parameter, gradient)
            for name, state in self._rng.items():
                attempt((None, name), put_rng, {name: state})
        failures += [f"{name} (too large to be copied beforehand)" for name in self.unkept() if self._found.full]
        if failures:
            shown = "; ".join(failures[:_SHOWN]) + ("; ..." if len(failures) > _SHOWN else "")
            raise RestoreError(
                f"{len(failures)} of the things that training changed could not be put back: {shown}.",
                "Everything else was put back.",
                "Make the model and its optimizer anew, or load them from a checkpoint, before you train.",
            )

    def differences(self) -> list[str]:
        """Return the names that differ bitwise from the snapshot.

        Names such as `layers.0.weight` or `torch RNG`.
        """
        places = [place for entry in self._found.containers for place in traversal.container_differences(*entry)]
        places += [place for held in self._found.tensors.values() for place in _tensor_differences(held)]
        places += [place for stored in self._stored() for place in self._storage_differences(stored)]
        places += [place for cell, state, place in self._cells if not same_state(_read_cell(cell), state)]
        places += [(None, HeldName(slot.name)) for slot, value in self._found.slots if slot.get() is not value]
        gradients = self._found.gradients
        places += [(place, Aspect.GRADIENT) for parameter, was, place in gradients if parameter.grad is not was]
        now = take_rng()
        places += [(None, name) for name, state in self._rng.items() if not same_state(now[name], state)]
        return list(dict.fromkeys(name_of(place, self._found.tensors) for place in places))

    def unkept(self) -> list[str]:
        """Name changed tensors that were too large for a copy."""
        watched = self._found.watched
        return [name_of(place, {}) for tensor, before, place in watched if write_count(tensor) != before]

    def _stored(self) -> Iterator[_Stored]:
        """Every storage with its own part of the copies."""
        for entries, sizes, host in self._copies:
            for (storage, place), nbytes, end in zip(entries, sizes, accumulate(sizes), strict=True):
                yield storage, nbytes, host[end - nbytes : end], place  # a slice shares the bytes

    def _storage_differences(self, stored: _Stored) -> list[Place]:
        """Return a storage's changed tensors, or its first.

        The first where none covers the changed bytes.
        """
        storage, nbytes, host, place = stored
        if storage.nbytes() != nbytes:
            return [place]
        now = storage if storage.device.type == "cpu" else _host_copy([storage])
        if _equal(now, host):
            return []
        strided = [held for held in self._found.tensors.values() if traversal.has_storage(held.alias)]
        inside = [held for held in strided if storage_id(held.alias.untyped_storage()) == storage_id(storage)]
        return [held.place for held in inside if not _equal(now, host, held.alias)] or [place]


def take(
    *,
    model: nn.Module | None,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    held: Holdings | None = None,
    storages: bool = True,
) -> Snapshot:
    """Take a snapshot of all that a training step changes.

    The light form is for what a forward or a backward changes, and quick enough for every window (0.4 ms for a
    ResNet-18 on the CPU). It covers the random number generators, the scaler, and of the modules who is in them, their
    modes, buffers and plain attributes. It leaves parameters, their gradients, optimizer, scheduler and hooks as they
    are, and in torch's own modules (`torch.nn.modules`) goes no deeper than the attribute itself and a buffer's bytes.
    Of what functions hold it also covers variables, and the gradients of modules' parameters.

    Args:
        model: The module; all modules in it, their parameters, buffers and plain attributes; None for what is held.
        optimizer: Its state, its groups and its other attributes.
        scaler: A gradient scaler.
        scheduler: A learning rate scheduler.
        held: What the workload's functions hold.
        storages: False for the light form.

    Returns:
        The snapshot; nothing was changed by taking it.

    Raises:
        UsageError: The host has less memory available than the copies need, or a parameter has no shape yet.
    """
    found = traversal.walk(storages, held, model=model, optimizer=optimizer, scaler=scaler, scheduler=scheduler)
    _leave_out_large(found)
    host_bytes = found.host_bytes
    _check_host(host_bytes)
    cells = [(cell, _read_cell(cell), place) for cell, place in found.cells]
    return Snapshot(host_bytes, found, _copy(found.storages.values()), cells, take_rng())


def host_bytes_needed(**of: Any) -> int:
    """Return the host bytes that `take` would copy, without copying."""
    found = traversal.walk(of.pop("storages", True), of.pop("held", None), **of)
    _leave_out_large(found)
    return found.host_bytes


@contextlib.contextmanager
def kept(**of: Any) -> Iterator[Snapshot]:
    """Take a snapshot; restore it on every exit, exceptions included.

    A further Ctrl-C while it is being put back waits until that is done, and counts then.

    Args:
        **of: The arguments of `take`.

    Yields:
        The snapshot, which `take` made of the same arguments.

    Raises:
        RestoreError: Something could not be put back. Everything else was.
    """
    snapshot = take(**of)
    try:
        yield snapshot
    finally:
        try:
            _uninterrupted(snapshot.restore)
        except KeyboardInterrupt:  # one that came in the moment before interrupts were held back
            _uninterrupted(snapshot.restore)
            raise


def _uninterrupted(action: Callable[[], None]) -> None:
    """Run the action with SIGINT held back until afterwards.

    Signals reach the main thread only.
    """
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
    """Put the same objects back in order.

    By the methods of the plain class, which a subclass may forbid.
    """
    plain: Any = next(cls for cls in traversal.CONTAINERS if isinstance(container, cls))
    plain.clear(container)
    if isinstance(container, dict):
        for key, value in saved.items():
            plain.__setitem__(container, key, value)
    else:
        (plain.update if plain is set else plain.extend)(container, saved)


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
    """Whether a tensor has another storage or shape.

    By `tensor.data = ...`, `set_`, `resize_`, or `add_` to a sparse one.
    """
    if tensor.dtype != alias.dtype or tensor.shape != alias.shape or tensor.layout != alias.layout:
        return True
    if traversal.has_storage(tensor):
        now, then = ((storage_id(t.untyped_storage()), t.storage_offset(), t.stride()) for t in (tensor, alias))
        return now != then
    if tensor.layout is not torch.sparse_coo:
        return False
    pairs = zip(traversal.parts(tensor), traversal.parts(alias), strict=True)
    return tensor.is_coalesced() != alias.is_coalesced() or any(_moved(now, then) for (_, now), (_, then) in pairs)


def _copy(entries: Iterable[_Entry]) -> list[_Copies]:
    """Copy storages to the host, a device's small ones together."""
    groups: dict[Any, list[_Entry]] = {}
    for entry in entries:
        storage = entry[0]
        key = storage.device if storage.nbytes() <= _SMALL_BYTES else storage_id(storage)
        groups.setdefault(key, []).append(entry)
    return [
        (group, [storage.nbytes() for storage, _ in group], _host_copy([storage for storage, _ in group]))
        for group in groups.values()
    ]


def _host_copy(storages: list[torch.UntypedStorage]) -> torch.UntypedStorage:
    """Return one copy of the storages' bytes, one after the other."""
    first, device = storages[0], storages[0].device
    if len(storages) == 1:
        return torch.UntypedStorage(first.nbytes()).copy_(first, False)  # type: ignore[no-untyped-call]
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    bytes_of = [empty.detach().set_(storage) for storage in storages]
    if device.type == "cpu":
        return torch.cat(bytes_of).untyped_storage()
    joined = torch.empty(sum(storage.nbytes() for storage in storages), dtype=torch.uint8, device=device)
    for part, own in zip(torch.split(joined, [storage.nbytes() for storage in storages]), bytes_of, strict=True):
        part.copy_(own)  # not torch.cat, a kernel: on a virtual GPU only copies are real
    return _host_copy([joined.untyped_storage()])


def _put_storage(storage: torch.UntypedStorage, nbytes: int, host: torch.UntypedStorage) -> None:
    if storage.nbytes() != nbytes:
        storage.resize_(nbytes)
    # A storage that nobody wrote to may be a read-only file, or pages of one that writing would make our own.
    if storage.device.type != "cpu" or not _equal(storage, host):
        storage.copy_(host, False)


def _equal(one: torch.UntypedStorage, other: torch.UntypedStorage, tensor: torch.Tensor | None = None) -> bool:
    """Whether two host storages have equal bytes within a tensor's elements."""
    if tensor is None:
        word = torch.uint8 if one.nbytes() % 8 else torch.int64  # so that nan equals itself; wide ones are faster
        geometry: Any = 0, (one.nbytes() // word.itemsize,), (1,)
    else:
        word, geometry = _WORDS[tensor.element_size()], (tensor.storage_offset(), tensor.shape, tensor.stride())
    views = [torch.empty(0, dtype=word, device="cpu").set_(storage, *geometry) for storage in (one, other)]
    return torch.equal(*(view.reshape(-1).view(torch.int64) if word.is_complex else view for view in views))


def _read_cell(cell: Any) -> Any:
    return cell.copy() if isinstance(cell, np.ndarray) else read_generator(cell)


def _put_cell(cell: Any, state: Any) -> None:
    if not isinstance(cell, np.ndarray):
        write_generator(cell, state)
    elif not same_state(cell, state):  # it may be read-only
        cell[...] = state


def _put_slot(slot: Slot, value: Any) -> None:
    if slot.get() is not value:
        slot.put(value)


def _put_gradient(parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
    if parameter.grad is not gradient:
        parameter.grad = gradient


def _leave_out_large(found: Walk) -> None:
    """Leave out the largest storages held only by functions.

    Until half of the free memory is enough for a copy.
    """
    if not found.full or not found.held:
        return
    available_bytes = _available_bytes()
    if available_bytes is None:
        return
    sizes = {address: found.storages[address][0].nbytes() for address in found.held}
    room_bytes = (available_bytes - found.host_bytes + sum(sizes.values())) // 2
    for address in sorted(sizes, key=sizes.__getitem__):
        room_bytes -= sizes[address]
        if room_bytes < 0:
            del found.storages[address]
            found.watched += [(tensor, write_count(tensor), place) for tensor, place in found.held[address]]


def _check_host(needed_bytes: int) -> None:
    available_bytes = _available_bytes() if needed_bytes > _CHECKED_BYTES else None
    if available_bytes is not None and needed_bytes > available_bytes:
        raise UsageError(
            f"A copy of the model and its optimizer takes {show_bytes(needed_bytes)} of host memory, "
            f"and {show_bytes(available_bytes)} are available (MemAvailable in /proc/meminfo).",
            "Planning trains real steps, and puts every bit back from that copy.",
            "Free host memory, or plan where there is more; before the first optimizer step the copy is smallest.",
        )
