"""The same plan twice is the same training, bit for bit; so is a plan that an out-of-memory led to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers_train import (
    Capture,
    Rows,
    mlp,
    one_thread,  # noqa: F401
    plan_for,
    runner_for,
    same_tensors,
    seen,
    state_of,
    vectors,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from autoaccum import Runner, Workload
from autoaccum.runner.loop import train
from autoaccum.state.rng import put_rng, same_state, take_rng
from autoaccum.workload import default_loss


def dropping() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 5), nn.Dropout(0.1)
    return nn.Sequential(*layers).double()


def work_for(model: nn.Module, **more: Any) -> Workload:
    return Workload(
        model,
        vectors(4),
        loss=default_loss,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.05),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
        **more,
    )


def short_at(runner: Runner, at: int) -> None:
    """Runs out of memory once, in the forward of that micro-batch, counted over all windows."""
    calls, inner = list[int](), runner.context.loss

    def loss(model: nn.Module, batch: Any) -> Any:
        out = inner(model, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == at + 1:
                raise torch.OutOfMemoryError("short")
        return out

    runner.context.loss, runner.context.loss_is_pair = loss, False


@pytest.mark.parametrize("how", [None, "merged"])
def test_the_same_plan_twice_is_bit_identical(how: str | None) -> None:
    found, rng = [], take_rng()
    for _ in range(2):
        model = dropping()
        runner = runner_for(work_for(model, batchnorm=how), 16, 5)
        put_rng(rng)
        losses = [float(result.loss) for result in runner.epoch([vectors(40)])]
        found.append((state_of(model), losses, take_rng()))
    assert same_tensors(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert all(same_state(found[1][2][name], state) for name, state in found[0][2].items())


@pytest.mark.parametrize("how", [None, "merged"])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_after_an_out_of_memory_it_is_the_training_of_the_plan_that_resulted(at: int, how: str | None) -> None:
    torch.manual_seed(3)
    rng = take_rng()
    first, second = dropping(), dropping()
    runner = runner_for(work_for(first, batchnorm=how), 16, 4)
    short_at(runner, at)
    put_rng(rng)
    results = [runner.step(vectors(16, seed=seed)) for seed in range(3)]
    assert sum(result.retries for result in results) == 1
    put_rng(rng)
    other = runner_for(work_for(second, batchnorm=how), 16, 4)
    for seed, result in enumerate(results):
        other.micro_batch = max(result.split)
        other.sizing.sizes = lambda samples, split=result.split: split  # type: ignore[method-assign]
        again = other.step(vectors(16, seed=seed))
        assert (again.split, again.retries) == (result.split, 0)
        assert torch.equal(again.loss, result.loss)
    assert same_tensors(state_of(first), state_of(second))


def test_another_split_draws_other_units() -> None:
    """What a plan says of dropout: the same distribution, not the same gradient."""
    grads = []
    for micro in (8, 4):
        model = mlp()
        model.append(nn.Dropout(0.3))
        runner = runner_for(Workload(model, vectors(4), optimizer=Capture), 16, micro)
        torch.manual_seed(2)
        runner.step(vectors(16))
        grads.append(seen(runner)[-1])
    assert not all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- per window ----------------------------------------------------------------------------------------------------


class Average:
    """An exponential moving average of parameters that counts its updates."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn()
        )

    def __call__(self, model: nn.Module) -> None:
        self.inner.update_parameters(model)


def test_averages_schedulers_and_metrics_come_once_per_window() -> None:
    model = mlp()
    average, metrics = Average(model), list[float]()
    work = Workload(
        model, vectors(4), between_steps=average, optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )  # fmt: skip
    runner = runner_for(work, 16, 3)
    short_at(runner, 2)  # a window that starts over is still one
    for result in runner.epoch([vectors(24), vectors(18)]):  # windows of 16, 16, 10
        metrics.append(float(result.loss))
        assert int(average.inner.n_averaged) == result.number == runner.context.scheduler.last_epoch == len(metrics)
    assert len(metrics) == 3
    assert runner.context.optimizer.param_groups[0]["lr"] == 0.5**3


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_resumed_training_is_bitwise_the_uninterrupted_one(stop: int, tmp_path: Any) -> None:
    rows = list(zip(*vectors(44), strict=True))

    def loader() -> Any:
        return DataLoader(Rows(rows), batch_size=7, shuffle=True)

    def trained(model: nn.Module, **how: Any) -> dict[str, Any]:
        work = work_for(model, batchnorm="merged", loader=loader, clip_grad_norm=0.5)
        return train(work, plan_for(work, 16, 5), progress=lambda figures: None, epochs=2, **how)

    first, second = dropping(), dropping()
    torch.manual_seed(11)
    whole = trained(first)
    assert whole["steps"] == 6
    checkpoint = str(tmp_path / "checkpoint.pt")
    torch.manual_seed(11)
    trained(second, steps=stop, checkpoint=checkpoint)
    assert not same_tensors(state_of(first), state_of(second))
    torch.manual_seed(99)  # another process
    third = dropping()
    resumed = trained(third, checkpoint=checkpoint)
    assert resumed["steps"] == 6
    assert resumed["loss"] == whole["loss"]
    assert same_tensors(state_of(first), state_of(third))


# --- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "micro", "samples"), [(16, 5, 45), (16, 16, 40), (24, 7, 61)])
def test_a_balanced_split_compiles_to_two_graphs_at_most(target: int, micro: int, samples: int) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model, batch = mlp(), vectors(samples)
    plain = copy.deepcopy(model)
    make = {"sample": vectors(4), "optimizer": lambda params: Capture(params, lr=0.1)}
    compiled = runner_for(Workload(torch.compile(model, backend=graphs), **make), target, micro)
    eager = runner_for(Workload(plain, **make), target, micro)
    splits = set()
    for _ in range(3):
        for one, other in zip(compiled.epoch([batch]), eager.epoch([batch]), strict=True):
            assert one.split == other.split
            splits |= set(one.split)
    assert len(splits) >= 2  # tails among them
    for got, want in zip(seen(compiled), seen(eager), strict=True):
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(got, want, strict=True))
    assert graphs.frame_count <= 2, splits
