"""Lanes on CUDA, by the real allocator of a virtual GPU: what they plan, reserve, and keep on the host."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from autoaccum import DoesNotFit, Runner, Workload, fit_plan
from autoaccum.devices.virtual import VirtualGpu, available, launch

REASON = available()
GIB = 2**30
TARGET, PIXELS = 128, 48


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", ["a_runner_reserves_what_was_planned", "a_small_host_is_refused"])
def test_on_a_virtual_gpu(name: str) -> None:
    gpu = VirtualGpu(memory_bytes=4 * GIB)
    process = launch([sys.executable, __file__, name], gpu, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode()[-3000:]


def workload() -> Workload:
    """A net whose activations are much more than its weights, on the GPU."""
    layers: list[nn.Module] = []
    for channels in (3, 32, 32, 32, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).cuda()
    sample = torch.zeros(4, 3, PIXELS, PIXELS), torch.zeros(4, dtype=torch.long)
    return Workload(model, sample, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), batchnorm="exact")


def a_runner_reserves_what_was_planned() -> None:
    work = workload()
    plan = fit_plan(work, target_batch=TARGET, budget=GIB * 3 // 4, check=False)
    assert plan.accumulation_steps > 1 and plan.method == "bracketed"
    assert plan.memory.host_bytes > 0 and "pinned buffers" in str(plan)
    runner = Runner(work, plan)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = torch.zeros(TARGET, 3, PIXELS, PIXELS), torch.zeros(TARGET, dtype=torch.long)
    for _ in range(2):
        assert runner.step(batch).retries == 0
    reserved, planned = torch.cuda.max_memory_reserved(), plan.predicted_peak_bytes
    assert abs(reserved - planned) <= 0.02 * planned, (reserved, planned)
    store = runner.context.host_store
    assert store is not None and store.bytes == plan.memory.host_bytes


def a_small_host_is_refused() -> None:
    try:
        fit_plan(workload(), target_batch=TARGET, budget=GIB * 3 // 4, check=False, host_memory="100MiB")
    except DoesNotFit as error:
        assert "more than 100.0 MiB on the host" in str(error), error
        return
    raise AssertionError("it was planned")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
