"""Plan on a virtual CUDA device.

The real allocator counts memory, and nothing is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ...budget import Budget
from ..cuda.device import CudaDevice
from ..cuda.gpu_specs import Gpu
from . import control
from .budget import stand_in_budget


class VirtualGpuDevice(CudaDevice):
    """A virtual CUDA device. Recorded and replayed like a real one."""

    computes = False

    @contextlib.contextmanager
    def capacity_limited_to(self, capacity_bytes: int) -> Iterator[None]:
        """Limit the device's capacity while this is entered.

        Another process holds whatever is beyond it.
        """
        before = control.stats()
        room = max(0, capacity_bytes - before.used_bytes)
        control.set_other(0, before.other_bytes + max(0, before.free_bytes - room))
        try:
            yield
        finally:
            control.set_other(0, before.other_bytes)


class StandInDevice(VirtualGpuDevice):
    """A virtual device that stands in for a real GPU.

    It has no limit on memory.

    Args:
        torch_device: The virtual device.
        gpu: The GPU that is planned for.
    """

    def __init__(self, torch_device: torch.device, gpu: Gpu) -> None:
        super().__init__(torch_device)
        self.gpu = gpu

    def total_bytes(self) -> int:
        """Return the memory of the GPU that is planned for."""
        return self.gpu.total_bytes

    def read_budget(self, memory: str | int | None = None, headroom: str | int | None = None) -> Budget:
        """Return the budget on the GPU that is planned for."""
        return stand_in_budget(self.gpu, memory, headroom)


def open_device(torch_device: torch.device) -> VirtualGpuDevice:
    """Return the device object; called by devices/registry.py."""
    return VirtualGpuDevice(torch_device)
