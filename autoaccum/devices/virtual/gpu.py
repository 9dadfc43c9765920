"""Describe a virtual GPU, as a value and as settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import UsageError
from ...units import parse_bytes, show_bytes

PREFIX = "AUTOACCUM_GPU_"
TRANSPOSED = "transposed"
MOST_DEVICES = 8  # source/gpu.h
Copies = Literal["tensors", "all", "zero"]
Addresses = Literal["up", "down"]


@dataclass(frozen=True)
class VirtualGpu:
    """A GPU that computes nothing and counts memory.

    Attributes:
        memory_bytes: Of each device.
        context_bytes: Taken from a device by this process's context, once it uses the device.
        other_bytes: Taken by another process (pid 1 in NVML) from the start.
        devices: How many there are.
        compute_capability: Like "8.0"; PyTorch chooses kernels and workspaces by it.
        multiprocessors: How many; PyTorch sizes some scratch memory by it.
        name: The devices' name.
        convolution_workspace: What each convolution asks for: a size ("64MiB"), a multiple of its tensors' bytes
            ("0.5x"), "transposed" for copies of its tensors with channels last where cuDNN makes them, or None for
            nothing.
        convolution_fallback: Whether a convolution can also do without its workspace.
        trial_workspace_bytes: Workspace that `cudnn.benchmark` tries for each new convolution, and does not choose.
        kernel_bytes: Added to the context when a kernel is first launched.
        lag_launches: Work on a stream is complete when so many more kernels were launched, or when it is waited for.
        copies: "tensors": copies are real, but reads of up to 16 bytes (losses, counts) give 0; "all": those too are
            real; "zero": nothing is copied, and every read gives 0.
        addresses: "up": later memory lies above earlier memory; "down": below, as on a GPU under Linux. It
            counts for torch 2.6's allocator and not for 2.14's.

    Raises:
        UsageError: There is no such GPU.
    """

    memory_bytes: int = 16 * 2**30
    context_bytes: int = 512 * 2**20
    other_bytes: int = 0
    devices: int = 1
    compute_capability: str = "8.0"
    multiprocessors: int = 108
    name: str = "Virtual GPU"
    convolution_workspace: str | None = None
    convolution_fallback: bool = True
    trial_workspace_bytes: int = 0
    kernel_bytes: int = 0
    lag_launches: int = 0
    copies: Copies = "tensors"
    addresses: Addresses = "up"

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0 or self.context_bytes < 0 or self.other_bytes < 0:
            raise _refused("memory", f"{self.memory_bytes} bytes", "Sizes are not negative, and memory is more than 0.")
        if self.context_bytes + self.other_bytes >= self.memory_bytes:
            taken = show_bytes(self.context_bytes + self.other_bytes)
            why = f"Its context and the other process take {taken} of it."
            raise _refused("memory", show_bytes(self.memory_bytes), why)
        for what in ("trial_workspace_bytes", "kernel_bytes", "lag_launches"):
            if not 0 <= getattr(self, what) < 2**32:
                raise _refused(what.replace("_", " "), getattr(self, what), "It is 0 to 4294967295.")
        if not 1 <= self.devices <= MOST_DEVICES:
            raise _refused("number of devices", self.devices, f"It is 1 to {MOST_DEVICES}.")
        if not re.fullmatch(r"\d{1,2}\.\d", self.compute_capability):
            raise _refused("compute capability", self.compute_capability, "It looks like 8.0.")
        if not 1 <= self.multiprocessors <= 2**16:
            raise _refused("number of multiprocessors", self.multiprocessors, "It is 1 to 65536.")
        if not 1 <= len(self.name.encode()) < 256 or "\0" in self.name:
            raise _refused("name", repr(self.name), "It is 1 to 255 bytes.")
        if self.copies not in get_args(Copies):
            raise _refused("mode of copying", self.copies, f"It is one of: {', '.join(get_args(Copies))}.")
        if self.addresses not in get_args(Addresses):
            raise _refused("direction of addresses", self.addresses, "It is up or down.")
        _workspace(self.convolution_workspace)

    def settings(self) -> dict[str, str]:
        """Return the environment variables that the library reads.

        All of them, so that none is left from elsewhere.
        """
        values = {
            "MEMORY": self.memory_bytes,
            "CONTEXT": self.context_bytes,
            "OTHER": self.other_bytes,
            "DEVICES": self.devices,
            "COMPUTE_CAPABILITY": self.compute_capability,
            "MULTIPROCESSORS": self.multiprocessors,
            "NAME": self.name,
            "CONVOLUTION_WORKSPACE": _workspace(self.convolution_workspace),
            "CONVOLUTION_FALLBACK": int(self.convolution_fallback),
            "TRIAL_WORKSPACE": self.trial_workspace_bytes,
            "KERNEL": self.kernel_bytes,
            "LAG": self.lag_launches,
            "COPIES": self.copies,
            "ADDRESSES": self.addresses,
        }
        return {PREFIX + key: str(value) for key, value in values.items()}


def _refused(what: str, value: object, why: str) -> UsageError:
    return UsageError(f"A virtual GPU can't have a {what} of {value}.", why, "Give another value.")


def _workspace(text: str | None) -> str:
    """Return a workspace as the library reads it.

    A number of bytes, a factor like 0.5x, or "transposed".
    """
    if text is None:
        return "0"
    if text == TRANSPOSED:
        return text
    if re.fullmatch(r"\d{1,6}(\.\d{1,6})?x", text):
        return text
    if re.fullmatch(r"0+", text):
        return "0"
    return str(parse_bytes(text, what="a convolution's workspace (a size, a multiple like 0.5x, or transposed)"))
