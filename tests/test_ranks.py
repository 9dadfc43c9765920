"""What is sharded, or wrapped in part, is refused with the reason; a whole DistributedDataParallel is taken off."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_train import mlp, plan_for, vectors
from torch import nn

from autoaccum import Runner, UsageError, Workload, fit_plan
from autoaccum.exactness.check import check
from autoaccum.processes.fork import in_copy
from autoaccum.workload import default_loss


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp() -> nn.Module:
    return nn.parallel.DistributedDataParallel(mlp())


def ddp_inside() -> nn.Module:
    return nn.Sequential(mlp(), ddp())


def fsdp() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(mlp(), mesh=dist.init_device_mesh("cpu", (1,)))


def fsdp_inside() -> nn.Module:
    return nn.Sequential(mlp(), nn.Sequential(fsdp()))


def replicated() -> nn.Module:
    from torch.distributed._composable.replicate import replicate

    return replicate(mlp())


def tensor_parallel() -> nn.Module:
    from torch.distributed.tensor import distribute_module

    return distribute_module(mlp(), dist.init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (ddp_inside, "in its module '1', is DistributedDataParallel"),
        (fsdp, "FSDP2's fully_shard"),
        (fsdp_inside, "in its module '1.0', is fully sharded"),
        (replicated, "(replicate)"),
        (tensor_parallel, "0.weight of the model is a DTensor"),
    ],
)
def test_what_talks_to_ranks_is_refused_also_in_a_world_of_one(
    make: Callable[[], nn.Module], named: str, world_of_one: None
) -> None:
    plan = plan_for(Workload(mlp(), vectors(4)), 16, 4)
    work = Workload(make(), vectors(4))
    for use in (lambda: fit_plan(work, target_batch=16), lambda: Runner(work, plan), lambda: check(work)):
        with pytest.raises(UsageError) as refused:
            use()
        assert named in refused.value.what and refused.value.why and refused.value.hint


def test_a_wrapped_teacher_of_the_loss_is_refused(world_of_one: None) -> None:
    teacher = ddp()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return default_loss(model, batch) + (model(batch[0]) - teacher(batch[0]).detach()).square().mean()

    with pytest.raises(UsageError, match="The loss's module 'teacher' is DistributedDataParallel"):
        fit_plan(Workload(mlp(), vectors(4), loss=loss), target_batch=16)


@pytest.mark.parametrize("make", [mlp, ddp])
def test_a_world_of_one_trains_a_model_and_a_wrapped_one(make: Callable[[], nn.Module], world_of_one: None) -> None:
    work = Workload(make(), vectors(4))
    assert check(work).exact and fit_plan(work, target_batch=16, budget="4GiB", verify=False).parallel == "single"
    assert Runner(work, plan_for(Workload(mlp(), vectors(4)), 16, 4)).step(vectors(16)).samples == 16


def test_a_copy_leaves_alone_the_process_groups_that_it_inherited() -> None:
    """Their destructor joins threads, which a forked copy doesn't have: glibc kept the stacks of the first few only."""
    gc.disable()
    try:
        kept: list[Any] = []
        kept.append(kept)  # so that only a collection frees them
        for _ in range(4):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            kept.append(dist.group.WORLD)
            dist.destroy_process_group()
        del kept
        assert not in_copy(gc.isenabled) and not gc.isenabled()
        gc.enable()
        assert in_copy(lambda: gc.isenabled() and gc.collect() >= 0)
    finally:
        gc.enable()
        gc.collect()
