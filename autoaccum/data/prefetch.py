"""Copy micro-batches to the device, from pinned memory ahead of time.

On CUDA, with a loader that pins memory, a micro-batch is copied on a separate stream while the one before it is still
computed. Two micro-batches' samples are then on the device simultaneously, in that stream's pools; the recorded window
does the same, so they are part of the plan. Without pinned memory nothing would overlap, and the memory is better spent
on a larger micro-batch. With `Tensor.record_stream` the GPU's speed would decide when memory can be used again, which
no replay could follow; so the samples are held here until the next ones are copied, and a block is written to again
only after the computation that read it.

Token ids, labels and masks are held too, as a loop written by hand holds its last micro-batch through
`optimizer.step()`. Freed earlier, their place in the small pool goes to the optimizer's first state, and later
micro-batches need a segment more than the loop does. Floating-point samples (images) are freed as soon as autograd
allows. The choice depends on types, not on sizes, so that recordings at every size have the same course.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..workload import Batch
from . import tree

_IDS = (torch.int64, torch.int32, torch.bool)


class Copies:
    """Copy micro-batches to one device.

    Args:
        device: The device.
        ahead: Whether to copy while the micro-batch before is still computed; else the computing stream copies.
    """

    def __init__(self, device: torch.device, *, ahead: bool) -> None:
        self._device = device
        self.ahead = ahead and device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None  # one for all windows: each has separate pools
        self._held: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        self._in_window = False
        self._read: torch.cuda.Event | None = None  # after it, released copies are no longer read

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        """Hold micro-batches of ids until the next, or the window's end."""
        self._in_window = True
        try:
            yield
        finally:
            self._in_window = False
            self.release()

    def bring(self, piece: Batch) -> Batch:
        """Copy a micro-batch to the device; release the one before.

        The current stream can use it.

        The host doesn't wait for copies of pinned memory, which overlap with what the device still computes.
        """
        if not self.ahead or not any(_is_on_host(leaf) for _, leaf in tree.leaves(piece)):
            batch = tree.to_device(piece, self._device)
            self._ids = _copied_ids(piece, batch) if self._in_window and self._device.type == "cuda" else []
            return batch
        computing = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._read is not None:
            self._stream.wait_event(self._read)
        with torch.cuda.stream(self._stream):
            batch = tree.to_device(piece, self._device)
        computing.wait_stream(self._stream)
        self._held = _copied(piece, batch)
        self._read = computing.record_event()
        return batch

    def release_copied_ahead(self) -> None:
        """Release the copy of pinned memory after the last backward."""
        if self._held:
            self._held = []
            self._read = torch.cuda.current_stream(self._device).record_event()

    def release(self) -> None:
        """Release every copy that is held."""
        self._ids = []
        self.release_copied_ahead()


def _copied(piece: Batch, batch: Batch) -> list[torch.Tensor]:
    """Return the tensors of a batch that were copied from the host."""
    arrived = zip(tree.leaves(piece), tree.leaves(batch), strict=True)
    return [there for (_, here), (_, there) in arrived if _is_on_host(here)]


def _copied_ids(piece: Batch, batch: Batch) -> list[torch.Tensor]:
    """Return the copied tensors where all are ids, labels or masks.

    Else nothing is returned.
    """
    found = _copied(piece, batch)
    return found if all(tensor.dtype in _IDS for tensor in found) else []


def _is_on_host(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
