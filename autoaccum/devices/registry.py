"""Find the device class for a `torch.device`."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

import torch

from ..errors import UsageError
from .base import Device
from .virtual import control

ROOMS = {"cpu": "cpu", "cuda": "cuda"}  # torch.device.type -> the folder here whose device.py has `open_device`


@lru_cache(maxsize=64)
def get_device(torch_device: torch.device) -> Device:
    """Return the device object for a `torch.device`; the same one each time.

    A CUDA device of a process on the virtual GPU is a virtual one.

    Raises:
        UsageError: There is no support for that type of device.
    """
    room = ROOMS.get(torch_device.type)
    if room is None:
        raise UsageError(
            f"{torch_device.type} is not supported.",
            "Plans can be made for the CPU and for CUDA.",
            f"Move the model: model.to({' or '.join(map(repr, ROOMS))})",
        )
    if room == "cuda" and control.is_virtual():
        room = "virtual"
    device = import_module(f".{room}.device", __package__).open_device(torch_device)
    assert isinstance(device, Device)
    return device
