"""Make virtual GPUs that stand in for real ones. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..cuda.gpu_specs import Gpu, find_gpu
from .gpu import VirtualGpu
from .launch import environment

ANY_AMOUNT_BYTES = 1 << 41  # more than any one GPU has


def virtual_settings(gpu: Gpu, *, devices: int = 1) -> VirtualGpu:
    """Return the virtual GPU that stands in for a real one.

    Alone on its machine, with libraries loaded from the start.

    Convolutions have the workspace that real ones showed, and addresses go down (docs/ground-truth.md).
    """
    return VirtualGpu(
        memory_bytes=gpu.total_bytes,
        context_bytes=gpu.context_bytes + gpu.library_bytes,
        devices=devices,
        compute_capability=gpu.capability,
        multiprocessors=gpu.multiprocessors,
        name=gpu.device_name,
        convolution_workspace="transposed",
        addresses="down",
    )


def planning_environment(name: str | None, base: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """Return the environment of a virtual GPU to plan on.

    It stands in for a named real one, with any amount of memory and no copies.

    Args:
        name: As in `--gpu`; None for no virtual GPU.
        base: The environment to start from; left out: this process's.

    Returns:
        None where no GPU is named and none was given.
    """
    if name is None:
        return None if base is None else dict(base)
    gpu = replace(virtual_settings(find_gpu(name)), memory_bytes=ANY_AMOUNT_BYTES, copies="zero")
    variables = environment(gpu, base)
    variables.pop("CUDA_VISIBLE_DEVICES", None)  # it names this machine's GPUs, or hides them
    return variables
