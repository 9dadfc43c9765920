"""What can't be trained is refused before it costs anything, in words that say what to change."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP64,
    Capture,
    distance,
    gradients,
    mlp,
    one_thread,  # noqa: F401
    plan_for,
    runner_for,
    seen,
    vectors,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import BatchError, LossTerms, Plan, Runner, UsageError, Workload, fit_plan
from autoaccum.data.loaders import loader_length
from autoaccum.workload import default_loss


def planned(model: nn.Module, **how: Any) -> Plan:
    work = Workload(model, vectors(4), **how)
    return fit_plan(work, target_batch=8, max_micro_batch=4, budget="4GiB", verify=False, check=False)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# --- an optimizer over something else


def of_another(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(nn.Linear(3, 3).parameters())


def of_the_one_before_a_copy(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(copy.deepcopy(model).parameters())


def of_frozen_ones(model: nn.Module) -> torch.optim.Optimizer:
    model[0].requires_grad_(False)  # type: ignore[operator]
    return sgd(model[0].parameters())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "why"),
    [(of_another, "another model's"), (of_the_one_before_a_copy, "same shapes"), (of_frozen_ones, "another model's")],
)
def test_an_optimizer_that_would_train_nothing_is_refused(make: Callable[..., Any], why: str) -> None:
    model = mlp()
    work = Workload(model, vectors(4), optimizer=make(model))
    for use in (
        lambda: fit_plan(work, target_batch=8),
        lambda: Runner(work, plan_for(Workload(mlp(), vectors(4)), 8, 4)),
    ):
        with pytest.raises(UsageError, match="training would change nothing") as refused:
            use()
        assert why in refused.value.why and "optimizer=lambda parameters" in refused.value.hint


def test_an_optimizer_of_a_part_is_noted_and_one_of_the_losss_own_tensors_is_fine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = mlp()
    plan = planned(model, optimizer=sgd(model[0].parameters()))
    (note,) = (text for text in plan.notes if "SGD has 2 of the model's 6 tensors" in text)
    assert "2.weight, 2.bias, 4.weight, ..." in note and "requires_grad_(False)" in note
    runner_for(Workload(model, vectors(4), optimizer=sgd(model[0].parameters())), 8, 4)
    assert note in caplog.text

    head, scale = nn.Linear(5, 5).double(), nn.Parameter(torch.ones((), dtype=torch.float64))

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return F.cross_entropy(head(m(b[0])) * scale, b[1])

    work = Workload(mlp(), vectors(4), loss=loss, optimizer=sgd([*head.parameters(), scale]))
    before = head.weight.clone()
    runner_for(work, 8, 4).step(vectors(8))
    assert not torch.equal(head.weight, before) and float(scale.detach()) != 1


# --- what a loss gives back

LOSSES: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "nothing": (lambda m, b: None, "The loss returned None"),
    "item": (lambda m, b: default_loss(m, b).item(), "returned a float"),
    "a list": (lambda m, b: [default_loss(m, b)], "returned a list, not a tensor"),
    "an output": (lambda m, b: Output(default_loss(m, b)), "Return its .loss"),
    "one each": (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), "tensor of shape"),
    "one each and their count": (
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none"), len(b[1])),
        "which is not \\(sum, count\\)",
    ),
    "detached": (lambda m, b: default_loss(m, b).detach(), "without a gradient"),
    "a number as the sum": (lambda m, b: (default_loss(m, b).item(), 1), "returned a float"),
    "a number as a term": (lambda m, b: LossTerms(default_loss(m, b).item(), 1), "returned a float"),  # type: ignore[arg-type]
    "its own backward": (lambda m, b: backward(default_loss(m, b)), "was backpropagated before"),
}  # fmt: skip


class Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def backward(loss: torch.Tensor) -> torch.Tensor:
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_gives_no_loss_is_refused_at_planning_and_leaves_no_trace(name: str) -> None:
    loss, said = LOSSES[name]
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=said) as refused:
        planned(model, loss=loss)
    assert refused.value.hint
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- optimizers that call for a closure, schedulers that call for a metric


class Sharp(torch.optim.SGD):
    """As sharpness-aware minimization is usually written."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "requires closure, but it was not provided"


class Raising(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is None:
            raise RuntimeError("step() must be given one")


class Unread(torch.optim.SGD):
    """Its source doesn't show it: the first window does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sharp, Raising, Unread])
def test_optimizers_that_call_for_a_closure_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    model, passes = mlp(), queue.SimpleQueue[Any]()
    model.register_forward_pre_hook(lambda *_: passes.put("one"))
    with pytest.raises(UsageError, match=f"{kind.__name__} calls for a closure") as refused:
        planned(model, optimizer=lambda p: kind(p, lr=0.1))  # type: ignore[call-arg]
    assert "AdamW" in refused.value.hint
    assert passes.empty() == (kind is not Unread), "it is refused before anything is run"


def test_an_error_of_an_optimizers_own_stays_what_it_is() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        runner_for(Workload(mlp(), vectors(4), optimizer=lambda p: Broken(p, lr=0.1)), 8, 4).step(vectors(8))


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def test_a_plateau_scheduler_is_fed_with_the_windows_loss_as_a_plain_loop_would() -> None:
    runner = runner_for(
        Workload(mlp(), vectors(4), optimizer=lambda p: torch.optim.SGD(p, lr=2.0), scheduler=plateau), 16, 4
    )
    twin = mlp()
    optimizer = torch.optim.SGD(twin.parameters(), lr=2.0)
    scheduler = plateau(optimizer)
    for seed in range(6):
        batch = vectors(16, seed=seed)
        result = runner.step(batch)
        optimizer.zero_grad()
        loss = default_loss(twin, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step(loss.detach())
        assert abs(float(result.loss) - float(loss.detach())) < FP64 * float(loss.detach())
        assert runner.context.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["lr"] < 1
    state = runner.state_dict()
    again = runner_for(
        Workload(mlp(), vectors(4), optimizer=lambda p: torch.optim.SGD(p, lr=2.0), scheduler=plateau), 16, 4
    )
    again.load_state_dict(state)
    assert again.context.scheduler.best == runner.context.scheduler.best and again.number == 6


def test_a_metric_comes_in_the_losss_place_and_may_come_now_and_then() -> None:
    given = iter([1.0, None, torch.tensor(2.0), 3.0])
    work = Workload(mlp(), vectors(4), optimizer=sgd, scheduler=plateau, metric=lambda model: next(given))
    runner = runner_for(work, 16, 4)
    rates = []
    for _ in range(4):
        runner.step(vectors(16))
        rates.append(runner.context.optimizer.param_groups[0]["lr"])
    assert rates == [0.1, 0.1, 0.05, 0.025]
    measured = list[int]()
    planned(mlp(), metric=lambda model: measured.append(1) or 1.0)  # type: ignore[func-returns-value]
    with pytest.raises(Exception, match="takes a metric"):
        Runner(replace(work, metric=None), plan_for(work, 16, 4))


def test_a_scheduler_that_asks_for_something_else_is_refused() -> None:
    class ByEpoch:
        def step(self, batch: Any, metric: float | None = None) -> None:
            raise AssertionError

    with pytest.raises(UsageError, match=r"ByEpoch\.step is to be given batch"):
        runner_for(Workload(mlp(), vectors(4), optimizer=sgd, scheduler=lambda o: ByEpoch()), 8, 4)


def test_steps_are_counted_when_they_were_taken() -> None:
    """Where the scheduler, or what runs between windows, raises behind the optimizer; and not where it was skipped."""

    class Failing:
        def step(self) -> None:
            raise ArithmeticError

    runner = runner_for(Workload(mlp(), vectors(4), optimizer=Capture, scheduler=lambda o: Failing()), 8, 4)
    for number in (1, 2):
        with pytest.raises(ArithmeticError):
            runner.step(vectors(8))
        assert runner.number == number == len(seen(runner))
        assert all(p.grad is None for p in runner.context.model.parameters())

    def between(model: nn.Module) -> None:
        raise ArithmeticError

    runner = runner_for(Workload(mlp(), vectors(4), optimizer=Capture, between_steps=between), 8, 4)
    with pytest.raises(ArithmeticError):
        next(iter(runner.epoch([vectors(8)])))
    assert runner.number == 1

    x, y = vectors(8)
    runner = runner_for(Workload(mlp(), vectors(4), optimizer=Capture, on_nonfinite="skip"), 8, 4)
    results = [runner.step(batch) for batch in ((x, y), (x * float("nan"), y), (x, y))]
    assert [(result.number, result.stepped) for result in results] == [(1, True), (1, False), (2, True)]


# --- batch statistics of a last sample that is alone


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()


@pytest.mark.parametrize("samples", [15, 16, 17, 18, 33])
@pytest.mark.parametrize("kind", ["map-style", "iterable", "generator"])
def test_a_last_sample_alone_joins_the_window_before_it(kind: str, samples: int) -> None:
    x, y = vectors(samples)
    data = TensorDataset(x, y)
    loader: Any = DataLoader(data, batch_size=3) if kind == "map-style" else list(DataLoader(data, batch_size=4))
    expected = [8] * (samples // 8) + ([samples % 8] if samples % 8 else [])
    if samples % 8 == 1:
        expected = [*expected[:-2], 9]
    runner = runner_for(Workload(normed(), vectors(4), optimizer=Capture), 8, 4)
    assert loader_length(loader, 8, least=2) == len(expected)
    results = list(runner.epoch(iter(loader) if kind == "generator" else loader))
    assert [result.samples for result in results] == expected
    assert all(min(result.split) >= 2 and max(result.split) <= 5 for result in results)
    last = expected[-1]
    parts = zip(*(t[samples - last :].split(list(results[-1].split)) for t in (x, y)), strict=True)
    model = normed()
    pieces = [gradients(model, default_loss, piece) for piece in parts]
    whole = [sum(g * s / last for g, s in zip(c, results[-1].split, strict=True)) for c in zip(*pieces, strict=True)]
    assert distance(seen(runner)[-1], whole) < FP64


def test_without_batch_statistics_the_last_window_has_its_one_sample() -> None:
    runner = runner_for(Workload(mlp(), vectors(4), optimizer=Capture), 8, 4)
    assert [result.samples for result in runner.epoch([vectors(17)])] == [8, 8, 1]


def test_a_sample_that_nothing_can_be_joined_with_is_a_bad_batch() -> None:
    runner = runner_for(Workload(normed(), vectors(4), optimizer=Capture), 8, 4)
    before = copy.deepcopy(runner.context.model.state_dict())
    with pytest.raises(BatchError, match="more than 1 value per channel"):
        list(runner.epoch([vectors(1)]))
    assert runner.number == 0
    assert all(torch.equal(v, before[k]) for k, v in runner.context.model.state_dict().items())
