"""Devices: found by their type, of one interface, with sizes in bytes; they alone say whether kernels compute."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from prepared_process import run_forked

import autoaccum
from autoaccum import UsageError
from autoaccum.devices.base import Device, RecordingPolicy
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.devices.cuda.device import CudaDevice
from autoaccum.devices.registry import ROOMS, get_device
from autoaccum.devices.virtual import VirtualGpu, available
from autoaccum.devices.virtual.device import StandInDevice, VirtualGpuDevice

ROOT = Path(autoaccum.__file__).parent
PAGE = ROOT.parent / "docs" / "adding-a-device.md"
REASON = available()
CLASSES = (CpuDevice, CudaDevice, VirtualGpuDevice, StandInDevice)


def test_a_device_is_found_by_its_type_and_is_the_same_each_time() -> None:
    found = get_device(torch.device("cpu"))
    assert isinstance(found, CpuDevice) and found is get_device(torch.device("cpu"))
    assert isinstance(get_device(torch.device("cuda", 1)), CudaDevice)  # nothing of CUDA is asked


def test_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match="mps is not supported"):
        get_device(torch.device("mps"))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_device_has_the_whole_interface(kind: type[Device]) -> None:
    assert not inspect.isabstract(kind) and isinstance(kind.policy, RecordingPolicy)
    assert kind.computes == (kind in (CpuDevice, CudaDevice))
    for name, method in vars(Device).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            wanted, found = (list(inspect.signature(getattr(each, name)).parameters) for each in (Device, kind))
            assert found == wanted, f"{kind.__name__}.{name}"


def test_a_page_describes_each_method() -> None:
    text = PAGE.read_text()
    methods = {name for name, value in vars(Device).items() if not name.startswith("_") and callable(value)}
    named = set(re.findall(r"`(\w+)\(", text))
    assert methods - named <= {"read_heap", "holes_filled"}, "of malloc's heap, for the CPU"
    assert named <= methods | {"get_device", "run"}


CHECK = """
import json, sys, torch
from autoaccum.devices.registry import get_device
device = get_device(torch.device(sys.argv[1]))
held = torch.ones(4 << 20, dtype=torch.uint8, device=sys.argv[1])
def run(on_phase):
    with on_phase("first"):
        torch.ones(1 << 20, dtype=torch.uint8, device=sys.argv[1])
recording = device.record(run, micro_batch=1)
events = [event.bytes for phase in recording.phases for event in phase.events if abs(event.bytes) >= 1 << 20]
replay = device.replay(recording.phases, device.prepare())
measured = device.measure(lambda split, on_phase=None: held.add_(1), [(1,), (1,)])
before = device.held_bytes()
budget = device.read_budget()
device.limit_memory(before + (1 << 30))
for method in ("clean", "release_cache", "release_workspaces", "synchronize"):
    getattr(device, method)()
print(json.dumps({
    "class": type(device).__name__, "name": device.name, "words": device.settings_words(), "events": events,
    "replay": replay.peak_bytes, "seconds": measured.seconds, "held": before, "budget": budget.bytes,
    "limit": budget.limit_bytes, "free": device.free_bytes(), "peak": device.lifetime_peak_bytes(),
    "input": device.input_bytes(1 << 20), "reasons": all(item.why for item in budget.terms),
}))
"""


@pytest.mark.parametrize("kind", sorted(ROOMS))
def test_each_method_returns_bytes_and_seconds(kind: str) -> None:
    if kind == "cuda" and REASON is not None:
        pytest.skip(REASON)
    out = run_forked(CHECK, kind, gpu=VirtualGpu(memory_bytes=4 * 2**30) if kind == "cuda" else None)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert (
        found["class"] == {"cpu": "CpuDevice", "cuda": "VirtualGpuDevice"}[kind] and found["name"] and found["reasons"]
    )
    assert found["events"] == [1 << 20, -(1 << 20)] and found["replay"] >= 1 << 20 and found["seconds"] >= 0
    assert all(isinstance(found[name], int) for name in ("replay", "held", "budget", "limit", "free", "peak", "input"))
    assert found["held"] >= 4 << 20 and 0 < found["budget"] <= found["limit"] and found["free"] > 0
    assert found["input"] == 0 or found["input"] >= 1 << 20


def test_whether_kernels_compute_is_asked_of_the_device_alone() -> None:
    askers = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("control.is_virtual", "is_virtual")
        and path.parent.name != "reporting"  # that of a plan
    }
    assert askers == {"devices/registry.py", "devices/virtual/availability.py", "devices/virtual/control.py"}
