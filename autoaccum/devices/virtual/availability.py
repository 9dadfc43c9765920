"""Whether a virtual GPU is possible on this machine. No torch here."""

from __future__ import annotations

import resource
from pathlib import Path

from . import control
from .build import reason_against


def describe_virtual_gpu() -> str:
    """Describe whether a virtual GPU is in use, or available."""
    if control.is_virtual():
        return "this process runs on one"
    reason = reason_against()
    if reason is not None:
        return f"not available: {reason}"
    limits = {"ulimit -d": resource.RLIMIT_DATA, "ulimit -v": resource.RLIMIT_AS}
    binding = [name for name, limit in limits.items() if resource.getrlimit(limit)[0] != resource.RLIM_INFINITY]
    if _overcommit() == "2":
        binding.append("vm.overcommit_memory=2")
    if binding:  # source/memory.c: it reserves addresses for 66 times the device's memory
        return f"not available: {' and '.join(binding)} may forbid the addresses that it reserves"
    return "available: autoaccum virtual-gpu --memory 4GiB -- COMMAND"


def _overcommit() -> str:
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    except OSError:
        return ""
