"""Run an unmodified CUDA build of PyTorch on a virtual GPU.

    gpu = VirtualGpu(memory_bytes=4 * 2**30)
    launch([sys.executable, "train.py"], gpu).wait()

or `autoaccum virtual-gpu --memory 4GiB -- python train.py`. What is real and what is faked:
docs/virtual-gpu.md. A process on it reaches its controls through `autoaccum.devices.virtual.control`.
"""

from __future__ import annotations

from .build import reason_against
from .gpu import VirtualGpu
from .launch import environment, launch
from .stand_in import planning_environment

__all__ = ["VirtualGpu", "available", "environment", "launch", "planning_environment"]


def available() -> str | None:
    """Return None where a virtual GPU is available, else why not.

    In words, for `pytest.mark.skipif`. Nothing is compiled.
    """
    return reason_against()
