"""Lanes on CUDA, by the real allocator of a virtual GPU: what they plan, reserve, and keep on the host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stream_races import Races
from torch import nn

from autoaccum import DoesNotFit, Plan, Runner, UsageError, Workload, fit_plan, gather_window
from autoaccum.devices.registry import get_device
from autoaccum.devices.virtual import VirtualGpu, available, launch
from autoaccum.units import show_bytes
from autoaccum.window.lanes import host_store
from autoaccum.window.step import open_context, train_window
from benchmarks.lanes import memory

REASON = available()
GIB = 2**30
TARGET, PIXELS = 128, 48


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(
    "name",
    [
        "a_runner_reserves_what_was_planned",
        "so_it_does_in_three_lanes",
        "so_it_does_where_rows_are_gathered",
        "what_fits_the_device_stays_there",
        "what_stays_moves_after_an_out_of_memory",
        "a_small_host_is_refused",
        "a_small_host_takes_more_lanes",
        "copies_wait_and_are_waited_for",
        "what_was_copied_comes_back",
        "it_is_planned_without_running_it",
        "what_is_not_regular_is_run_instead",
        "nothing_is_computed_again_where_that_spares_nothing",
    ],
)
def test_on_a_virtual_gpu(name: str) -> None:
    gpu = VirtualGpu(memory_bytes=4 * GIB)
    process = launch([sys.executable, __file__, name], gpu, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode()[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", memory.CASES)
def test_six_models_reserve_what_was_planned(name: str) -> None:
    found = memory.compare(name)
    plan = found["plan"]
    assert plan.accumulation_steps > 1 and plan.method == "replayed", plan.notes
    assert abs(found["reserved"] - plan.predicted_peak_bytes) <= 0.02 * plan.predicted_peak_bytes
    assert not any(found["retries"][2:]) and found["host"] == plan.memory.host_bytes > 0


def workload(*more: nn.Module) -> Workload:
    """A net whose activations are much more than its weights, on the GPU."""
    layers: list[nn.Module] = []
    for channels in (3, 32, 32, 32, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*layers, *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).cuda()
    sample = torch.zeros(4, 3, PIXELS, PIXELS), torch.zeros(4, dtype=torch.long)
    return Workload(model, sample, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), batchnorm="exact")


def a_runner_reserves_what_was_planned() -> None:
    work = workload()
    plan = fit_plan(work, target_batch=TARGET, budget=GIB * 3 // 4, check=False)
    assert plan.accumulation_steps > 1 and plan.method == "replayed"
    memory = plan.memory
    assert memory.host_bytes > 0 and "pinned buffers" in str(plan)
    assert memory.recomputes and f"{show_bytes(memory.recomputed_bytes)} are computed again" in str(plan)
    assert memory.spared_bytes > memory.moved_bytes / 2 and show_bytes(memory.spared_bytes) in str(plan)
    reserves_what_was_planned(work, plan)


def so_it_does_in_three_lanes() -> None:
    work = workload()
    plan = fit_plan(work, target_batch=TARGET, budget=GIB * 620 // 1024, check=False)
    assert plan.accumulation_steps == 3 and plan.method == "replayed", plan
    reserves_what_was_planned(work, plan)


def what_fits_the_device_stays_there() -> None:
    moved = []
    for mib in (700, 760, 820):
        work = workload()
        plan = fit_plan(work, target_batch=TARGET, budget=mib << 20, max_micro_batch=TARGET // 4, check=False)
        memory = plan.memory
        assert plan.accumulation_steps == 4 and plan.method == "replayed", plan
        assert memory.moved_parts is not None and memory.stayed_bytes > 0, plan
        assert f"{show_bytes(memory.stayed_bytes)} of it stays on the device" in str(plan)
        assert plan.predicted_peak_bytes <= 0.98 * (mib - 512 << 20)
        reserves_what_was_planned(work, plan)
        moved.append((memory.moved_bytes, memory.moved_bytes + memory.stayed_bytes))
    (first, whole), (second, other), (third, another) = moved
    assert first > second > third and whole == other == another, moved


def what_stays_moves_after_an_out_of_memory() -> None:
    work = workload()
    plan = fit_plan(work, target_batch=TARGET, budget=800 << 20, max_micro_batch=TARGET // 4, check=False)
    assert plan.memory.stayed_bytes > 0
    runner = Runner(work, plan)
    torch.cuda.empty_cache()
    room = plan.predicted_peak_bytes - (32 << 20)  # of which the model has its part already
    taken = torch.empty(torch.cuda.mem_get_info()[0] - room, dtype=torch.uint8).cuda()
    batch = torch.zeros(TARGET, 3, PIXELS, PIXELS), torch.zeros(TARGET, dtype=torch.long)
    results = [runner.step(batch) for _ in range(2)]
    assert [each.retries for each in results] == [1, 0] and results[1].split == plan.split
    store = runner.context.host_store
    assert store is not None and store.saved_bytes == plan.memory.moved_bytes + plan.memory.stayed_bytes
    del taken


def so_it_does_where_rows_are_gathered() -> None:
    work = two_towers(lambda: [nn.GroupNorm(4, 32), nn.ReLU()])
    plan = fit_plan(work, target_batch=512, budget=900 << 20, check=False)
    assert plan.accumulation_steps > 1 and plan.method == "replayed" and plan.memory.recomputes, plan
    reserves_what_was_planned(work, plan, (torch.zeros(512, 3, PIXELS, PIXELS),) * 2)


def nothing_is_computed_again_where_that_spares_nothing() -> None:
    work = two_towers(lambda: [nn.Tanh()])  # its result is saved, and what it follows from isn't
    plan = fit_plan(work, target_batch=512, budget=900 << 20, check=False)
    assert plan.accumulation_steps > 1 and plan.method == "replayed", plan
    memory = plan.memory
    assert not memory.recomputes and memory.recomputed_bytes == memory.spared_bytes == 0 < memory.moved_bytes, plan
    reserves_what_was_planned(work, plan, (torch.zeros(512, 3, PIXELS, PIXELS),) * 2)


def two_towers(between: Callable[[], list[nn.Module]]) -> Workload:
    """Two towers of convolutions, and a loss of all pairs of the window, in each lane."""

    def tower() -> list[nn.Module]:
        layers: list[nn.Module] = []
        for channels in (3, 32, 32, 32):
            layers += [nn.Conv2d(channels, 32, 3, padding=1, bias=False), *between()]
        return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64)]

    def contrastive(model: nn.ModuleList, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        one, other = (gather_window(each(rows)) for each, rows in zip(model, batch, strict=True))
        logits = one @ other.T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    model = nn.ModuleList([nn.Sequential(*tower()), nn.Sequential(*tower())]).cuda()
    return Workload(
        model, (torch.zeros(4, 3, PIXELS, PIXELS),) * 2, loss=contrastive, batch_interactions="exact",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    )  # fmt: skip


def reserves_what_was_planned(work: Workload, plan: Plan, batch: Any = None) -> None:
    runner = Runner(work, plan)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = batch or (torch.zeros(TARGET, 3, PIXELS, PIXELS), torch.zeros(TARGET, dtype=torch.long))
    for _ in range(2):
        assert runner.step(batch).retries == 0
    reserved, planned = torch.cuda.max_memory_reserved(), plan.predicted_peak_bytes
    assert abs(reserved - planned) <= 0.02 * planned, (reserved, planned)
    store = runner.context.host_store
    assert store is not None and store.bytes == plan.memory.host_bytes
    assert store.saved_bytes == plan.memory.moved_bytes
    assert store.recomputation.bytes == plan.memory.recomputed_bytes


def it_is_planned_without_running_it() -> None:
    run = fit_plan(workload(), target_batch=TARGET, budget=GIB * 3 // 4, check=False)
    plan = fit_plan(workload(), target_batch=TARGET, budget=GIB * 3 // 4, check=False, verify=False)
    assert plan.measured_peak_bytes is None and plan.method == run.method == "replayed"
    assert plan.memory.moved_parts == run.memory.moved_parts and plan.memory.moved_bytes == run.memory.moved_bytes
    assert plan.split == run.split and plan.memory.phases == run.memory.phases  # those of a new process
    assert plan.memory.host_bytes == run.memory.host_bytes


class Chunks(nn.Module):
    """Works on three samples at a time: on more of them it makes more blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([2 * chunk for chunk in x.split(3)])


def what_is_not_regular_is_run_instead() -> None:
    work = workload(Chunks())
    plan = fit_plan(work, target_batch=TARGET, budget=GIB * 3 // 4, check=False)
    assert plan.accumulation_steps > 1 and plan.method == "bracketed"
    assert "could not be predicted" in str(plan) and plan.memory.moved_bytes_per_sample is None
    try:
        fit_plan(work, target_batch=TARGET, budget=GIB * 3 // 4, check=False, verify=False)
    except UsageError as error:
        assert "isn't predicted" in str(error), error
        return
    raise AssertionError("it was planned")


def a_small_host_is_refused() -> None:
    try:
        fit_plan(workload(), target_batch=TARGET, budget=GIB * 3 // 4, check=False, host_memory="100MiB")
    except DoesNotFit as error:
        assert "more than 100.0 MiB on the host" in str(error), error
        return
    raise AssertionError("it was planned")


def a_small_host_takes_more_lanes() -> None:
    samples = 2 * TARGET
    work, asked = workload(), {"target_batch": samples, "budget": 974 << 20, "check": False}
    plain = fit_plan(work, **asked)
    plan = fit_plan(work, **asked, host_memory="300MiB")
    assert plain.memory.host_bytes > 300 << 20 >= plan.memory.host_bytes > 0, (plain, plan)
    assert plan.accumulation_steps > plain.accumulation_steps and plan.method == "replayed", (plain, plan)
    assert plan.memory.stayed_bytes > plain.memory.stayed_bytes and "the host may not hold the rest" in str(plan)
    batch = torch.zeros(samples, 3, PIXELS, PIXELS), torch.zeros(samples, dtype=torch.long)
    reserves_what_was_planned(work, plan, batch)


def copies_wait_and_are_waited_for() -> None:
    work = workload()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_device(torch.device("cuda", 0)), "computes", True)  # so that tensors are copied
        patch.setattr(host_store, "THRESHOLD_BYTES", 1 << 16)
        context = open_context(work)
        sizes = (6, 4, 5)
        pieces = [(torch.zeros(size, 3, 16, 16), torch.zeros(size, dtype=torch.long)) for size in sizes]
        with Races(patch) as races:
            for _ in range(2):
                train_window(context, pieces, sizes)
    store = context.host_store
    assert store is not None and len(store.moved) > 20 and store.late <= 1
    assert len(races.computing) == 1 and len(races.copies - races.computing) == 1
    assert not races.found, races.found


def what_was_copied_comes_back() -> None:
    store, found = host_store.HostStore(torch.device("cuda", 0), None), []
    shapes = ((4, 8, 256, 256), (2, 1 << 20), (3, 700, 513))
    for _ in range(2):
        store.begin(())
        host = [torch.randn(shape) for shape in shapes]
        host[0] = host[0].to(memory_format=torch.channels_last)
        tensors = [each.cuda().requires_grad_() for each in host]
        with store.moving(4):
            outs = [tensor.square() for tensor in tensors]
        nodes = [out.grad_fn for out in outs]
        for node, tensor in zip(nodes, tensors, strict=True):
            with torch.no_grad():
                tensor.data.zero_()
            found.append(node._saved_self.cpu())  # type: ignore[union-attr]
        assert len(store.moved) == len(shapes)
        assert all(torch.equal(one, other) for one, other in zip(found[-len(shapes) :], host, strict=True))
        assert found[-len(shapes)].is_contiguous(memory_format=torch.channels_last)
        store.end()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
