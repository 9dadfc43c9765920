"""Keep what lanes save for the backward on the host.

Saved tensors above a threshold go to pinned buffers as they are saved, and come back when the backward needs them. So a
GPU holds one lane's stretch between two meetings, and of the others only what crosses a meeting. The copies are on the
stream that computes, so that a block is given back and taken again in the same order every time, whatever the copies'
speed.

The buffers are kept for the next window, which fills them in the same order. They are of a power of two bytes, since
torch's allocator of pinned memory rounds up to that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import OutOfMemory
from ...process_memory import available_bytes
from ...torch_compat import storage_id, write_count
from ...units import show_bytes

THRESHOLD_BYTES = 1 << 20  # what is smaller stays on the device
BUFFER_BYTES = 1 << 28  # of a buffer, at least
ALIGNMENT_BYTES = 512
FREE_FRACTION = 0.1  # of the host's available memory that is left alone where no limit was named


@dataclass(eq=False)
class Kept:
    """A tensor on the host.

    Attributes:
        bytes: Its place in a buffer.
        shape: Its shape.
        stride: Its stride, of a dense tensor.
        dtype: Its type.
        uses: How often it was saved, and not yet brought back.
    """

    bytes: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    uses: int = 1


class HostStore:
    """Hold one window's saved tensors on the host.

    Args:
        device: The device that they come from.
        limit_bytes: What the buffers may use; None for all but a tenth of what is available at the first window.
        copies: Whether anything is copied; where a device computes nothing, its tensors have no values.

    Attributes:
        bytes: What the buffers use.
        saved_bytes: What the last window moved to the host.
        returned_bytes: What it brought back, a tensor that two operations saved twice.
        moved: The bytes of each tensor that the last window moved to the host, in order.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None, *, copies: bool = True) -> None:
        self.limit_bytes = limit_bytes
        self._copies = copies
        self.bytes = self.saved_bytes = self.returned_bytes = 0
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self.moved: list[int] = []
        self._at = self._used = 0
        self._stay: set[int] = set()
        self._casts: set[tuple[torch.Size, torch.dtype]] = set()
        self._bytes_per_sample: int | None = None
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, Kept]] = {}
        self._last: tuple[Kept, torch.Tensor] | None = None

    def begin(
        self, stay: Sequence[torch.Tensor], bytes_per_sample: int | None = None, cast: torch.dtype | None = None
    ) -> None:
        """Begin a window, in empty buffers.

        Args:
            stay: Tensors that are on the device anyway: parameters and buffers.
            bytes_per_sample: What moves: tensors of at least so many bytes for each sample of their lane; None for
                those of 1 MiB and more.
            cast: The type that autocast casts parameters to. Such a copy belongs to all lanes, and stays.
        """
        self.end()
        self._stay = {storage_id(tensor.untyped_storage()) for tensor in stay}
        shapes = {tensor.shape for tensor in stay if tensor.dtype != cast} if cast is not None else set()
        self._casts = {(each, cast) for shape in shapes for each in (shape, shape[::-1]) if cast is not None}
        self._bytes_per_sample = bytes_per_sample
        self.moved = []
        self.saved_bytes = self.returned_bytes = self._at = self._used = 0

    def end(self) -> None:
        """Forget the window's tensors; keep the buffers."""
        self._known.clear()
        self._last = None

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
            return tensor
        storage = tensor.untyped_storage()
        key = (
            storage_id(storage), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype,
            write_count(tensor),
        )  # fmt: skip
        known = self._known.get(key)
        if known is not None and not known[0].expired():  # type: ignore[no-untyped-call]
            known[1].uses += 1
            return known[1]
        place = self._place(tensor.nbytes)
        kept = Kept(place, tensor.shape, tensor.stride(), tensor.dtype)
        if self._copies:
            self._view(kept).copy_(tensor.detach(), non_blocking=True)
        self.saved_bytes += tensor.nbytes
        self.moved.append(tensor.nbytes)
        self._known[key] = StorageWeakRef(storage), kept  # type: ignore[no-untyped-call]
        return kept

    def _moves(self, tensor: torch.Tensor, least_bytes: int) -> bool:
        if tensor.device.type != self._device.type or tensor.nbytes < least_bytes:
            return False
        if (tensor.shape, tensor.dtype) in self._casts:
            return False
        if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
        return storage_id(tensor.untyped_storage()) not in self._stay and _is_dense(tensor)

    def _unpack(self, kept: torch.Tensor | Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        if self._last is not None and self._last[0] is kept:
            found = self._last[1]
        else:
            self._last = None
            found = torch.empty_strided(kept.shape, kept.stride, dtype=kept.dtype, device=self._device)
            if self._copies:
                found.copy_(self._view(kept), non_blocking=True)
            self.returned_bytes += found.nbytes
        kept.uses -= 1
        self._last = (kept, found) if kept.uses > 0 else None  # the next operation often saved the same
        return found

    @staticmethod
    def _view(kept: Kept) -> torch.Tensor:
        """Return the host's copy in the tensor's own layout."""
        return kept.bytes.view(kept.dtype).as_strided(kept.shape, kept.stride)

    def _place(self, size: int) -> torch.Tensor:
        """Return the next bytes of a buffer, or of a new one."""
        while self._at < len(self._buffers):
            buffer = self._buffers[self._at]
            if self._used + size <= len(buffer):
                found = buffer[self._used : self._used + size]
                self._used += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                return found
            self._at, self._used = self._at + 1, 0
        self._buffers.append(self._new_buffer(_buffer_size(size)))
        return self._place(size)

    def _new_buffer(self, size: int) -> torch.Tensor:
        self.limit_bytes = limit = host_limit(self.limit_bytes)
        if limit is not None and self.bytes + size > limit:
            raise OutOfMemory(
                f"What a window in lanes saves for its backward needs more than {show_bytes(limit)} on the host: "
                f"{show_bytes(self.bytes)} are in use, and {show_bytes(size)} more are needed.",
                "Saved tensors wait on the host; smaller micro-batches don't change their sum.",
                "Give it more (host_memory=, --host-memory), lower the target, or use batchnorm='frozen', which is "
                "exact, too, and saves nothing there.",
            )
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._copies and self._device.type == "cuda")
        self.bytes += size
        return buffer


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


def _buffer_size(size: int) -> int:
    """Return the bytes of a new buffer for a tensor."""
    return max(BUFFER_BYTES, 1 << (size - 1).bit_length())


def buffer_bytes(moved: Iterable[int]) -> int:
    """Return what buffers use for tensors of these sizes, in order."""
    total = left = 0
    for size in moved:
        if size > left:
            left = _buffer_size(size)
            total += left
        left -= -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return total


def host_limit(named_bytes: int | None) -> int | None:
    """Return the buffers' limit; by default 90 % of what is available."""
    return named_bytes if named_bytes is not None else int((1 - FREE_FRACTION) * (available_bytes() or 0)) or None
