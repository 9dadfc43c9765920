"""The facts that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from typing import Any

from .units import show_bytes

_PACKAGES = ("autoaccum", "torch", "numpy", "nvidia-ml-py", "optuna", "pandas", "pydantic", "typer", "transformers")
_SETTINGS = ("OMP_NUM_THREADS", "MALLOC_", "PYTORCH_", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "LD_PRELOAD")


def versions() -> dict[str, str]:
    """Of the packages, of Python and of the system, and how many processors there are; no torch needed."""
    facts: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["python"] = platform.python_version()
    facts["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver())}"
    facts["processors"] = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable"
    return facts


def host_facts() -> dict[str, Any]:
    """Versions, machine, limits and settings; no torch needed."""
    from .budget import read_cpu_budget

    facts: dict[str, Any] = dict(versions())
    for term in read_cpu_budget().terms:
        facts[term.name] = f"{show_bytes(term.bytes)}: {term.why}"
    for name, limit in (("data limit", resource.RLIMIT_DATA), ("address space limit", resource.RLIMIT_AS)):
        soft, _ = resource.getrlimit(limit)
        facts.setdefault(name, "none" if soft == resource.RLIM_INFINITY else show_bytes(soft))
    for name, value in sorted(os.environ.items()):
        if name.startswith(_SETTINGS):
            facts[name] = value
    return facts


def torch_facts() -> dict[str, Any]:
    """What torch says of itself, its devices and its caches."""
    import torch

    from . import process_memory

    facts: dict[str, Any] = {
        "torch build": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        "torch threads": torch.get_num_threads(),
        "torch after import": f"{show_bytes(process_memory.committed_bytes())} committed",
        "fixed mmap threshold": "available" if process_memory.fix_mmap_threshold() else "not with this C library",
        "mkldnn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    }
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["cuda devices"] = count
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        facts[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {show_bytes(free)} of {show_bytes(total)} free"
    return facts
