"""Cases of `tests/test_sharded_training.py`, run by every rank of a group (tests/rank_groups.py)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers_train import Capture, distance, gradients, mlp, pad, sequence, tagger, token_count, vectors
from rank_cases import UNEVEN, rows, runner_for, token_mean, tokens
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import Runner, UsageError, Workload, fit_plan
from autoaccum.ranks.shares import slice_of
from autoaccum.workload import default_loss

__all__ = ["pad", "sequence"]


def sharded(model: nn.Module, **how: Any) -> nn.Module:
    for child in model.children():
        if sum(p.numel() for p in child.parameters()):
            fully_shard(child, **how)
    return fully_shard(model, **how)


def full(tensors: Any) -> list[torch.Tensor]:
    return [each.full_tensor() for each in tensors]


def trained(rank: int, make: Any, batch: Any, splits: Any, loss: Any = None, steps: int = 3, **how: Any) -> Any:
    """Train windows, each rank with its share; the worst distance from one process with the whole batch."""
    policy = how.pop("mp_policy", MixedPrecisionPolicy())
    twin, model = make(), sharded(make(), mp_policy=policy)
    after = how.pop("after", lambda model: None)
    after(model)
    optimizer = Capture(model.parameters(), lr=0.1)
    work = Workload(model, rows(batch, slice(0, 4)), loss=loss, optimizer=optimizer, **how)
    runner = runner_for(work, splits, rank)
    part = slice_of(tuple(map(sum, splits)), rank)
    worst, results = 0.0, []
    for _ in range(steps):
        expected = gradients(copy.deepcopy(twin), loss or default_loss, batch)
        with torch.no_grad():
            whole = float((loss or default_loss)(twin, batch))
        results.append(runner.step(rows(batch, part)))
        worst = max(worst, distance(full(optimizer.seen[-1]), expected), abs(float(results[-1].loss) / whole - 1))
        with torch.no_grad():
            for p, gradient in zip(twin.parameters(), expected, strict=True):
                p.sub_(gradient, alpha=0.1)
    return {"worst": worst, "samples": results[-1].samples, "split": results[-1].split}


def unequal_steps(rank: int, world: int) -> Any:
    """48 and 16 samples in 6 and 2 micro-batches: the second rank runs 6, four of them for nothing."""
    return trained(rank, mlp, vectors(64), UNEVEN[world])


def mean_of_samples(rank: int, world: int) -> Any:
    loss = lambda model, batch: (model(batch[0]).square().sum(1) * batch[0][:, 0]).mean()  # noqa: E731
    return trained(rank, mlp, vectors(64), UNEVEN[world], loss)


def ragged_tokens(rank: int, world: int) -> Any:
    return trained(rank, tagger, tokens(64), UNEVEN[world], token_mean, count=token_count)


def a_share_that_is_all_ignored(rank: int, world: int) -> Any:
    """From the second window on: in the first, each rank needs a batch that counts."""
    model = sharded(tagger())
    optimizer = Capture(model.parameters(), lr=0.0)
    batch = tokens(64)
    part = slice_of(tuple(map(sum, UNEVEN[world])), rank)
    work = Workload(model, rows(batch, slice(0, 4)), loss=token_mean, optimizer=optimizer, count=token_count)
    runner = runner_for(work, UNEVEN[world], rank)
    runner.step(rows(batch, part))
    batch["labels"][slice_of(tuple(map(sum, UNEVEN[world])), 1)] = -100
    runner.step(rows(batch, part))
    return {"worst": distance(full(optimizer.seen[-1]), gradients(tagger(), token_mean, batch))}


def a_factor_that_was_set(rank: int, world: int) -> Any:
    def after(model: nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    return trained(rank, mlp, vectors(64), UNEVEN[world], after=after)


def in_bf16(rank: int, world: int) -> Any:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    return trained(rank, lambda: mlp(torch.float32), vectors(64, torch.float32), UNEVEN[world], mp_policy=policy)


def clipped_epochs(rank: int, world: int) -> Any:
    """Two epochs of 37 samples in windows of 16, clipped, by AdamW: the last window is one of 5."""
    data = vectors(37)
    twin, model = mlp(), sharded(mlp())
    adamw = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # noqa: E731
    work = Workload(model, rows(data, slice(0, 4)), optimizer=adamw(model.parameters()), clip_grad_norm=0.05)
    runner = runner_for(work, ((3, 3, 2), (3, 3, 2)), rank)
    loader = DataLoader(TensorDataset(*data), batch_size=4)
    norms = [float(result.grad_norm) for _ in range(2) for result in runner.epoch(loader)]
    optimizer, expected = adamw(twin.parameters()), []
    for _ in range(2):
        for start in range(0, 37, 16):
            optimizer.zero_grad()
            default_loss(twin, rows(data, slice(start, start + 16))).backward()
            expected.append(float(nn.utils.clip_grad_norm_(twin.parameters(), 0.05)))
            optimizer.step()
    worst = max(abs(a / b - 1) for a, b in zip(norms, expected, strict=True))
    return {"worst": max(worst, distance(full(model.parameters()), list(twin.parameters())) / 100)}


def refused(rank: int, world: int) -> Any:
    """Factors that differ, a scaler, and shares that aren't equal."""
    said = []
    model = sharded(mlp())
    model[0].set_gradient_divide_factor(3.0)
    for work in (
        Workload(model, vectors(4)),
        Workload(sharded(mlp()), vectors(4), scaler=torch.amp.GradScaler("cpu")),
    ):
        try:
            fit_plan(work, target_batch=16, budget="6GiB")
        except UsageError as error:
            said.append(error.what)
    try:
        fit_plan(Workload(sharded(mlp()), vectors(4)), target_batch=16, budget="6GiB", shares=(10, 6))
    except UsageError as error:
        said.append(error.what)
    return {"said": said}


def planned_together(rank: int, world: int) -> Any:
    """A plan of all ranks, which leaves the model as it was; then windows that are exact."""
    batch = vectors(17)
    twin, model = mlp(), sharded(mlp())
    before = [p.to_local().clone() for p in model.parameters()]
    optimizer = Capture(model.parameters(), lr=0.1)
    work = Workload(model, rows(batch, slice(0, 4)), optimizer=optimizer)
    plan = fit_plan(work, target_batch=17, budget="6GiB", max_micro_batch=3)
    same = all(torch.equal(p.to_local(), was) for p, was in zip(model.parameters(), before, strict=True))
    optimizer.seen.clear()
    Runner(work, plan, timeout_seconds=30.0).step(rows(batch, slice_of(plan.shares, rank)))
    return {
        "same": same,
        "parallel": plan.parallel,
        "shares": plan.shares,
        "splits": [entry.split for entry in plan.ranks],
        "own": plan.split,
        "exactness": plan.exactness,
        "verified": plan.verified,
        "worst": distance(full(optimizer.seen[-1]), gradients(twin, default_loss, batch)),
    }
