"""Note how a lane's tensors were made, to make them again.

A dispatch mode sees each operation below autograd and autocast: what really ran. Of cheap ones (cheap_operations.py) it
notes operation and arguments; no tensor is held by that. What a storage holds between two writes is a *value*: an
operation in place makes a new one from the old. Views are places in a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import UsageError
from ...torch_compat import TorchDispatchMode, storage_id, write_count
from .cheap_operations import Operation, can_repeat, operation_of
from .transfers import Kept


class Layout(NamedTuple):
    """Where a tensor lies in its storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """Return a tensor's."""
        return cls(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that waits for the backward on the device.

    Attributes:
        tensor: The tensor, without its node: that would hold it, and a window that fails would never be freed.
        writes: How often it had been written to.
    """

    tensor: torch.Tensor
    writes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Held:
        """Return a tensor as it is."""
        return cls(tensor.detach(), write_count(tensor))

    def unchanged(self) -> torch.Tensor:
        """Return it.

        Raises:
            UsageError: It was written to.
        """
        if write_count(self.tensor) != self.writes:
            raise overwritten(self.tensor.shape)
        return self.tensor


def overwritten(shape: Sequence[int]) -> UsageError:
    """Return the error for a tensor that was written to."""
    return UsageError(
        f"A tensor of shape {tuple(shape)} that the backward needs was written to after it was saved.",
        "An in-place operation (relu_, add_, x[...] = ...) or an optimizer's step in a hook changed it before its "
        "gradient was computed.",
        "Use the operation that makes a new tensor.",
    )


@dataclass(eq=False)
class Value:
    """What a storage holds from one write to the next.

    Attributes:
        storage: The storage, which isn't held.
        stretch: Where it was made: the lane, and how many meetings that had had.
        step: What made it; None where that isn't cheap, or isn't known.
        output: Which of the operation's results it is.
        layout: The tensor that was made, which fills the storage.
        is_current: Whether nothing was written over it.
        joins: How many concatenations it was part of.
        kept: What of it waits for the backward, by its place: on the host, or on the device.
        pending: How many saved tensors are to be made from it.
        found: It, made again, while more are pending.
    """

    storage: StorageWeakRef
    stretch: tuple[int, int]
    step: Step | None = None
    output: int = 0
    layout: Layout | None = None
    is_current: bool = True
    joins: int = 0
    kept: dict[Layout, Kept | Held] = field(default_factory=dict)
    pending: int = 0
    found: torch.Tensor | None = None


class View(NamedTuple):
    """A tensor among an operation's arguments.

    Attributes:
        value: What its storage held.
        layout: Its place there.
        writes: How often it had been written to.
    """

    value: Value
    layout: Layout
    writes: int


@dataclass(frozen=True, eq=False)
class Step:
    """A cheap operation that ran, to run again.

    Attributes:
        repeat: Computes its results.
        write_over: Writes them over the first argument; None where nothing does.
        args: Its arguments; a `View` in place of each tensor.
        kwargs: Those by name.
        views: All of its `View`s.
    """

    repeat: Callable[..., Any]
    write_over: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    views: tuple[View, ...]


class Values:
    """What the storages of a window's lanes hold now.

    Args:
        before_write: Called with a value before it is written over.

    Attributes:
        stretch: The lane that runs, and how many meetings it had.
        paused: Whether what runs is none of the lanes' doing.
    """

    def __init__(self, before_write: Callable[[Value], None]) -> None:
        self.stretch = 0, 0
        self.paused = False
        self._before_write = before_write
        self._now: dict[int, Value] = {}

    def clear(self) -> None:
        """Forget what storages hold.

        What is to be computed again knows its own values.
        """
        self._now.clear()

    def of(self, tensor: torch.Tensor) -> Value | None:
        """Return the value that a tensor lies in, where it is known."""
        return self._now.get(storage_id(tensor.untyped_storage()))

    def note_kept(self, tensor: torch.Tensor, kept: Kept | Held) -> None:
        """Note that a tensor waits for the backward."""
        self._value_of(tensor).kept[Layout.of(tensor)] = kept

    def run(self, operation: Operation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that is cheap or writes, and note it."""
        step = self._step(operation, args, kwargs) if can_repeat(operation, args) else None
        for at in operation.written:
            if at < len(args):
                self._write(args[at])
        for name in operation.written_names:
            self._write(kwargs.get(name))
        out = func(*args, **kwargs)
        if step is not None:
            inputs = {id(view.value) for view in step.views if view.value.is_current}
            for at, each in enumerate(out if isinstance(out, (tuple, list)) else (out,)):
                if _is_plain(each) and _fills_storage(each):
                    self._made(each, step, at, inputs)
        return out

    def _made(self, tensor: torch.Tensor, step: Step, at: int, inputs: set[int]) -> None:
        known = self.of(tensor)
        if known is None or id(known) not in inputs:  # else it is an argument, as it was
            self._now[storage_id(tensor.untyped_storage())] = Value(
                _weak(tensor.untyped_storage()), self.stretch, step, at, Layout.of(tensor)
            )

    def _write(self, written: Any) -> None:
        for each in written if isinstance(written, (list, tuple)) else (written,):
            if isinstance(each, torch.Tensor) and each.layout is torch.strided:
                value = self._now.pop(storage_id(each.untyped_storage()), None)
                if value is not None:
                    self._before_write(value)
                    value.is_current = False

    def _step(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
        """Return a call with views in place of tensors.

        None for tensors of other kinds.
        """
        views: list[View] = []
        found = tuple(self._argument(each, views) for each in args)
        named = {name: self._argument(each, views) for name, each in kwargs.items()}
        if any(each is None for each in views) or (operation.in_place and not _fills_storage(args[0])):
            return None
        step = Step(operation.repeat, operation.write_over, found, named, tuple(views))
        if operation.repeat is torch.ops.aten.cat.default:
            for view in views:
                view.value.joins += 1
        return step

    def _argument(self, argument: Any, views: list[Any]) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._argument(each, views) for each in argument]
        if not isinstance(argument, torch.Tensor):
            return argument
        if not _is_plain(argument):
            views.append(None)
            return None
        view = View(self._value_of(argument), Layout.of(argument), write_count(argument))
        views.append(view)
        return view

    def _value_of(self, tensor: torch.Tensor) -> Value:
        storage = tensor.untyped_storage()
        value = self._now.get(storage_id(storage))
        if value is None:
            value = self._now[storage_id(storage)] = Value(_weak(storage), self.stretch)
        return value


class RecipeMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note what a lane computes.

    Args:
        values: Where it is noted.
    """

    def __init__(self, values: Values) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = values

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; note it where it is cheap or writes."""
        operation = operation_of(func)
        if operation is None or self._values.paused:
            return func(*args, **(kwargs or {}))
        return self._values.run(operation, func, tuple(args), kwargs or {})


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _fills_storage(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements are all that its storage has."""
    return (
        int(tensor.storage_offset()) == 0
        and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
        and is_dense(tensor.shape, tensor.stride())
    )


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether a tensor's elements fill a range of its storage."""
    expected = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True
