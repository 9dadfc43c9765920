"""Samples that belong together are never cut apart, and what compares them within a group is exact."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP64,
    Capture,
    Rows,
    distance,
    gradients,
    one_thread,  # noqa: F401
    seen,
)
from torch import nn
from torch.utils.data import DataLoader

from autoaccum import BatchError, Plan, PlanMismatch, Runner, UsageError, Workload, fit_plan, windows
from autoaccum.data.groups import Grouped, group_sizes
from autoaccum.exactness.check import check
from autoaccum.tuning import tasks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def triplets(m: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """An anchor, one like it and one unlike it, behind one another."""
    anchor, near, far = m(batch).unflatten(0, (-1, 3)).unbind(1)
    return F.triplet_margin_loss(anchor, near, far)


def advantages(m: nn.Module, batch: Any) -> torch.Tensor:
    """Four generations of a prompt, each reward relative to its group's, as in GRPO."""
    reward = batch["reward"].unflatten(0, (-1, 4))
    advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
    return -(m(batch["x"]).logsumexp(1) * advantage.flatten()).mean()


def prompts(n: int) -> dict[str, torch.Tensor]:
    return {"x": rows(n), "reward": rows(n)[:, 0].sigmoid()}


def work_of(size: int, **more: Any) -> Workload:
    loss, batch = (triplets, rows) if size == 3 else (advantages, prompts)
    return Workload(
        network(), batch(4 * size), **{"loss": loss, "optimizer": Capture, "samples_per_group": size, **more}
    )


def planned(work: Workload, target: int, most: int, **how: Any) -> Plan:
    how = {"budget": "4GiB", "verify": False, "check": False} | how
    return fit_plan(work, target_batch=target, max_micro_batch=most, **how)


@pytest.mark.parametrize(
    ("size", "target", "most", "split"),
    [
        (3, 30, 12, (12, 9, 9)),
        (4, 40, 12, (12, 12, 8, 8)),
        (4, 40, 4, (4,) * 10),
        pytest.param(4, 8, 99, (8,), marks=pytest.mark.slow),
    ],
)
def test_every_size_is_of_whole_groups_and_the_gradient_the_whole_batchs(
    size: int, target: int, most: int, split: tuple[int, ...]
) -> None:
    work = work_of(size)
    plan = planned(work, target, most)
    assert plan.split == split and plan.target_batch == target == sum(plan.split)
    assert all(row.micro_batch % size == 0 for row in plan.memory.peaks)
    assert Plan.from_json(plan.to_json()) == plan and plan.request.samples_per_group == size
    runner = Runner(work, plan)
    batch = rows(target) if size == 3 else prompts(target)
    runner.step(batch)
    assert distance(seen(runner)[0], gradients(network(), work.loss, batch)) < FP64  # type: ignore[arg-type]


def test_the_tail_of_an_epoch_and_an_out_of_memory_keep_groups_whole() -> None:
    work = work_of(3)
    runner = Runner(work, planned(work, 12, 6))
    assert [result.split for result in runner.epoch([rows(33)])] == [(6, 6), (6, 6), (6, 3)]
    failures = iter([True, False])
    inner = runner.context.loss

    def failing(m: nn.Module, b: Any) -> torch.Tensor:
        if len(b) > 3 and next(failures, False):
            raise torch.OutOfMemoryError("out of memory")
        return inner(m, b)  # type: ignore[no-any-return]

    runner.context.loss = failing
    result = runner.step(rows(12))
    assert result.retries == 1 and result.split == (3, 3, 3, 3)
    assert distance(seen(runner)[-1], gradients(network(), triplets, rows(12))) < FP64
    assert group_sizes(8, 3, lambda groups: (groups,)) == (6, 2)


def test_the_test_of_exactness_and_verification_keep_groups_whole() -> None:
    verdict = check(work_of(4), isolated=False)
    assert verdict.exact, verdict
    assert not check(work_of(4, samples_per_group=1), isolated=False).exact
    plan = planned(work_of(4), 40, 12, verify=True, check=True, timing_seconds=0)
    assert plan.verified and plan.exactness.startswith("exact (tested on 8 groups of 4")
    assert any("groups of 4" in note for note in plan.notes)


def test_rows_of_groups_lie_behind_one_another() -> None:
    assert Grouped(rows(12), 4).indices([2, 0]) == [8, 9, 10, 11, 0, 1, 2, 3]


def test_a_dataset_is_looked_at_in_whole_groups() -> None:
    data = Rows([{"x": x, "reward": x[0].sigmoid()} for x in rows(40)])
    loader = DataLoader(data, batch_size=8)
    work = replace(work_of(4), sample=None, loader=loader)
    runner = Runner(work, planned(work, 16, 8))
    assert [result.split for result in runner.epoch(loader)] == [(8, 8), (8, 8), (8,)]
    batch = {"x": rows(40)[:16], "reward": rows(40)[:16, 0].sigmoid()}
    assert distance(seen(runner)[0], gradients(network(), advantages, batch)) < FP64


def test_what_would_take_groups_apart_is_refused() -> None:
    work = work_of(4)
    with pytest.raises(UsageError, match=r"target_batch is 30, and a group has 4 samples"):
        planned(work, 30, 12)
    with pytest.raises(UsageError, match=r"Give max_micro_batch=4"):
        planned(work, 40, 3)
    shuffled = DataLoader(Rows(list(rows(8))), shuffle=True)
    with pytest.raises(UsageError, match="shuffles single samples"):
        planned(replace(work, loader=shuffled), 40, 12)
    with pytest.raises(UsageError, match="lengths="):
        planned(replace(work, lengths=[6] * 8), 40, 12)
    with pytest.raises(UsageError, match="samples_per_group is 0"):
        planned(replace(work, samples_per_group=0), 40, 12)
    plan = planned(work, 40, 12)
    with pytest.raises(PlanMismatch, match="groups of 4"):
        Runner(replace(copy.copy(work), samples_per_group=1), plan)


class OfPlaces(nn.Module):
    """Two outputs for sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.inner(batch).tanh().sum(1)


def pairs(m: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return m(batch).unflatten(0, (-1, 2)).diff(dim=1).square().mean()


def padded(*sizes: int) -> list[torch.Tensor]:
    """Batches of unlike lengths, which can't be joined."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3 + size % 4, 2, generator=g, dtype=torch.float64) for size in sizes]


def test_a_loader_that_would_take_groups_apart_is_refused_when_it_is_given() -> None:
    """Not the workload's own, but the one that is trained; batches of a stream that end within a group."""
    work = work_of(4)
    plan = planned(work, 16, 8)
    shuffled = DataLoader(Rows([{"x": x, "reward": x[0].sigmoid()} for x in rows(32)]), batch_size=8, shuffle=True)
    with pytest.raises(UsageError, match="shuffles single samples"):
        next(iter(Runner(work, plan).epoch(shuffled)))
    with pytest.raises(UsageError, match="shuffles single samples"):
        windows(shuffled, plan)
    work = Workload(OfPlaces(), padded(7)[0][:4], loss=pairs, optimizer=Capture, samples_per_group=2)
    plan = planned(work, 8, 4)
    runner = Runner(work, plan)
    assert [r.split for r in runner.epoch(padded(6, 4, 6))] == [(4, 2, 2), (2, 4, 2)]
    with pytest.raises(BatchError, match="ends within a group of 2 samples"):
        list(runner.epoch(padded(5, 4)))
    with pytest.raises(BatchError, match="ends within a group of 2 samples"):
        for window in windows(padded(5, 4), plan):
            for micro in window:
                window.backward(pairs(runner.context.model, micro.batch))
            window.step(runner.context.optimizer)
    same = [batch for whole in padded(6) for batch in whole.split(3)]  # joined, for they have one shape
    assert [r.split for r in runner.epoch(same)] == [(4, 2)]
    bad: Any = [padded(3)[0], {"broken": 1}, padded(3)[0], padded(2)[0]]
    with pytest.raises(BatchError):
        found = runner.epoch(bad)
        next(found)
    assert list(found) == []  # where the next group begins isn't known


def test_tune_refuses_groups_by_name() -> None:
    with pytest.raises(UsageError, match="groups of 3, which tune doesn't support"):
        tasks._changed(ExitStack(), work_of(3), None, {})


PAIRS = """
import torch
from torch import nn
from autoaccum import Workload

def workload():
    pairs = lambda m, b: m(b).unflatten(0, (-1, 2)).diff(dim=1).square().mean()
    return Workload(nn.Linear(4, 4), torch.randn(8, 4), loss=pairs, optimizer="sgd", samples_per_group=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bench", "tune"])
def test_the_commands_refuse_groups_by_name(command: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(PAIRS)
    args = [command, "--workload", "pairs.py", "--target-batch", "8", "--memory", "2GiB"]
    done = subprocess.run([sys.executable, "-m", "autoaccum", *args], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"groups of 2, which {command} doesn't support" in done.stderr, done.stderr
