"""Digest a plan's question: the live workload, the request, device and settings.

From the objects that the user's function made, not from its file alone: whatever it read, drew or was given shows in
them. What they don't show is in the stamps of the files that were read (files/stamps.py), and in the process's
surroundings (planning/cache.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..data import tree
from ..data.collated import Collated
from ..data.groups import Grouped
from ..data.sample import with_sample
from ..devices.base import Device
from ..devices.cuda.device import CudaDevice
from ..processes.examples import BUILT_IN
from ..torch_compat import active_modes
from ..workload import Workload
from .live_digest import LiveDigest, Opaque
from .request import PlanRequest
from .resolved_request import dataset_samples

_APART = ("sample", "loader", "lengths", "name")


def question(workload: Workload, request: PlanRequest, device: Device) -> Mapping[str, Any]:
    """Return what a plan depends on, as JSON values by name.

    Args:
        workload: The workload, as its function made it.
        request: The request.
        device: The device that is planned on.

    Raises:
        Opaque: It holds something that can't be looked into, or something watches all operations.
    """
    if modes := active_modes():
        raise Opaque(f"{modes[0]} watches every operation")
    return {
        "workload": digest(workload, computes=device.computes),
        "source": _source(workload.name),
        "request": asdict(request),
        "torch": torch_settings(),
        "device": _device_facts(device),
    }


def digest(workload: Workload, *, computes: bool = True) -> str:
    """Return a workload's digest.

    Args:
        workload: The workload.
        computes: Whether values on the device mean something.
    """
    found = LiveDigest(lambda tensor: not tensor.is_meta and (computes or tensor.device.type == "cpu"))
    for field in fields(workload):
        if field.name not in _APART:
            found.add(field.name, getattr(workload, field.name))
    found.add("lengths", list(workload.lengths or ()))
    _add_loader(found, workload)
    _add_sample(found, with_sample(workload)[0].sample)
    return found.hexdigest()


def torch_settings() -> dict[str, Any]:
    """Return torch's global settings, as text."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    found = {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "precision": torch.get_float32_matmul_precision(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (
            [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
            [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")],
            torch.is_autocast_cache_enabled(),
        ),
        "attention": (
            cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cudnn.version()),
        "mkldnn": (torch.backends.mkldnn.enabled, torch.backends.quantized.engine),
        "build": (torch.__version__, torch.version.cuda, torch.version.hip),
    }  # fmt: skip
    return {name: str(value) for name, value in found.items()}


def _source(name: str | None) -> str | None:
    """Return a workload's name in a plan, and its file."""
    if name is None or name in BUILT_IN:
        return name
    file, colon, function = name.rpartition(":")
    return f"{name} {os.path.realpath(file)}{colon}{function}"


def _device_facts(device: Device) -> list[str]:
    found = [type(device).__name__, str(device.torch_device), device.memory_model]
    if isinstance(device, CudaDevice):
        found += [str(torch.cuda.get_device_properties(device.torch_device)), str(device.total_bytes())]
    return found


def _add_loader(found: LiveDigest, workload: Workload) -> None:
    """Add what planning reads of a loader: its size and collate function.

    The samples that it takes from it are in the sample's digest.
    """
    loader = workload.loader
    found.add("samples of the loader", dataset_samples(workload))
    if isinstance(loader, DataLoader):
        kinds = [type(each) for each in (loader, loader.dataset, loader.sampler, loader.batch_sampler)]
        facts = [loader.batch_size, loader.drop_last, loader.num_workers, loader.pin_memory, loader.persistent_workers]
        found.add("loader", [*kinds, *facts, loader.collate_fn])
    elif isinstance(loader, (list, tuple)):
        found.add("loader", [type(loader), len(loader)])
    else:
        found.add("loader", loader)


def _add_sample(found: LiveDigest, sample: Any) -> None:
    if isinstance(sample, Grouped):
        found.add("rows of a group", [type(sample), sample.size])
        _add_sample(found, sample.rows)
        return
    if isinstance(sample, Collated):
        found.add("collate", [sample.collate, sample.floats])
        for item in sample.items:
            _add_sample(found, item)
        return
    found.add("sample", type(sample))
    for path, leaf in tree.leaves(sample):
        if isinstance(leaf, torch.Tensor):
            found.add_values(path, leaf)
        else:
            found.add(path, leaf)
