"""Read what the card is, in a process that ends afterwards."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from typing import Any

from autoaccum.devices.cuda.gpu_specs import GPUS, Gpu

VIRTUAL = "real allocator on a virtual GPU; times mean nothing"
REAL = "measured on this GPU"


def facts() -> dict[str, Any]:
    """Return the card's name, sizes and versions.

    Raises:
        SystemExit: torch sees no GPU; the text says so.
    """
    out = subprocess.run([sys.executable, "-m", "benchmarks.on_gpu.card"], capture_output=True, text=True)
    lines = out.stdout.strip().splitlines()
    if out.returncode or not lines:
        raise SystemExit(f"The card can't be read: {(out.stderr.strip().splitlines() or ['no answer'])[-1]}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "nothing" in found:
        raise SystemExit(f"skipped: {found['nothing']}")
    return found


def nearest(name: str, total_bytes: int, capability: str) -> tuple[Gpu, bool]:
    """Find the card's row in the table of GPUs.

    Returns:
        The row, or the nearest one; and whether it is the card's own: its name, and a total memory within 2 %.
    """
    close = [gpu for gpu in GPUS if abs(gpu.total_bytes / total_bytes - 1) < 0.02]
    own = [gpu for gpu in close if gpu.device_name == name]
    if own:
        return own[0], True
    alike = [gpu for gpu in GPUS if gpu.capability == capability] or list(GPUS)
    return min(alike, key=lambda gpu: abs(gpu.total_bytes - total_bytes)), False


def _read() -> dict[str, Any]:
    import torch

    from autoaccum.devices.cuda.budget import read_device
    from autoaccum.devices.virtual.control import is_virtual

    if not torch.cuda.is_available():
        return {"nothing": f"torch {torch.__version__} sees no GPU here (autoaccum doctor says more)"}
    free, total = torch.cuda.mem_get_info(0)
    properties = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda")
    here = read_device(0)
    seen = here.seen
    capability = f"{properties.major}.{properties.minor}"
    spec, is_own = nearest(properties.name, total, capability)
    virtual = is_virtual()
    return {
        "card": properties.name,
        "virtual": virtual,
        "kind": VIRTUAL if virtual else REAL,
        "driver": seen.driver or "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "total bytes": total,
        "free bytes": free,
        "capability": capability,
        "multiprocessors": properties.multi_processor_count,
        "uuid": seen.uuid or str(properties.uuid),
        "nvml": seen.note,
        "nvml lists processes": here.own is not None,
        "others": [dataclasses.astuple(each) for each in seen.processes][:8] if not virtual else [],
        "spec": spec.name,
        "spec is the card's": is_own,
        "spec outside bytes": spec.context_bytes + spec.library_bytes,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(_read()), flush=True)
