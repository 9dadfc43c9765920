"""Keep what lanes save for the backward on the host.

Saved tensors above a threshold go to buffers on the host as they are saved, and come back in the backward. So a GPU
holds one lane's stretch between two meetings, and of the others only what crosses a meeting.

Lanes go back in the reverse order of their forward (backward_order.py), so what the operation before saved is needed
next: it is brought back meanwhile. One tensor ahead, whatever the time that takes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import UsageError
from ...torch_compat import storage_id, write_count
from .host_buffers import HostBuffers
from .torch_internals import next_sequence_number
from .transfers import Arriving, Kept, Transfers

THRESHOLD_BYTES = 1 << 20  # what is smaller stays on the device
MOST_PASSES = 4  # other tensors that may be needed before the one that was brought back ahead


class HostStore:
    """Hold one window's saved tensors on the host.

    Args:
        device: The device that they come from.
        limit_bytes: What the buffers may use; None for all but a tenth of what is available at the first window.
        copies: Whether anything is copied; where a device computes nothing, its tensors have no values.

    Attributes:
        buffers: Where they wait.
        saved_bytes: What the last window moved to the host.
        returned_bytes: What it brought back, a tensor that two operations saved twice.
        late: How many tensors it began to bring back when they were needed, not before.
        moved: The bytes of each tensor that the last window moved to the host, in order.
        part: In which part the lane is that runs: how many meetings it had.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None, *, copies: bool = True) -> None:
        self.buffers = HostBuffers(limit_bytes, pinned=copies and device.type == "cuda")
        self.saved_bytes = self.returned_bytes = self.late = 0
        self.moved: list[int] = []
        self.part = 0
        self._device = device
        self._transfers = Transfers(device, copies=copies)
        self._stay: set[int] = set()
        self._casts: set[tuple[torch.Size, torch.dtype]] = set()
        self._bytes_per_sample: int | None = None
        self._parts: int | None = None
        self._gathered: set[int] = set()
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, Kept]] = {}
        self._saves: list[Kept | None] = []  # in order; None once it is back
        self._firsts: list[int] = []  # for each save, the index of its node's first one
        self._node: tuple[int, int] | None = None  # that saved last
        self._first = 0
        self._last: Arriving | None = None
        self._ahead: Arriving | None = None
        self._passes = 0

    @property
    def bytes(self) -> int:
        """Return what the buffers use."""
        return self.buffers.bytes

    def begin(
        self,
        stay: Sequence[torch.Tensor],
        bytes_per_sample: int | None = None,
        cast: torch.dtype | None = None,
        parts: int | None = None,
    ) -> None:
        """Begin a window, in empty buffers.

        Args:
            stay: Tensors that are on the device anyway: parameters and buffers.
            bytes_per_sample: What moves: tensors of at least so many bytes for each sample of their lane; None for
                those of 1 MiB and more.
            cast: The type that autocast casts parameters to. Such a copy belongs to all lanes, and stays.
            parts: Of how many parts of each lane, the first ones; None for all. What is saved last is needed first.
        """
        self.end()
        self._stay = {storage_id(tensor.untyped_storage()) for tensor in stay}
        shapes = {tensor.shape for tensor in stay if tensor.dtype != cast} if cast is not None else set()
        self._casts = {(each, cast) for shape in shapes for each in (shape, shape[::-1]) if cast is not None}
        self._bytes_per_sample, self._parts, self.part, self._gathered = bytes_per_sample, parts, 0, set()
        self.moved = []
        self.saved_bytes = self.returned_bytes = self.late = 0
        self.buffers.empty()

    def end(self) -> None:
        """Forget the window's tensors; keep the buffers."""
        self._transfers.settle()
        self._release_ahead()
        self._known.clear()
        self._saves.clear()
        self._firsts.clear()
        self._node = None
        self._last = None

    def move_gathered(self, rows: set[int]) -> None:
        """Move what has the rows of all lanes, too, whatever its size.

        In short windows it is small and in long ones large, and both are to move alike.

        Args:
            rows: How many rows gathered tensors have; more may be added meanwhile.
        """
        self._gathered = rows

    def moving(self, samples: int) -> AbstractContextManager[Any]:
        """Move what is saved in this thread meanwhile.

        Args:
            samples: Those of its lane. What moves then depends on none of the window's other sizes.
        """
        per_sample = self._bytes_per_sample
        least_bytes = THRESHOLD_BYTES if per_sample is None else per_sample * samples
        return saved_tensors_hooks(partial(self._pack, least_bytes), self._unpack)

    def _pack(self, least_bytes: int, tensor: torch.Tensor) -> torch.Tensor | Kept:
        if not self._moves(tensor, least_bytes):
            return tensor.detach()  # itself would hold its own node, and a window that fails would never be freed
        storage = tensor.untyped_storage()
        key = (
            storage_id(storage), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype,
            write_count(tensor),
        )  # fmt: skip
        known = self._known.get(key)
        kept = None if known is None or known[0].expired() else known[1]  # type: ignore[no-untyped-call]
        if kept is None:
            kept = Kept(self.buffers.place(tensor.nbytes), tensor.shape, tensor.stride(), tensor.dtype)
            self._transfers.send(tensor, kept)
            self.saved_bytes += tensor.nbytes
            self.moved.append(tensor.nbytes)
            self._known[key] = StorageWeakRef(storage), kept  # type: ignore[no-untyped-call]
        self._note_save(kept)
        return kept

    def _note_save(self, kept: Kept) -> None:
        node = threading.get_ident(), next_sequence_number()  # equal for all that one node saves
        if node != self._node:
            self._node, self._first = node, len(self._saves)
        kept.saves.append(len(self._saves))
        self._saves.append(kept)
        self._firsts.append(self._first)

    def _moves(self, tensor: torch.Tensor, least_bytes: int) -> bool:
        is_gathered = tensor.dim() > 1 and tensor.shape[0] in self._gathered
        if tensor.device.type != self._device.type or (tensor.nbytes < least_bytes and not is_gathered):
            return False
        if self._parts is not None and self.part >= self._parts:
            return False
        if (tensor.shape, tensor.dtype) in self._casts:
            return False
        if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
        return storage_id(tensor.untyped_storage()) not in self._stay and _is_dense(tensor)

    def _unpack(self, kept: torch.Tensor | Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self._transfers.settle()
        if kept.overwritten:
            raise _overwritten(kept)
        last, self._last = self._last, None
        arriving = last if last is not None and last.kept is kept else self._taken(kept)
        del last
        if kept.saves:  # else an operation asks for it a second time
            at = kept.saves.pop()
            self._saves[at] = None
            self._fetch_ahead(at, kept)
        if kept.saves:
            self._last = arriving  # the next operation often saved the same
        return self._transfers.receive(arriving)

    def _taken(self, kept: Kept) -> Arriving:
        """Return a tensor that was brought back ahead, or begin to."""
        ahead = self._ahead
        if ahead is not None and ahead.kept is kept:
            self._ahead = None
            return ahead
        self._passes += 1
        self.late += 1
        return self._fetch(kept)

    def _fetch(self, kept: Kept) -> Arriving:
        arriving = self._transfers.fetch(kept)
        self.returned_bytes += arriving.tensor.nbytes
        return arriving

    def _fetch_ahead(self, at: int, now: Kept) -> None:
        """Begin to bring back what was saved before, if nothing is."""
        if self._ahead is not None and self._passes >= MOST_PASSES:
            self._release_ahead()
        if self._ahead is not None:
            return
        expected = (self._saves[index] for index in self._expected_after(at))
        following = next((kept for kept in expected if kept is not None and kept is not now), None)
        if following is not None:
            self._ahead, self._passes = self._fetch(following), 0

    def _expected_after(self, at: int) -> Iterator[int]:
        """Yield indices of saves as the backward needs them.

        Nodes in reverse order, and what one node saved in its own.
        """
        first, end = self._firsts[at], at + 1
        while end < len(self._firsts) and self._firsts[end] == first:
            end += 1
        yield from range(at + 1, end)
        while first > 0:
            end, first = first, self._firsts[first - 1]
            yield from range(first, end)

    def _release_ahead(self) -> None:
        """Give back what was brought back ahead and isn't needed."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._transfers.receive(ahead)


def _overwritten(kept: Kept) -> UsageError:
    return UsageError(
        f"A tensor of shape {tuple(kept.shape)} that the backward needs was written to after it was saved.",
        "An in-place operation (relu_, add_, x[...] = ...) changed it before its gradient was computed.",
        "Use the operation that makes a new tensor.",
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements fill a range of its storage."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
