"""Collect the facts that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from typing import Any

from ..units import show_bytes

_PACKAGES = ("autoaccum", "torch", "numpy", "nvidia-ml-py", "optuna", "pandas", "pydantic", "typer", "transformers")
_SETTINGS = (
    *("OMP_NUM_THREADS", "MALLOC_", "PYTORCH_", "GLIBC_TUNABLES", "LD_PRELOAD"),
    *("CUDA_", "CUBLAS", "NVIDIA_VISIBLE_DEVICES", "AUTOACCUM_GPU_"),
)


def versions() -> dict[str, str]:
    """Return versions of packages, Python and system, and the processors, without torch."""
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
    """Return versions, machine, limits, NVML's state and settings, without torch."""
    from ..devices.cpu.budget import read_cpu_budget
    from ..devices.cuda import nvml
    from ..devices.virtual.availability import describe_virtual_gpu

    facts: dict[str, Any] = dict(versions())
    host = read_cpu_budget()
    for term in host.terms:
        facts[term.name] = f"{show_bytes(term.bytes)}: {term.why}"
    facts["host memory"] = f"{show_bytes(host.bytes)} usable; the binding limit is: {host.binding_constraint}"
    for name, limit in (("data limit", resource.RLIMIT_DATA), ("address space limit", resource.RLIMIT_AS)):
        soft, _ = resource.getrlimit(limit)
        facts.setdefault(name, "none" if soft == resource.RLIM_INFINITY else show_bytes(soft))
    facts["NVML"] = nvml.describe().removeprefix("NVML ")
    facts["virtual GPU"] = describe_virtual_gpu()
    for name, value in sorted(os.environ.items()):
        if name.startswith(_SETTINGS):
            facts[name] = value
    return facts


def torch_facts() -> dict[str, Any]:
    """Return torch's build, its devices and its allocator."""
    import torch

    from .. import process_memory
    from ..devices.cpu import page_cache

    facts: dict[str, Any] = {
        "torch build": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        "torch threads": torch.get_num_threads(),
        "torch after import": f"{show_bytes(process_memory.committed_bytes())} committed",
        "page cache": page_cache.reason_against() or "available",
        "fixed mmap threshold": "available" if process_memory.fix_mmap_threshold() else "not with this C library",
        "mkldnn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    }
    reason = _reason_against_cuda()
    facts["cuda devices"] = 0 if reason else torch.cuda.device_count()
    if reason:
        facts["cuda"] = reason
        return facts
    for index in range(torch.cuda.device_count()):
        facts |= _device_facts(index)
    facts["cuda allocator"] = _allocator()
    facts |= _ignored()
    return facts


def _ignored() -> dict[str, str]:
    """Return the variable of allocator settings that torch ignores, if any."""
    from .cuda_words import ignored_settings

    text = ignored_settings()
    return {"cuda allocator ignores": text} if text else {}


def _reason_against_cuda() -> str:
    """Return why torch has no CUDA device; "" where it has one."""
    import torch

    if torch.version.cuda is None:
        return "not available: this build of torch has no CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # RuntimeError, AssertionError, torch's own: the report shows it
        return f"not available: {_first_line(error)}"
    return "" if torch.cuda.device_count() else "not available: no device is visible"


def _device_facts(index: int) -> dict[str, Any]:
    """Return one device's kind, free memory and limits."""
    import torch

    from ..devices.cuda.allocator_rules import find_rules, self_test
    from ..devices.cuda.budget import cuda_budget, read_device
    from ..errors import UsageError

    name = f"cuda:{index}"
    try:
        found = read_device(index)
        kind = torch.cuda.get_device_properties(index)
    except Exception as error:
        return {name: f"can't be used: {_first_line(error)}"}
    rules, tested = find_rules(index), self_test(index)
    agrees = "a test on the device shows the same" if tested.tie_rule == rules.tie_rule else tested.why
    facts: dict[str, Any] = {
        name: f"{kind.name}, {show_bytes(found.free_bytes)} of {show_bytes(found.total_bytes)} free",
        f"{name} capability": f"{kind.major}.{kind.minor}, {kind.multi_processor_count} multiprocessors",
        f"{name} UUID": found.seen.uuid or str(kind.uuid),
        f"{name} in NVML": found.seen.note or f"number {found.seen.index}",
        f"{name} reuses": f"of equal free blocks that with the {rules.tie_rule} ({rules.reason}; {agrees})",
        f"{name} addresses": "go down" if rules.addresses_down else "go up",
    }
    try:
        budget = cuda_budget(found)
    except UsageError as error:
        return facts | {f"{name} to use": f"nothing: {error.what}"}
    facts |= {f"{name} {term.name}": f"{show_bytes(term.bytes)}: {term.why}" for term in budget.terms}
    facts[f"{name} to use"] = (
        f"{show_bytes(budget.bytes)} for torch to reserve; the binding limit is: {budget.binding_constraint}"
    )
    return facts


def _allocator() -> str:
    """Return the caching allocator's settings as it read them."""
    import torch

    from ..torch_compat import allocator_settings

    settings = dict(allocator_settings())
    settings.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    divisions = set(settings.get("roundup_power2_divisions", {}).values())
    if len(divisions) == 1:  # the same for every size
        settings["roundup_power2_divisions"] = divisions.pop()
    text = ", ".join(f"{name}={value}" for name, value in settings.items())
    return f"{torch.cuda.get_allocator_backend()}: {text}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
