"""Read from NVML which processes use a device.

What it does not report becomes a note, never an error.

NVML numbers devices by itself, whatever CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER say; so they are matched by UUID.
No torch here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("autoaccum")

_NEEDED = ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetComputeRunningProcesses")
_HINT = "pip install nvidia-ml-py"


@dataclass(frozen=True)
class Process:
    """A process that uses a device.

    Attributes:
        pid: As NVML has it: a process of the host, where this one is in a container.
        name: "" where it can't be seen from here.
        bytes: All that it holds on the device, its context included; None where NVML doesn't say.
    """

    pid: int
    name: str
    bytes: int | None


@dataclass(frozen=True)
class NvmlInfo:
    """A device as NVML reports it.

    Attributes:
        uuid: "GPU-..." or "MIG-..."; "" where the device wasn't found.
        index: NVML's own number, as nvidia-smi has it; of the GPU around it for a MIG instance; None if not known.
        driver: The driver's version; "" if not known.
        processes: Those that NVML shows, this one included if it is among them.
        note: Why something is missing; "" where nothing is.
    """

    uuid: str = ""
    index: int | None = None
    driver: str = ""
    processes: tuple[Process, ...] = ()
    note: str = ""


def see_device(
    uuid: str, bus_id: str = "", *, library: Any = None, environ: Mapping[str, str] = os.environ
) -> NvmlInfo:
    """Find a device and list the processes that use it.

    Args:
        uuid: CUDA's, with or without its prefix.
        bus_id: CUDA's PCI bus id, for where the UUID names nothing.
        library: The module pynvml; left out, the one that is installed.
        environ: Where CUDA_VISIBLE_DEVICES is read, for MIG.

    Returns:
        What could be seen; with a note where something couldn't.
    """
    try:
        library = _loaded() if library is None else library
        lacking = [name for name in _NEEDED if not hasattr(library, name)]
        if lacking:
            return NvmlInfo(note=f"the installed pynvml is another package, without {lacking[0]} ({_HINT})")
        library.nvmlInit()
    except Exception as error:  # a side source, of many makes and ages: it must never stop a plan
        return NvmlInfo(note=_reason(error))
    try:
        return _look(library, uuid, bus_id, environ)
    except Exception as error:
        return NvmlInfo(note=_reason(error))
    finally:
        _quietly(library.nvmlShutdown)


def describe(*, library: Any = None) -> str:
    """Describe the driver and every GPU that NVML lists.

    CUDA_VISIBLE_DEVICES hides none; or why NVML cannot be used.
    """
    try:
        library = _loaded() if library is None else library
        library.nvmlInit()
    except Exception as error:
        return _reason(error)
    try:
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        gpus = [f"{i}: {_text(library.nvmlDeviceGetName(h))} {_uuid(library, h)}" for i, h in enumerate(handles)]
        driver = _text(_quietly(library.nvmlSystemGetDriverVersion)) or "of an unknown version"
        return "; ".join([f"driver {driver}, {len(gpus)} GPU{'s' * (len(gpus) != 1)}", *gpus])
    except Exception as error:
        return _reason(error)
    finally:
        _quietly(library.nvmlShutdown)


def _uuid(library: Any, handle: Any) -> str:
    cut = ", divided by MIG" if _is_divided(library, handle) else ""
    return _text(_quietly(library.nvmlDeviceGetUUID, handle)) + cut


def _loaded() -> Any:
    import pynvml

    return pynvml


def _reason(error: Exception) -> str:
    """Return why NVML cannot be used, in words."""
    if isinstance(error, ImportError):
        return f"NVML can't be asked: module pynvml is not installed ({_HINT})"
    if isinstance(error, AttributeError):
        return f"the installed pynvml is another package or too old: {error} ({_HINT})"
    log.debug("NVML failed: %s: %s", type(error).__name__, error)
    text = str(error).strip() or type(error).__name__
    kind = type(error).__name__
    if "LibRmVersionMismatch" in kind or "version mismatch" in text.lower():
        return f"NVML can't be asked: {text}; the driver was updated since it was loaded (restart the machine)"
    if "LibraryNotFound" in kind or "Shared Library Not Found" in text:
        return "NVML can't be asked: the driver's libnvidia-ml.so.1 is not here (containers: capability 'utility')"
    if "NoPermission" in kind or "Insufficient Permissions" in text:
        return "NVML can't be asked: no permission"
    return f"NVML can't be asked: {text}"


def _look(library: Any, uuid: str, bus_id: str, environ: Mapping[str, str]) -> NvmlInfo:
    driver = (
        _text(_quietly(library.nvmlSystemGetDriverVersion)) if hasattr(library, "nvmlSystemGetDriverVersion") else ""
    )
    handle = _by_uuid(library, uuid) or _by_bus(library, bus_id)
    if handle is None:
        return NvmlInfo(driver=driver, note=f"NVML doesn't know a device {uuid}")
    index = _quietly(library.nvmlDeviceGetIndex, handle)
    if _is_divided(library, handle):
        instance = _instance(library, handle, uuid, environ)
        if instance is None:
            return NvmlInfo(
                driver=driver,
                index=index,
                note="the GPU is divided by MIG, and NVML does not report which instance this is",
            )
        handle = instance
    found = _text(_quietly(library.nvmlDeviceGetUUID, handle)) or uuid
    try:
        processes = _processes(library, handle)
    except Exception as error:
        return NvmlInfo(found, index, driver, note=_reason(error).replace("be asked", "list processes", 1))
    return NvmlInfo(found, index, driver, processes)


def _by_uuid(library: Any, uuid: str) -> Any:
    """Return the handle of the device with a UUID.

    CUDA's has no prefix, and is the instance's own under MIG.
    """
    names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    for name in names:
        handle = _quietly(library.nvmlDeviceGetHandleByUUID, name)
        if handle is not None:
            return handle
    return None


def _by_bus(library: Any, bus_id: str) -> Any:
    if not bus_id or not hasattr(library, "nvmlDeviceGetHandleByPciBusId"):
        return None
    return _quietly(library.nvmlDeviceGetHandleByPciBusId, bus_id)


def _is_divided(library: Any, handle: Any) -> bool:
    """Return whether a GPU is divided into MIG instances."""
    modes = _quietly(library.nvmlDeviceGetMigMode, handle) if hasattr(library, "nvmlDeviceGetMigMode") else None
    return bool(modes and modes[0])


def _instance(library: Any, gpu: Any, uuid: str, environ: Mapping[str, str]) -> Any:
    """Return the MIG instance that CUDA uses.

    The one CUDA_VISIBLE_DEVICES names first, or the only one.
    """
    count = _quietly(library.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0
    found = [_quietly(library.nvmlDeviceGetMigDeviceHandleByIndex, gpu, i) for i in range(count)]
    found = [instance for instance in found if instance is not None]
    named = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    for wanted in (named if named.startswith("MIG-") else "", f"MIG-{uuid}"):
        same = [i for i in found if wanted and _text(_quietly(library.nvmlDeviceGetUUID, i)).startswith(wanted)]
        if len(same) == 1:
            return same[0]
    return found[0] if len(found) == 1 else None


def _processes(library: Any, handle: Any) -> tuple[Process, ...]:
    """List the processes that compute or draw on a device.

    Under MPS too. One that does both is listed once.
    """
    listed = list(library.nvmlDeviceGetComputeRunningProcesses(handle))
    for kind in ("MPSCompute", "Graphics"):
        function = getattr(library, f"nvmlDeviceGet{kind}RunningProcesses", None)
        listed += (_quietly(function, handle) if function else None) or []
    # A container numbers its processes itself: without this process in the list, NVML's numbers mean others here
    here = os.getpid() in [entry.pid for entry in listed]
    found: dict[int, Process] = {}
    for entry in listed:
        size = entry.usedGpuMemory
        known = found.get(entry.pid)
        if known is None or (known.bytes or 0) < (size or 0):
            found[entry.pid] = Process(entry.pid, _name(entry.pid) if here else "", None if size is None else int(size))
    return tuple(found[pid] for pid in sorted(found))


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _quietly(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return a call's result, or None where it fails."""
    try:
        return call(*arguments)
    except Exception as error:
        log.debug("NVML: %s failed: %s: %s", getattr(call, "__name__", call), type(error).__name__, error)
        return None


def _text(value: Any) -> str:
    return str(value or "")
