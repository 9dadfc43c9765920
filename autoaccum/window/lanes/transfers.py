"""Copy saved tensors to the host and back beside the computation.

On CUDA the copies are on a stream of their own, so that they overlap with kernels:

    send       begins when the tensor is computed; the tensor is held until the next one is sent, and by then the
               computing stream waits for the copy
    fetch      begins when all that used the memory before is done; the computing stream waits for it before the
               tensor is used

All memory belongs to the computing stream, which waits for a copy before a block that it reads or writes is given back.
So blocks are given back and taken again in the same order every time, whatever the copies' speed. With
`Tensor.record_stream` that order would depend on it, and no plan could say what the window uses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...torch_compat import write_count


@dataclass(eq=False)
class Kept:
    """A tensor on the host.

    Attributes:
        place: Its bytes in a buffer.
        shape: Its shape.
        stride: Its stride, of a dense tensor.
        dtype: Its type.
        saves: Where it was saved and not yet brought back, as indices of the window's saves in order.
        overwritten: Whether it was written to while it was copied.
    """

    place: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    saves: list[int] = field(default_factory=list)
    overwritten: bool = False

    def flat(self) -> torch.Tensor:
        """Return the host's copy as a vector."""
        return self.place.view(self.dtype)


@dataclass(frozen=True, eq=False)
class Leaving:
    """A tensor whose copy to the host has begun.

    Attributes:
        tensor: The tensor.
        kept: Its copy.
        writes: How often it was written to before.
        copied: When it was copied; None where nothing overlaps.
    """

    tensor: torch.Tensor
    kept: Kept
    writes: int
    copied: torch.cuda.Event | None


@dataclass(frozen=True, eq=False)
class Arriving:
    """A tensor whose copy from the host has begun.

    Attributes:
        tensor: The tensor.
        kept: What it is copied from.
        copied: When it was copied; None where nothing overlaps.
    """

    tensor: torch.Tensor
    kept: Kept
    copied: torch.cuda.Event | None


class Transfers:
    """Copy tensors between one device and the host.

    Args:
        device: The device.
        copies: Whether anything is copied; where a device computes nothing, its tensors have no values.
    """

    def __init__(self, device: torch.device, *, copies: bool) -> None:
        self._device, self._copies = device, copies
        self._stream: torch.cuda.Stream | None = None  # one for both directions: what was sent can be fetched
        self._leaving: Leaving | None = None

    def send(self, tensor: torch.Tensor, kept: Kept) -> None:
        """Begin to copy a tensor to the host; release the one before."""
        self.settle()
        copied = self._copy(kept.flat(), _flat(tensor))
        if copied is not None:
            self._leaving = Leaving(tensor.detach(), kept, write_count(tensor), copied)

    def settle(self) -> None:
        """Release the tensor that was sent last."""
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            self._wait(leaving.copied)
            leaving.kept.overwritten = write_count(leaving.tensor) != leaving.writes

    def fetch(self, kept: Kept) -> Arriving:
        """Begin to bring a tensor back."""
        tensor = torch.empty_strided(kept.shape, kept.stride, dtype=kept.dtype, device=self._device)
        return Arriving(tensor, kept, self._copy(_flat(tensor), kept.flat()))

    def receive(self, arriving: Arriving) -> torch.Tensor:
        """Return a tensor that the computing stream can use, or give back."""
        self._wait(arriving.copied)
        return arriving.tensor

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        """Copy after all that computes now; return when that is done."""
        if self._device.type != "cuda":
            if self._copies:
                to.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_event(torch.cuda.current_stream(self._device).record_event())
        if self._copies:
            with torch.cuda.stream(self._stream):
                to.copy_(source, non_blocking=True)
        copied: torch.cuda.Event = self._stream.record_event()
        return copied

    def _wait(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's elements as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
