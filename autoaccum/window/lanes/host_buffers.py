"""Hold buffers on the host, used again in each window.

Places are handed out one after the other, so a window that saves the same tensors finds the same places. The buffers
are of a power of two bytes, since torch's allocator of pinned memory rounds up to that.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...errors import OutOfMemory
from ...process_memory import available_bytes
from ...units import show_bytes

BUFFER_BYTES = 1 << 28  # of a buffer, at least
ALIGNMENT_BYTES = 512
FREE_FRACTION = 0.1  # of the host's available memory that is left alone where no limit was named


class HostBuffers:
    """Hand out places in buffers on the host.

    Args:
        limit_bytes: What the buffers may use; None for all but a tenth of what is available at the first buffer.
        pinned: Whether a GPU copies to them.

    Attributes:
        bytes: What the buffers use.
    """

    def __init__(self, limit_bytes: int | None, *, pinned: bool) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._pinned = pinned
        self._buffers: list[torch.Tensor] = []
        self._at = self._used = 0

    def empty(self) -> None:
        """Hand out all places anew."""
        self._at = self._used = 0

    def place(self, size_bytes: int) -> torch.Tensor:
        """Return the next bytes of a buffer, or of a new one.

        Raises:
            OutOfMemory: The buffers would use more than they may.
        """
        while self._at < len(self._buffers):
            buffer = self._buffers[self._at]
            if self._used + size_bytes <= len(buffer):
                found = buffer[self._used : self._used + size_bytes]
                self._used += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                return found
            self._at, self._used = self._at + 1, 0
        self._buffers.append(self._new_buffer(_buffer_size(size_bytes)))
        return self.place(size_bytes)

    def _new_buffer(self, size_bytes: int) -> torch.Tensor:
        self.limit_bytes = limit = host_limit(self.limit_bytes)
        if limit is not None and self.bytes + size_bytes > limit:
            raise OutOfMemory(
                f"What a window in lanes saves for its backward needs more than {show_bytes(limit)} on the host: "
                f"{show_bytes(self.bytes)} are in use, and {show_bytes(size_bytes)} more are needed.",
                "Saved tensors wait on the host; smaller micro-batches don't change their sum.",
                "Give it more (host_memory=, --host-memory), lower the target, checkpoint the model's blocks, or use "
                "batchnorm='frozen', which is exact, too, and saves nothing there.",
            )
        buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        self.bytes += size_bytes
        return buffer


def host_limit(named_bytes: int | None) -> int | None:
    """Return the buffers' limit; by default 90 % of what is available."""
    return named_bytes if named_bytes is not None else int((1 - FREE_FRACTION) * (available_bytes() or 0)) or None


def buffer_bytes(moved: Iterable[int]) -> int:
    """Return what buffers use for tensors of these sizes, in order."""
    total = left = 0
    for size in moved:
        if size > left:
            left = _buffer_size(size)
            total += left
        left -= -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return total


def _buffer_size(size_bytes: int) -> int:
    """Return the bytes of a new buffer for a tensor."""
    return max(BUFFER_BYTES, 1 << (size_bytes - 1).bit_length())
