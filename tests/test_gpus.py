"""The table of real GPUs: that its figures are those of the sources beside them, and what stands in for them."""

from __future__ import annotations

import json
import re

import pytest
from prepared_process import run_forked

from autoaccum.devices.cuda.gpu_specs import CUDNN_BYTES, GPUS, LIBRARY_BYTES, Gpu, find_gpu, list_gpus
from autoaccum.devices.virtual import available
from autoaccum.devices.virtual.stand_in import planning_environment, virtual_settings
from autoaccum.errors import UsageError
from autoaccum.units import parse_bytes

MIB, GIB = 2**20, 2**30
REASON = available()
usable = pytest.mark.skipif(REASON is not None, reason=REASON or "")
each = pytest.mark.parametrize("gpu", GPUS, ids=[gpu.name for gpu in GPUS])


@each
def test_every_figure_has_a_source_that_can_be_looked_up(gpu: Gpu) -> None:
    shown = gpu.sources
    for source in (shown.total, shown.processor):
        assert "https://github.com/" in source or "'" in source
    assert shown.context.startswith(("out-of-memory message: ", "derived: "))
    assert shown.library.startswith("derived: ")
    assert gpu.library_bytes == (CUDNN_BYTES if "whisper and ResNet-50" in shown.library else LIBRARY_BYTES)


@each
def test_the_figures_are_those_of_the_sources(gpu: Gpu) -> None:
    shown = gpu.sources
    quoted = [int(size) for size in re.findall(r"\((\d{10,}) bytes\)", shown.total)]
    rounded = [int(size) * MIB for size in re.findall(r"total_memory=(\d+)MB", shown.total)]
    capacities = [parse_bytes(f"{size}GiB") for size in re.findall(r"capacity of ([\d.]+) GiB", shown.total)]
    logged = [int(size) * MIB for size in re.findall(r"VRAM: (\d+) MiB", shown.total)]
    less = [(int(all_of) - int(kept)) * MIB for all_of, kept in re.findall(r"'(\d+)MiB', less the (\d+)", shown.total)]
    near = [
        size for size in (*quoted, *rounded, *capacities, *logged, *less) if abs(size - gpu.total_bytes) <= 10 * MIB
    ]
    assert near or "https://" in shown.total
    counts = re.findall(r"multi_processor_count=(\d+)|\(0*(\d+)\) Multiprocessors", shown.processor)
    assert all(int(a or b) == gpu.multiprocessors for a, b in counts)
    assert all(int(cores) == 128 * gpu.multiprocessors for cores in re.findall(r"(\d+) CUDA cores", shown.processor))
    assert counts or "https://" in shown.processor
    in_use, allocated, idle = re.findall(r"([\d.]+ [GM]iB) (?:memory in use|allocated|reserved)", shown.context)
    assert gpu.context_bytes == parse_bytes(in_use) - parse_bytes(allocated) - parse_bytes(idle)
    assert 100 * MIB < gpu.context_bytes < GIB


@each
def test_a_name_finds_it_and_so_does_the_drivers(gpu: Gpu) -> None:
    assert find_gpu(gpu.name) is gpu
    if [other.device_name for other in GPUS].count(gpu.device_name) == 1:
        assert find_gpu(gpu.device_name) is gpu
    else:  # of two sizes
        with pytest.raises(UsageError, match="may be any of 2 GPUs"):
            find_gpu(gpu.device_name)
    assert find_gpu(f" {gpu.name.upper().replace('-', '_')} ") is gpu


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("RTX 4090", "rtx-4090"),
        ("GeForce RTX 3090", "rtx-3090"),
        ("V100-SXM2-16GB", "v100-16gb"),
        ("nvidia_l4", "l4"),
        *((str(number), f"rtx-{number}") for number in (3060, 3070, 3080, 4060, 4070, 4080, 5070, 5080, 5090)),
        *((f"{number}ti", f"rtx-{number}-ti") for number in (3060, 3080, 3090, 4070, 5070, 2080)),
        ("RTX 4070 Ti", "rtx-4070-ti"),
        ("4070TiSuper", "rtx-4070-ti-super"),
        ("4070 super", "rtx-4070-super"),
        ("4060 ti 16G", "rtx-4060-ti-16gb"),
        ("RTX 6000 Ada", "rtx-6000-ada"),
        ("rtx pro 6000", "rtx-pro-6000"),
        *((name, name) for name in ("l4", "t4", "a10", "a10g", "l40s", "b200", "h200", "gh200")),
    ],
)
def test_a_name_that_is_spelled_another_way(name: str, meant: str) -> None:
    assert find_gpu(name).name == meant


def test_the_names_that_the_command_line_promises() -> None:
    names = {gpu.name for gpu in GPUS}
    data_centre = {
        "h100-80gb",
        "h100-pcie-80gb",
        "h200",
        "gh200",
        "b200",
        "a100-40gb",
        "a100-80gb",
        "a40",
        "l40s",
        "l4",
    }
    assert data_centre | {"a10g", "a10", "t4", "v100-16gb", "v100-32gb", "p100"} <= names
    assert {"a6000", "rtx-3090", "rtx-4090", "rtx-5090"} <= names
    assert len(names) == len(GPUS)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("v100-24gb", "v100-32gb"),
        ("3050", "Near it are: rtx-3090, rtx-3060"),
        ("rtx-4075", "rtx-4070"),
        ("abacus", "Nothing in the table is near it."),
        ("", "Nothing in the table is near it."),
    ],
)
def test_a_name_that_is_not_known(name: str, shown: str) -> None:
    with pytest.raises(UsageError, match=f"No GPU is known as '{name}'") as error:
        find_gpu(name)
    assert shown in error.value.why and "autoaccum doctor --gpus" in error.value.hint


def test_the_list_tells_each_with_its_sources() -> None:
    text = list_gpus()
    assert all(gpu.name in text and gpu.sources.context in text for gpu in GPUS)


@each
def test_each_can_be_stood_in_for(gpu: Gpu) -> None:
    virtual = virtual_settings(gpu, devices=2)
    assert (virtual.memory_bytes, virtual.name, virtual.devices) == (gpu.total_bytes, gpu.device_name, 2)
    assert gpu.total_bytes - virtual.context_bytes == gpu.capacity_bytes


LOOK = """
import json, torch
from autoaccum.devices.cuda.budget import read_cuda_budget
kind = torch.cuda.get_device_properties(0)
seen = kind.name, kind.total_memory, f"{kind.major}.{kind.minor}", kind.multi_processor_count
print(json.dumps([*seen, read_cuda_budget().bytes]))
"""


@usable
def test_a_stand_in_is_there_whichever_real_gpus_are_visible() -> None:
    for hidden in ("", "-1", "GPU-3fd1"):
        found = planning_environment("h100-80gb", {"CUDA_VISIBLE_DEVICES": hidden, "HOME": "/root"})
        assert found is not None and "CUDA_VISIBLE_DEVICES" not in found and found["HOME"] == "/root"


@usable
def test_torch_takes_the_largest_for_the_real_one() -> None:
    gpu = max(GPUS, key=lambda gpu: gpu.total_bytes)
    done = run_forked(LOOK, gpu=virtual_settings(gpu))
    expected = [gpu.device_name, gpu.total_bytes, gpu.capability, gpu.multiprocessors, gpu.capacity_bytes]
    assert done.returncode == 0 and json.loads(done.stdout) == expected


def test_a_measured_context_is_not_less_than_what_was_measured() -> None:
    """NVML's used memory in training, beyond torch's, on three GPUs: 1221, 1384 and 875 MiB."""
    outside = {name: find_gpu(name) for name in ("h100-80gb", "h200", "l40s")}
    totals = {"h100-80gb": 81_559, "h200": 143_771, "l40s": 46_068}  # NVML's, which count the driver's own
    counted = {name: totals[name] - gpu.capacity_bytes / MIB for name, gpu in outside.items()}
    for name, measured in {"h100-80gb": 1221, "h200": 1384, "l40s": 875}.items():
        assert measured + 17 <= counted[name] < measured + 300, name
