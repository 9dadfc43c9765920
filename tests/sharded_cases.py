"""Cases of `tests/test_sharded_training.py`, run by every rank of a group (tests/rank_groups.py)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers_train import Capture, distance, gradients, mlp, pad, sequence, tagger, token_count, vectors
from rank_cases import UNEVEN, rows, runner_for, token_mean, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
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
    parts = {name: how.pop(name) for name in ("mp_policy", "mesh", "offload_policy") if name in how}
    twin, model = make(), sharded(make(), **parts)
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


def factors_that_differ(rank: int, world: int) -> Any:
    """Set for one module alone, as `set_gradient_divide_factor` does; the others divide by the ranks."""

    def after(model: nn.Module) -> None:
        model[0].set_gradient_divide_factor(3.0)
        model[0].set_force_sum_reduction_for_comms(True)

    return trained(rank, mlp, vectors(64), UNEVEN[world], after=after)


def a_loop_that_accumulated_itself(rank: int, world: int) -> Any:
    """It left FSDP2 as for a micro-batch that isn't the last."""

    def after(model: nn.Module) -> None:
        model.set_requires_gradient_sync(False)
        model.set_is_last_backward(False)
        model.set_reshard_after_backward(False)

    return trained(rank, mlp, vectors(64), UNEVEN[world], after=after)


def a_micro_batch_that_is_all_ignored(rank: int, world: int) -> Any:
    """The mean over nothing is NaN, and the second rank has one in the middle of its share."""
    batch = tokens(64)
    batch["labels"][slice_of(tuple(map(sum, UNEVEN[world])), 1)][:8] = -100
    loss = lambda model, batch: nn.functional.cross_entropy(  # noqa: E731
        model(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
    )
    return trained(rank, tagger, batch, UNEVEN[world], loss, count=token_count)


def replicated_and_sharded(rank: int, world: int) -> Any:
    """HSDP: FSDP2 on a mesh of two dimensions, the first of which replicates."""
    meshes = [(world, 1), (1, world)] if world == 2 else [(2, world // 2)]
    splits = UNEVEN.get(world, ((8,) * 4, (8, 8), (5, 5), (6,)))
    found = []
    for shape in meshes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        how: dict[str, Any] = {"mesh": mesh, "scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)}
        found.append(trained(rank, mlp, vectors(sum(map(sum, splits))), splits, **how)["worst"])
        found.append(clipped_epochs(rank, world, mesh)["worst"])
    return {"worst": max(found)}


def kept_on_the_host(rank: int, world: int) -> Any:
    """Shards and their gradients offloaded: on a CPU that takes the same way, without pinned memory."""
    policy = CPUOffloadPolicy(pin_memory=False)
    found = trained(rank, mlp, vectors(64), UNEVEN[world], offload_policy=policy, clip_grad_norm=1e6)
    return {"worst": found["worst"]}


def scaled(rank: int, world: int) -> Any:
    """A GradScaler; then the same with the norm clipped, where what the optimizer gets is of the norm's size."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    found = trained(rank, mlp, vectors(64), UNEVEN[world], scaler=scaler)
    return {"worst": found["worst"], "scale": scaler.get_scale()}


class Flagged(nn.Module):
    """A tagger of vectors whose first weight's gradient overflows where a sample says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.offset = mlp(), nn.Parameter(torch.zeros(8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset = self.offset.clone()
        if x[:, 0].max() > 100:
            offset.register_hook(lambda g: g + torch.tensor([float("inf")] + [0.0] * 7, dtype=g.dtype))
        found: torch.Tensor = self.inner(x) + offset.sum()
        return found


def overflow(rank: int, world: int) -> Any:
    """The last rank's sample makes one number infinite, which lies in the first rank's shard alone."""
    model = sharded(Flagged())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batch = vectors(64)
    runner = runner_for(
        Workload(model, rows(batch, slice(0, 4)), optimizer=optimizer, scaler=scaler), UNEVEN[world], rank
    )
    part = slice_of(tuple(map(sum, UNEVEN[world])), rank)
    scales, moved = [], []
    for window in range(3):
        before = [p.to_local().clone() for p in model.parameters()]
        given = tuple(each.clone() for each in batch)
        given[0][-1, 0] = 1000.0 if window == 1 else 1.0
        runner.step(rows(given, part))
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(p.to_local(), was) for p, was in zip(model.parameters(), before, strict=True)))
    return {"scales": scales, "moved": moved}


def in_bf16(rank: int, world: int) -> Any:
    """Computed in bf16, reduced and summed in fp32; beside one process that casts its parameters as often."""
    batch, splits, loss = vectors(64, torch.float32), UNEVEN[world], in_fp32
    twin = copy.deepcopy(mlp(torch.float32)).to(torch.bfloat16)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in twin.parameters()]
    for piece in torch.split(torch.arange(64), [n for split in splits for n in split]):
        part = tuple(each[piece] for each in batch)
        for total, gradient in zip(sums, gradients(twin, lambda *a: loss(*a) * (len(piece) / 64), part), strict=True):  # noqa: B023
            total += gradient.float()
    found = {}
    for name, reduced_in in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = sharded(mlp(torch.float32), mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduced_in))
        optimizer = Capture(model.parameters(), lr=0.0)
        runner = runner_for(Workload(model, rows(batch, slice(0, 4)), loss=loss, optimizer=optimizer), splits, rank)
        runner.step(rows(batch, slice_of(tuple(map(sum, splits)), rank)))
        assert all(each.dtype == torch.float32 for each in full(optimizer.seen[-1]))
        found[name] = distance(full(optimizer.seen[-1]), sums)
    whole = gradients(mlp(torch.float32), loss, batch)
    return found | {"beside fp32": distance(full(optimizer.seen[-1]), whole)}


def in_fp32(model: nn.Module, batch: Any) -> torch.Tensor:
    """A mean over samples, of outputs that are cast first."""
    x = batch[0].to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x).float(), batch[1])


def shares_that_were_given(rank: int, world: int) -> Any:
    """Planned and trained: 10 and 6 samples, in as many micro-batches."""
    return planned_together(rank, world, target_batch=16, shares=(10, 6))


def a_model_that_divides_itself(rank: int, world: int) -> Any:
    """Its own loss divides by num_items_in_batch, which a repeated micro-batch must not make 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32,
        )  # fmt: skip
        return LlamaForCausalLM(config).double()

    torch.manual_seed(1)
    ids = torch.randint(0, 50, (64, 7))
    labels = torch.where(torch.rand(64, 7) < 0.4, -100, ids)
    batch = {"input_ids": ids, "labels": labels}
    splits = UNEVEN[world]
    model = make()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = Capture(model.parameters(), lr=0.0)
    runner = runner_for(Workload(model, rows(batch, slice(0, 4)), optimizer=optimizer), splits, rank)
    runner.step(rows(batch, slice_of(tuple(map(sum, splits)), rank)))
    whole = gradients(make(), lambda model, batch: model(**batch).loss, batch)
    return {"worst": distance(full(optimizer.seen[-1]), whole)}


def clipped_epochs(rank: int, world: int, mesh: Any = None) -> Any:
    """Two epochs of 37 samples in windows of 16, clipped, by AdamW: the last window is one of 5."""
    data = vectors(37)
    twin, model = mlp(), sharded(mlp(), mesh=mesh)
    adamw = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # noqa: E731
    work = Workload(model, rows(data, slice(0, 4)), optimizer=adamw(model.parameters()), clip_grad_norm=0.05)
    runner = runner_for(work, ((3, 3, 2), (3, 3, 2)) if world == 2 else ((2, 2),) * world, rank)
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
    """A model that is sharded in part, and shares by what no rank has alone."""
    said = []
    partly = mlp()
    fully_shard(partly[0])
    for model, shares in ((partly, None), (sharded(mlp()), "speed"), (sharded(mlp()), "memory")):
        try:
            fit_plan(Workload(model, vectors(4)), target_batch=16, budget="6GiB", shares=shares)
        except UsageError as error:
            said.append(error.what)
    return {"said": said}


def planned_together(rank: int, world: int, **how: Any) -> Any:
    """A plan of all ranks, which leaves the model as it was; then windows that are exact."""
    how = {"target_batch": 17} | how
    batch = vectors(how["target_batch"])
    twin, model = mlp(), sharded(mlp())
    before = [p.to_local().clone() for p in model.parameters()]
    optimizer = Capture(model.parameters(), lr=0.1)
    work = Workload(model, rows(batch, slice(0, 4)), optimizer=optimizer)
    plan = fit_plan(work, budget="6GiB", max_micro_batch=3, **how)
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
