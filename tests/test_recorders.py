"""What recording and measuring leave alone: others' stderr, the sampler's own time, settings as they are."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from resource import RUSAGE_SELF
from resource import getrusage as usage_of
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prepared_process import run_forked
from torch import nn

from autoaccum import Workload
from autoaccum.devices import virtual
from autoaccum.devices.cpu import recorder
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.devices.cpu.peak_sampler import PeakSampler
from autoaccum.devices.cuda.nvml import see_device
from autoaccum.exactness import check
from autoaccum.simulation.cuda_allocator.allocator import CudaRules

KINETO = b"USDT:2026-11-28 04:08:40 32118:32118 SyncActivityProfilerHandler.cpp:39] profiler_start\n"


@pytest.fixture
def stderr() -> Iterator[object]:
    """A file in place of descriptor 2."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        yield file
        os.dup2(kept, 2)
        os.close(kept)


@pytest.mark.parametrize(
    ("written", "left"),
    [
        (KINETO, b""),
        (b"a line of another thread\n" + KINETO + b"and the next\n", b"a line of another thread\nand the next\n"),
        (KINETO + b"half a line", b"half a line"),
        (b"ERROR: mine, at 2026-11-28\n\xff\n", b"ERROR: mine, at 2026-11-28\n\xff\n"),
    ],
)
def test_only_kinetos_lines_are_left_out(stderr: object, written: bytes, left: bytes) -> None:
    with recorder._quiet_stderr():
        os.write(2, written)
    os.lseek(2, 0, os.SEEK_SET)
    assert os.read(2, 1000) == left


def test_a_recording_leaves_nothing_on_stderr(stderr: object) -> None:
    recorder.record(lambda on_phase: None, micro_batch=1)
    os.lseek(2, 0, os.SEEK_SET)
    assert b"profiler_st" not in os.read(2, 10_000)


def test_watching_is_no_part_of_the_kernels_share(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = iter([SimpleNamespace(ru_utime=5.0, ru_stime=5.0), SimpleNamespace(ru_utime=6.0, ru_stime=6.0)])
    with PeakSampler() as sampler:
        time.sleep(0.2)
    assert sum(sampler.own_seconds) > 0
    monkeypatch.setattr(
        "autoaccum.devices.cpu.device.resource.getrusage",
        lambda who: next(usage) if who == RUSAGE_SELF else usage_of(who),
    )
    monkeypatch.setattr(PeakSampler, "own_seconds", (0.2, 0.8))
    device = CpuDevice(torch.device("cpu"))
    assert device.measure(lambda split: None, [(1,)]).system_share == pytest.approx(0.2)


def settings(**own: object) -> dict[str, object]:
    base = {"PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "garbage_collection_threshold": 0.0}
    steps = {str(1 << place): 0 for place in range(16)}
    return {**base, "expandable_segments": False, "roundup_power2_divisions": steps, **own}


def test_settings_are_read_as_the_allocator_has_them() -> None:
    assert CudaRules.from_snapshot(settings()) == CudaRules()
    assert CudaRules.from_snapshot(settings(expandable_segments=True)).expandable_segments
    ignored = settings(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")  # as torch 2.9.1 did
    assert not CudaRules.from_snapshot(ignored).expandable_segments
    steps = {str(1 << place): 4 * (place > 8) for place in range(16)}
    found = CudaRules.from_snapshot(settings(max_split_size=64 << 20, roundup_power2_divisions=steps))
    assert found.max_split_size_bytes == 64 << 20
    assert found.roundup_power2_divisions == (0,) * 9 + (4,) * 7
    text = settings(PYTORCH_CUDA_ALLOC_CONF="large_segment_size_mb:64")  # it has no value of its own there
    assert CudaRules.from_snapshot(text).large_segment_bytes == 64 << 20
    assert (
        CudaRules.from_snapshot({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}).max_split_size_bytes == 128 << 20
    )


ON_GPU = """
import json, warnings, torch
from torch import nn
from autoaccum import Workload; from autoaccum.devices.registry import get_device; from autoaccum.window import step
from autoaccum.window.fingerprint import fingerprint
warnings.simplefilter("ignore")
cuda = get_device(torch.device("cuda"))
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).cuda()
parts = step.open_context(Workload(model, (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))))
found = [cuda.read_rules().expandable_segments, fingerprint(parts)["allocator"]]
torch.cuda.memory._set_allocator_settings("expandable_segments:True,max_split_size_mb:64")
rules = cuda.read_rules()
found += [rules.expandable_segments, rules.max_split_size_bytes, fingerprint(parts)["allocator"]]
ran = []
def run(on_phase):
    with on_phase("first"):
        ran.append(torch.zeros(1000, device="cuda").sum())
for benchmark in (False, True):
    torch.backends.cudnn.benchmark = benchmark
    ran.clear()
    cuda.record(run, micro_batch=2)
    found += [len(ran), fingerprint(parts).get("cudnn")]
print(json.dumps(found))
"""


@pytest.mark.skipif(virtual.available() is not None, reason=str(virtual.available()))
def test_settings_that_changed_and_cudnns_benchmark_are_seen_on_a_gpu() -> None:
    done = run_forked(ON_GPU, gpu=virtual.VirtualGpu(memory_bytes=4 * 2**30))
    assert done.returncode == 0, done.stderr
    text = "expandable_segments:True,max_split_size_mb:64"
    assert json.loads(done.stdout) == [False, "as it comes", True, 64 << 20, text, 1, None, 2, "benchmark"]


def test_an_error_that_is_survived_leaves_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def nvmlInit(self) -> None:
            raise RuntimeError("driver on strike")

        nvmlShutdown = nvmlDeviceGetHandleByUUID = nvmlDeviceGetComputeRunningProcesses = nvmlInit

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        raise LookupError("the user's own mistake")

    with caplog.at_level(logging.DEBUG, logger="autoaccum"):
        assert "driver on strike" in see_device("GPU-0", library=Broken()).note
        work = Workload(nn.Linear(2, 2), (torch.zeros(8, 2), torch.zeros(8, dtype=torch.long)), loss=loss)
        assert "the test itself failed" in check.check(work, max_rows=8, isolated=False).words
    assert "NVML failed: RuntimeError: driver on strike" in caplog.text
    assert 'raise LookupError("the user\'s own mistake")' in caplog.text  # with its traceback
