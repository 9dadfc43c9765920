"""Models that FSDP2 shards or DDP wraps, on a group whose other ranks aren't here: planned, and left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autoaccum import Plan, UsageError, Workload, fit_plan
from autoaccum.exactness.check import check
from autoaccum.ranks import sharded
from autoaccum.ranks.group import absent_allowed
from autoaccum.ranks.shard_sizes import sizes_on
from autoaccum.ranks.torch_internals import gradient_divisors, has_begun, open_fake_group
from autoaccum.torch_compat import local_bytes, local_tensors
from autoaccum.window.forward_only import forward_only
from autoaccum.window.step import open_context, run_between

RANKS = 3
SAMPLE = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


@pytest.fixture
def absent_ranks() -> Iterator[None]:
    """Rank 1 of three; 32 rows on three ranks, so that shards are padded."""
    open_fake_group(1, RANKS)
    yield
    dist.destroy_process_group()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(nn.Linear(8, 32), *blocks, nn.Linear(32, 5))


def needs_fsdp_on_cpu() -> None:
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__}: FSDP2 doesn't run on a CPU (torch.cpu.Stream has no record_event)")


def fsdp(**how: Any) -> nn.Module:
    needs_fsdp_on_cpu()
    model = net()
    for block in model[1:3]:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def ddp(**how: Any) -> nn.Module:
    return DistributedDataParallel(net(), **how)


def state(model: nn.Module) -> list[torch.Tensor]:
    return [part.clone() for each in model.state_dict().values() for part in local_tensors(each)]


def output(model: nn.Module) -> torch.Tensor:
    """A forward in evaluation, as a loop's: its root stays gathered."""
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(SAMPLE[0])
    model.train()
    return found


def plan(model: nn.Module, **how: Any) -> Plan:
    how = {"target_batch": 48, "budget": "6GiB", "timing_seconds": 0} | how
    return fit_plan(Workload(model, SAMPLE, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1)), **how)


BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "make", [fsdp, ddp, pytest.param(lambda: fsdp(mp_policy=BF16), marks=pytest.mark.slow)], ids=["fsdp", "ddp", "bf16"]
)
def test_planning_leaves_a_spread_model_as_it_was(make: Any, absent_ranks: None) -> None:
    model = make()
    before, expected = state(model), output(model)
    found = plan(model)
    assert found.world_size == RANKS and found.target_batch == 48 and sum(found.split) == 16
    assert "not here" in found.exactness and found.exactness.startswith("unknown")
    for tensor, was in zip(state(model), before, strict=True):
        assert torch.equal(tensor, was)
    assert torch.equal(output(model), expected)
    with sharded.unreduced(model):
        F.cross_entropy(model(SAMPLE[0]), SAMPLE[1]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_user_s_own_gradients_and_optimizer_survive_sharded(absent_ranks: None) -> None:
    model = fsdp()
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(SAMPLE[0]), SAMPLE[1]).backward()
    optimizer.step()
    gradients = [local_tensors(p.grad)[0] for p in model.parameters() if p.grad is not None]
    copies = [each.clone() for each in gradients]
    moments = [local_tensors(each["exp_avg"])[0].clone() for each in optimizer.state.values()]
    fit_plan(Workload(model, SAMPLE, optimizer=optimizer), target_batch=48, budget="6GiB", timing_seconds=0)
    assert [local_tensors(p.grad)[0] is g for p, g in zip(model.parameters(), gradients, strict=True)]
    assert all(same_bits(now, was) for now, was in zip(gradients, copies, strict=True))
    after = [local_tensors(each["exp_avg"])[0] for each in optimizer.state.values()]
    assert after and all(same_bits(now, was) for now, was in zip(after, moments, strict=True))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """By bits: what ranks that aren't here would have sent is whatever lay in memory, NaN included."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_bytes_are_those_of_this_rank(absent_ranks: None) -> None:
    model = fsdp()
    weight = model.get_parameter("1.0.weight")
    assert weight.nbytes == 32 * 32 * 4 and local_bytes(weight) == 11 * 32 * 4
    assert local_bytes(nn.Parameter(torch.zeros(3))) == 12


def made_of_shards(model: nn.Module, ranks: int) -> list[int]:
    """Bytes of each padded shard, and of the blocks that each sharded module gathers and reduces, in bf16 and fp32."""
    found = []
    for module in sharded.sharded_modules(model):
        inner = {id(p) for m in sharded.sharded_modules(module)[1:] for p in m.parameters()}
        own = [p for p in module.parameters() if id(p) not in inner]
        rows = [-(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) for p in own]
        found += [4 * each for each in rows]
        found += [width * sum(rows) * parts for width in (2, 4) for parts in (1, ranks)]
    return found


def test_sizes_on_other_ranks_are_those_of_a_model_that_is_sharded_there(absent_ranks: None) -> None:
    model = fsdp()
    shards = [local_tensors(p)[0].untyped_storage().nbytes() for p in model.parameters()]
    here = made_of_shards(model, RANKS)
    sizes = sizes_on(model, 7)
    dist.destroy_process_group()
    open_fake_group(0, 7)
    there = fsdp()
    assert [sizes.gathered.get(each) or sizes.shards[each] for each in here] == made_of_shards(there, 7)
    assert [sizes.shards[s] for s in shards] == [
        local_tensors(p)[0].untyped_storage().nbytes() for p in there.parameters()
    ]


def test_a_forward_that_trains_nothing_leaves_shards_alone(absent_ranks: None) -> None:
    with absent_allowed():
        context = open_context(Workload(fsdp(), SAMPLE))
    forward_only(context, lambda: context.model(SAMPLE[0]))
    assert all(isinstance(p, DTensor) for p in context.model.parameters())
    context.between_steps = output
    run_between(context)
    assert all(isinstance(p, DTensor) for p in context.model.parameters())


def test_only_planning_accepts_ranks_that_are_not_here(absent_ranks: None) -> None:
    work = Workload(net(), SAMPLE)
    with pytest.raises(UsageError) as refused:
        open_context(Workload(net(), SAMPLE))  # as the Runner does
    assert "fake" in refused.value.what and "nccl or gloo" in (refused.value.hint or "")
    verdict = check(work)
    assert verdict.kind == "unknown" and "not here" in verdict.words
    with pytest.raises(UsageError, match="4 ranks"):
        fit_plan(work, target_batch=48, world_size=4)


def test_an_unfinished_window_leaves_nothing_behind(absent_ranks: None) -> None:
    model = fsdp()
    if not sharded.can_drop_unfinished(model):
        pytest.skip("this torch's FSDP2 has no reset_iter_state")
    expected = output(model)
    sharded.reshard(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("on the way")

    F.cross_entropy(model(SAMPLE[0]), SAMPLE[1]).backward()
    handle = model[2].register_full_backward_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        F.cross_entropy(model(SAMPLE[0]), SAMPLE[1]).backward()
    handle.remove()
    sharded.drop_unfinished(model)
    assert all(p.grad is None for p in model.parameters()) and torch.equal(output(model), expected)
    F.cross_entropy(model(SAMPLE[0]), SAMPLE[1]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_private_names_of_torch_do_what_they_promise(absent_ranks: None) -> None:
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (1, RANKS, "fake")
    module = fully_shard(nn.Sequential(fully_shard(nn.Linear(8, 8))))
    assert gradient_divisors(module) == [] and gradient_divisors(module[0]) == [None]
    if hasattr(module, "set_gradient_divide_factor"):
        module[0].set_gradient_divide_factor(3.0)
        assert gradient_divisors(module[0]) == [3.0]
    assert not has_begun(module)
    needs_fsdp_on_cpu()
    module(torch.zeros(1, 8))
    assert has_begun(module)
