"""Planning in a process that has lived: holes in malloc's heap that tensors fit change neither method nor figures.

Such processes run this file as a program and print a line of JSON: holes would stay in the test's own process.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoaccum import DoesNotFit, Workload, fit_plan
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.process_memory import MMAP_THRESHOLD_BYTES, committed_bytes, glibc, read_heap

CPU = CpuDevice(torch.device("cpu"))
MIB = 1 << 20
CLASSES = 10_000

pytestmark = pytest.mark.skipif(glibc() is None, reason="malloc is not glibc's")


def tensors(sizes_mib: list[float]) -> list[torch.Tensor]:
    return [torch.empty(int(size * MIB) // 4) for size in sizes_mib]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def loss_at(model: nn.Module, samples: int) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(samples, 32)), torch.zeros(samples, dtype=torch.long))


def past(kind: str) -> list[torch.Tensor]:
    """What is left of a process's past: every other tensor of many, or what a training loop happened to keep."""
    if kind == "fresh":
        return []
    for size in range(1, 31):
        tensors([size])  # glibc's own threshold follows the largest block that is freed
    if kind == "loaded":
        return tensors([5, 30, 24, 8, 28, 11, 0.1, 0.2, 0.4, 0.15] * 5)[::2]
    model = network()
    optimizer, kept = torch.optim.AdamW(model.parameters()), []
    for samples in (100, 137, 211, 90, 250, 180):
        loss_at(model, samples).backward()
        optimizer.step()
        kept += tensors([0.2])
    return kept


def planned(model: nn.Module, room_mib: int, malloc: str) -> dict[str, Any]:
    work = Workload(model, (torch.randn(4, 32), torch.zeros(4, dtype=torch.long)))
    budget = committed_bytes() + room_mib * MIB
    try:
        plan = fit_plan(work, target_batch=600, budget=budget, check=False, timing_seconds=0, malloc=malloc)
    except DoesNotFit as error:
        return {"hint": error.hint}
    assert plan.measured_peak_bytes is not None
    off = plan.predicted_peak_bytes / plan.measured_peak_bytes - 1
    holes = [note for note in plan.notes if "are holes" in note]
    return {"method": plan.method, "split": plan.split, "off": off, "holes": holes}


def filling() -> dict[str, Any]:
    """Whether a large block goes into a hole while they are filled, and what filling and giving back takes."""
    before, committed = read_heap(), committed_bytes()
    with CPU.holes_filled(MMAP_THRESHOLD_BYTES) as filled_bytes, CPU.holes_filled(MMAP_THRESHOLD_BYTES) as more:
        taken = committed_bytes() - committed
        blocks = tensors([0.2, 3, 20])
        mapped = committed_bytes() - committed - taken
        del blocks
    with CPU.holes_filled(None) as nothing:
        left = read_heap().free_bytes - before.free_bytes
    return {"filled": filled_bytes, "more": more, "taken": taken, "mapped": mapped, "left": left, "nothing": nothing}


def main(kind: str, malloc: str, only: str) -> None:
    kept, model = past(kind), network()
    loss_at(model, 9).backward()  # its gradients lie in the heap, too, and planning frees them
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    CPU.prepare(malloc)
    found: dict[str, Any] = {"kept": len(kept)}
    if not only:
        found |= {"filling": filling(), "plan": planned(model, 400, malloc)}
    found["tight"] = planned(network(), 1, malloc)
    found["gradients"] = all(
        torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True) if p.grad is not None
    )
    print(json.dumps(found))


@functools.cache
def process(kind: str, malloc: str = "fixed", only: str = "") -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, kind, malloc, only], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_holes_are_filled_without_a_page_from_the_system_and_given_back() -> None:
    found = process("loaded")["filling"]
    assert found["filled"] > 100 * MIB
    assert found["taken"] == found["more"] == found["nothing"] == 0 and abs(found["left"]) < MIB
    assert found["mapped"] >= 23.2 * MIB, "a block went into a hole"


@pytest.mark.parametrize(
    "kind", ["loaded", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("trained", "fresh"))]
)
@pytest.mark.slow
def test_a_used_process_is_planned_by_replay(kind: str) -> None:
    found = process(kind)
    plan = found["plan"]
    assert plan["method"] == "replayed" and plan["split"] == [600] and found["gradients"]
    assert abs(plan["off"]) < 0.03  # planning's own objects are in the prediction
    assert bool(plan["holes"]) == (kind != "fresh")
    assert kind == "fresh" or "restart the kernel" in plan["holes"][0]


@pytest.mark.slow
def test_the_page_cache_uses_no_hole_and_needs_none_filled() -> None:
    found = process("loaded", "cached")
    plan, filled = found["plan"], found["filling"]
    assert plan["method"] == "replayed" and plan["split"] == [600] and found["gradients"]
    assert abs(plan["off"]) < 0.03 and not plan["holes"] and filled["filled"] == filled["taken"] == 0
    assert filled["mapped"] >= 23.2 * MIB, "a block went into a hole"


@pytest.mark.parametrize("kind", ["loaded", pytest.param("fresh", marks=pytest.mark.slow)])
def test_where_nothing_fits_beside_holes_a_new_process_is_advised(kind: str) -> None:
    found = process(kind, only="tight")
    assert ("a new process, without the" in found["tight"]["hint"]) == (kind != "fresh") and found["gradients"]


if __name__ == "__main__":
    main(*sys.argv[1:])
