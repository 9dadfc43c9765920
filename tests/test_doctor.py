"""What `autoaccum doctor` tells of GPUs: here, on a virtual one, and where something is missing."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from autoaccum.devices.cuda import nvml
from autoaccum.devices.cuda.gpu_specs import GPUS
from autoaccum.devices.virtual import VirtualGpu, availability, available, launch
from autoaccum.planning import cuda_words, environment

GIB = 2**30
REASON = available()
usable = pytest.mark.skipif(REASON is not None, reason=REASON or "")
NOT_HERE = ("AUTOACCUM", "PYTORCH", "CUDA_", "LD_PRELOAD")
NAMES = (
    "import pynvml as n; n.nvmlInit(); print([n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByIndex(i)) for i in (0, 1)])"
)
DOCTOR = [sys.executable, "-m", "autoaccum", "doctor"]


@cache
def on_the_virtual_gpu() -> dict[str, Any]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(NOT_HERE)}
    gpu = VirtualGpu(memory_bytes=4 * GIB, other_bytes=GIB, devices=2, name="A GPU")
    out, _ = launch([sys.executable, "-c", NAMES], gpu, env=env, stdout=subprocess.PIPE).communicate(timeout=60)
    first, second = ast.literal_eval(out.decode())
    visible = f"{second},{first[:12]}"  # a unique beginning is enough
    env |= {"CUDA_VISIBLE_DEVICES": visible, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    process = launch([*DOCTOR, "--json"], gpu, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    return dict(json.loads(out))


@usable
def test_every_device_with_its_uuid_and_its_place_in_nvml() -> None:
    facts = on_the_virtual_gpu()
    assert facts["cuda devices"] == 2 and facts["cuda:0"] == "A GPU, 2.50 GiB of 4.00 GiB free"
    assert (facts["cuda:0 in NVML"], facts["cuda:1 in NVML"]) == ("number 1", "number 0")
    first, second = (part.split()[-1] for part in facts["NVML"].split("; ")[1:])
    assert (facts["cuda:0 UUID"], facts["cuda:1 UUID"]) == (second, first) and first.startswith("GPU-")
    assert facts["NVML"].startswith("driver 580.00, 2 GPUs; 0: A GPU GPU-")
    assert facts["cuda:0 capability"] == "8.0, 108 multiprocessors"


@usable
def test_what_else_uses_a_device_and_what_is_left() -> None:
    facts = on_the_virtual_gpu()
    assert facts["cuda:1 other processes"].startswith("1.00 GiB: 1.00 GiB of ")
    assert facts["cuda:1 context"].startswith("512.0 MiB: ")
    assert facts["cuda:1 to use"] == "2.25 GiB for torch to reserve; the binding limit is: device"


@usable
def test_the_allocators_settings_as_it_read_them() -> None:
    facts = on_the_virtual_gpu()
    assert facts["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True" and facts["CUDA_VISIBLE_DEVICES"].startswith(
        "GPU-"
    )
    assert facts["cuda allocator"].startswith("native: ") and "expandable_segments=True" in facts["cuda allocator"]
    assert "roundup_power2_divisions=0" in facts["cuda allocator"]
    assert facts["virtual GPU"] == "this process runs on one"


@pytest.mark.parametrize(
    ("used", "counts", "message"),
    [
        ("", "", "has no effect: torch .* ignores it. Set PYTORCH_CUDA_ALLOC_CONF"),
        ("max_split_size_mb:32", "max_split_size_mb:32", "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:32 is set too"),
        ("", "max_split_size_mb:64", None),
        ("", "expandable_segments:True", None),
    ],
    ids=["old torch", "both", "new torch", "set since"],
)
def test_a_variable_of_allocator_settings_without_effect_is_named(
    used: str, counts: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", used)
    monkeypatch.setattr(cuda_words, "allocator_settings", lambda: {"PYTORCH_CUDA_ALLOC_CONF": counts})
    found = cuda_words.ignored_settings()
    assert re.search(message, found) if message else found == ""


def test_host_facts_need_no_gpu() -> None:
    facts = environment.host_facts()
    assert facts["NVML"] and facts["virtual GPU"]
    name = facts["host memory"].split("the binding limit is: ")[1]
    assert name in facts and " usable; " in facts["host memory"]


@usable
def test_a_virtual_gpu_is_available() -> None:
    assert availability.describe_virtual_gpu().startswith("available: autoaccum virtual-gpu")


def test_a_virtual_gpu_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "reason_against", lambda: "There is no compiler.")
    assert availability.describe_virtual_gpu() == "not available: There is no compiler."


@pytest.mark.parametrize("limit", ["ulimit -d", "ulimit -v", "vm.overcommit_memory=2"])
def test_a_limit_of_the_host_that_binds(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    limited = {"ulimit -d": resource.RLIMIT_DATA, "ulimit -v": resource.RLIMIT_AS}.get(limit)
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(availability, "reason_against", lambda: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB if which == limited else unlimited, unlimited))
    monkeypatch.setattr(availability, "_overcommit", lambda: "2" if limited is None else "0")
    assert availability.describe_virtual_gpu() == f"not available: {limit} may forbid the addresses that it reserves"


def test_no_cuda_device_is_reported_with_torchs_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver.\nMore.")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    facts = environment.torch_facts()
    assert (facts["cuda devices"], facts["cuda"]) == (0, "not available: Found no NVIDIA driver.")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert environment.torch_facts()["cuda"] == "not available: this build of torch has no CUDA"


def test_a_device_that_cannot_be_used_is_reported_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from autoaccum.devices.cuda import budget

    def read(index: int) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(budget, "read_device", read)
    assert environment._device_facts(3) == {"cuda:3": "can't be used: CUDA error: out of memory"}


def test_nvml_without_a_driver_or_of_another_make(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "another package or too old" in nvml.describe(library=object())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml is not installed" in nvml.describe()


def test_the_gpus_that_are_known() -> None:
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    message = subprocess.run([*DOCTOR, "--gpus"], env=env, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in message.stdout.splitlines() if line[0] != " "] == [gpu.name for gpu in GPUS]
    message = subprocess.run([*DOCTOR, "--gpus", "--json"], env=env, capture_output=True, text=True, check=True)
    assert [gpu["total_bytes"] for gpu in json.loads(message.stdout)] == [gpu.total_bytes for gpu in GPUS]
