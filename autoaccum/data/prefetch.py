"""Brings micro-batches to the device; on CUDA, from a loader that pins memory, while the one before is still computed.

Such a copy runs on a stream of its own. Two micro-batches' samples are then on the device at once, for a moment on the
host's clock, in pools of that stream; the recorded window does the same, so they are part of the plan. Without pinned
memory nothing would overlap, and that memory is better spent on a larger micro-batch. `Tensor.record_stream` would
leave it to the GPU's speed when memory can be used again, and no replay could tell; so the samples are held here
instead, until the next ones are asked for, and a block is written to again only after the computing that read it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..workload import Batch
from . import tree


class Copies:
    """Copies of micro-batches on one device.

    Args:
        device: Where they are to be.
        ahead: Whether to copy while the micro-batch before is still computed; else the computing stream copies.
    """

    def __init__(self, device: torch.device, *, ahead: bool) -> None:
        self._device = device
        self.ahead = ahead and device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None  # one for all windows: each has pools of its own
        self._held: list[torch.Tensor] = []
        self._read: torch.cuda.Event | None = None  # after it, nobody reads what was let go so far

    def bring(self, piece: Batch) -> Batch:
        """The micro-batch on the device, to be used by the current stream; lets go of the one before.

        Copies of pinned memory are not waited for by the host, and overlap with what the device still computes.
        """
        if not self.ahead or not any(_is_on_host(leaf) for _, leaf in tree.leaves(piece)):
            return tree.to_device(piece, self._device)
        computing = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._read is not None:
            self._stream.wait_event(self._read)
        with torch.cuda.stream(self._stream):
            batch = tree.to_device(piece, self._device)
        computing.wait_stream(self._stream)
        arrived = zip(tree.leaves(piece), tree.leaves(batch), strict=True)
        self._held = [there for (_, here), (_, there) in arrived if _is_on_host(here)]
        self._read = computing.record_event()
        return batch

    def let_go(self) -> None:
        """Holds no micro-batch any more: the window's last backward has been issued, or it is given up."""
        if self._held:
            self._held = []
            self._read = torch.cuda.current_stream(self._device).record_event()


def _is_on_host(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
