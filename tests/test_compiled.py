"""Compiled models: planning compiles the plan's own sizes and no others, and training needs two graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import FP32, Capture, distance, gradients, mlp, one_thread, seen  # noqa: F401
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from autoaccum import Runner, Workload, fit_plan
from autoaccum.process_memory import committed_bytes
from autoaccum.window.compiled import is_compiled
from autoaccum.workload import default_loss

SAMPLES, WIDE = 117, 64


class Graphs:
    """A backend that notes the batch of each graph that it is asked for: a number, or "any"."""

    def __init__(self, inner: Callable[..., Any] = aot_eager) -> None:
        self.inner, self.batches = inner, list[Any]()

    def __call__(self, graph: Any, inputs: Any) -> Any:
        data = [each for each in inputs if isinstance(each, torch.Tensor) and not each.requires_grad]
        is_dynamic = not all(isinstance(each, torch.Tensor) for each in inputs)
        self.batches.append("any" if is_dynamic else data[0].shape[0])
        return self.inner(graph, inputs)


class Deep(nn.Module):
    """A class of its own: torch 2.13 compiles no nn.Sequential in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDE, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def deep(width: int = 96) -> nn.Module:
    torch.manual_seed(0)
    return Deep(width)


def wrapped(model: nn.Module, **how: Any) -> nn.Module:
    return torch.compile(model, **how)  # type: ignore[return-value]


def in_place(model: nn.Module, **how: Any) -> nn.Module:
    model.compile(**how)
    return model


def inside(model: nn.Module, **how: Any) -> nn.Module:
    return nn.Sequential(torch.compile(model, **how), nn.Identity())


def batch_of(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, WIDE, generator=torch.Generator().manual_seed(1)), torch.arange(samples) % 10


def pair(model: nn.Module, batch: Any) -> Any:
    """Has to be asked what it counts, by a forward for each micro-batch."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def mean(model: nn.Module, batch: Any) -> torch.Tensor:
    """Has to be asked whether it counts at all."""
    return model(batch[0]).square().mean()


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compiled", "loss"), [(wrapped, None), (in_place, mean), (inside, pair)], ids=["wrapped", "in place", "inside"]
)
def test_planning_and_three_epochs_with_tails_take_two_graphs(compiled: Any, loss: Any) -> None:
    graphs = Graphs()
    work = Workload(compiled(deep(), backend=graphs), batch_of(4), loss=loss)
    plan = fit_plan(work, target_batch=44, max_micro_batch=20, budget="4GiB")
    assert plan.verified and plan.split == (15, 15, 14) and plan.exactness.startswith("exact")
    assert graphs.batches == [15, "any"]
    assert any("Recorded uncompiled" in note for note in plan.notes)
    runner = Runner(work, plan)
    for _ in range(3):
        assert [result.split for result in runner.epoch([batch_of(SAMPLES)])] == [plan.split, plan.split, (15, 14)]
    assert graphs.batches == [15, "any"]


def test_planning_compiles_at_the_plans_own_sizes_and_at_no_others() -> None:
    """Where every size is a graph of its own, a search by trial would compile eight and then silently run eager."""
    graphs = Graphs()
    work = Workload(wrapped(deep(), backend=graphs, dynamic=False), batch_of(4))
    plan = fit_plan(work, target_batch=59, max_micro_batch=15, budget="4GiB")
    assert plan.split == (15, 15, 15, 14)
    assert sorted(graphs.batches) == [14, 15]  # both are run for real, though three micro-batches are enough


class Greedy:
    """A compiled model that takes more than was written: a buffer more for each sample."""

    def __init__(self, sample_bytes: int) -> None:
        self.sample_bytes = sample_bytes

    def __call__(self, graph: Any, inputs: Any) -> Any:
        run = aot_eager(graph, inputs)

        def greedy(*args: Any) -> Any:
            data = next(each for each in args if isinstance(each, torch.Tensor) and not each.requires_grad)
            spare = torch.empty(len(data) * self.sample_bytes, dtype=torch.uint8)
            out = run(*args)
            del spare
            return out

        return greedy


@pytest.mark.slow
def test_a_compiled_window_that_takes_another_amount_is_planned_with_that() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).square().mean()

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Hardswish(), nn.Hardswish())
    work = Workload(wrapped(layers, backend=Greedy(3 << 20)), torch.randn(2, 8192, 8), loss=loss)
    budget = committed_bytes() + (100 << 20)
    plan = fit_plan(work, target_batch=60, check=False, train_in_new_process=True, budget=budget)
    assert plan.measured_peak_bytes is not None
    assert max(plan.measured_peak_bytes, plan.predicted_peak_bytes) <= budget
    assert abs(plan.predicted_peak_bytes / plan.measured_peak_bytes - 1) < 0.03
    (share,) = (int(found[1]) for note in plan.notes if (found := re.search(r"Compiled, it uses (\d+)% of that", note)))
    assert share > 200  # as written, more than twice as large a micro-batch would fit


@pytest.mark.parametrize("of", [lambda: mlp(), lambda: nn.Sequential(mlp())])
def test_what_is_compiled_is_known(of: Callable[[], nn.Module]) -> None:
    loss = torch.compile(mean, backend="eager")
    assert not is_compiled(of(), mean)
    assert is_compiled(of(), loss)
    assert is_compiled(wrapped(of(), backend="eager")) and is_compiled(in_place(of(), backend="eager"))
    assert is_compiled(inside(of(), backend="eager"))


@pytest.mark.slow
def test_with_inductor_the_gradient_is_the_whole_batchs_from_two_graphs() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    plain, work = deep(), Workload(wrapped(deep()), batch_of(4), optimizer=Capture)
    plan = fit_plan(work, target_batch=44, max_micro_batch=20, budget="4GiB")
    assert plan.verified and plan.split == (15, 15, 14)
    runner = Runner(work, plan)
    for _ in range(3):
        list(runner.epoch([batch_of(SAMPLES)]))
    assert counters["stats"]["unique_graphs"] == 2
    data, labels = batch_of(SAMPLES)
    for got, rows in zip(seen(runner), [slice(0, 44), slice(44, 88), slice(88, 117)] * 3, strict=True):
        assert distance(got, gradients(plain, default_loss, (data[rows], labels[rows]))) <= FP32
