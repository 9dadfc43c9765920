"""fit_plan: what it finds, and that it leaves no trace. Whole plans of tiny models on this CPU."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prepared_process import run_forked
from test_restore import CASES, Case, assert_as_before, busy, dump, loss, net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import DoesNotFit, UsageError, Workload, fit_plan
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.planning import build_plan, evidence, verify
from autoaccum.process_memory import committed_bytes
from autoaccum.window import step

BUDGET = "8GiB"


def batch(case: Case, n: int = 4) -> Any:
    inputs = torch.randint(0, 8, (n, 8)) if case.ids else torch.randn(n, 8)
    return inputs, torch.randint(0, 4, (n,))


def workload(case: Case, **more: Any) -> Workload:
    how = {"loss": loss, "optimizer": case.optimizer, "scaler": case.scaler, "scheduler": case.scheduler}
    return Workload(case.model, batch(case), clip_grad_norm=case.clip, **(how | more))


def plan_of(work: Workload, **how: Any) -> Any:
    return fit_plan(work, **{"target_batch": 64, "budget": BUDGET, "max_micro_batch": 16} | how)


@pytest.mark.parametrize("make", CASES)
def test_planning_leaves_everything_bitwise_as_it_was(make: Callable[[], Case]) -> None:
    case = make()
    work = workload(case)
    before = dump(case)
    plan = plan_of(work)
    assert_as_before(case, before)
    assert plan.verified and plan.split == (16, 16, 16, 16)


@pytest.mark.parametrize("make", [net, lambda: net(nn.BatchNorm1d(16), nn.Dropout(0.3))])
def test_an_optimizer_made_for_the_occasion_leaves_no_trace_either(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    case = Case(model, torch.optim.SGD(model.parameters()))
    work = Workload(model, batch(case), scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))
    before = dump(case)
    plan_of(work)
    assert_as_before(case, before)


class Boom(Exception):
    pass


class RaiseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, error: BaseException) -> torch.Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise ctx.error


def failing_loss(error: BaseException, call: int, *, backward: bool) -> Callable[..., torch.Tensor]:
    calls = itertools.count(1)  # an iterator: planning puts back a plain number that a loss changes

    def failing(model: nn.Module, given: Any) -> torch.Tensor:
        is_it = next(calls) == call
        if is_it and not backward:
            raise error
        value = loss(model, given)
        return RaiseInBackward.apply(value, error) if is_it else value

    return failing


# Calls of the loss: 1 a first step, 2 the same recorded, 3 the pair test (no backward), 4-5 at five samples, 6-9 what
# that recording misses, 10-11 at seven, then verification.
# Each call with an exception in one of its halves and Ctrl-C in the other.
@pytest.mark.parametrize("error", [Boom("boom"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize(
    ("call", "backward_on"),
    [(1, Boom), (2, KeyboardInterrupt), (3, None), (5, Boom), (7, KeyboardInterrupt), (10, Boom), (12, Boom)],
)
def test_an_error_in_any_micro_batch_leaves_no_trace(
    error: BaseException, call: int, backward_on: type[BaseException] | None
) -> None:
    case = busy()
    work = workload(case, loss=failing_loss(error, call, backward=type(error) is backward_on))
    before = dump(case)
    with pytest.raises(type(error)):
        plan_of(work)
    assert_as_before(case, before)


@pytest.mark.parametrize("error", [Boom("boom"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (step, "optimizer_step"),
        (step, "run_between"),
        (step, "open_context"),
        (CpuDevice, "record"),
        (CpuDevice, "read_budget"),
        (CpuDevice, "measure"),
        (evidence, "lift"),
        (verify, "solve"),
        (build_plan, "plan"),
    ],
)
def test_an_error_in_any_phase_leaves_no_trace(
    owner: Any, name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[1]()
    work = workload(case)
    before = dump(case)
    real = getattr(owner, name)

    def fails_afterwards(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise error

    monkeypatch.setattr(owner, name, fails_afterwards)
    with pytest.raises(type(error)):
        plan_of(work)
    assert_as_before(case, before)


def test_the_loader_is_not_consumed() -> None:
    data = TensorDataset(torch.randn(32, 8), torch.randint(0, 4, (32,)))
    taken = []

    class Counting(DataLoader):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            taken.append(1)
            return super().__iter__()

    loader = Counting(data, batch_size=8, shuffle=True)
    plan_of(Workload(net(), data[:4], loader=loader))
    assert taken == []


def test_the_sum_of_the_split_is_the_target_whatever_fits() -> None:
    for most in (3, 61, 64):
        plan = plan_of(Workload(net(), (torch.randn(4, 8), torch.zeros(4).long())), max_micro_batch=most, verify=False)
        assert sum(plan.split) == 64 and plan.micro_batch <= most and len(plan.split) == -(-64 // most)
        assert not plan.verified


def wide(rows: int = 4) -> Workload:
    """A sample of 64 KiB with activations of some MiB, so that a budget binds."""
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 8))
    data = torch.randn(rows, 1024, 8), torch.randn(rows, 1024, 8)
    return Workload(model, data, loss=lambda m, b: F.mse_loss(m(b[0]), b[1]))


def test_a_budget_is_kept_and_the_next_smaller_number_of_steps_would_not_have_fitted() -> None:
    budget = committed_bytes() + 300 * 2**20
    plan = fit_plan(wide(), target_batch=256, budget=budget)
    assert plan.verified and plan.measured_peak_bytes is not None
    assert 1 < plan.accumulation_steps < 256 and sum(plan.split) == 256
    assert plan.measured_peak_bytes <= budget and plan.predicted_peak_bytes <= 0.98 * budget
    assert abs(plan.predicted_peak_bytes / plan.measured_peak_bytes - 1) < 0.03
    needed = plan.fewer_steps_need()
    assert needed is not None and needed[0] == -(-256 // (plan.accumulation_steps - 1)) and needed[1] > 0.98 * budget
    # That size may fit alone, and be the largest, where it does not beside the others.
    assert re.search(rf"(up to|1 of) {needed[0]} .*would need", plan.explain())


def test_without_a_target_the_largest_micro_batch_is_the_batch() -> None:
    budget = committed_bytes() + 200 * 2**20
    plan = fit_plan(wide(), budget=budget)
    assert plan.accumulation_steps == 1 and plan.target_batch == plan.micro_batch > 10
    assert plan.measured_peak_bytes is not None and plan.measured_peak_bytes <= budget


def test_out_of_reach_says_by_how_many_bytes() -> None:
    budget = committed_bytes() - 50 * 2**20
    with pytest.raises(DoesNotFit) as caught:
        fit_plan(wide(), target_batch=64, budget=budget)
    assert caught.value.exit_code == 3 and caught.value.missing_bytes > 50 * 2**20
    assert f"{caught.value.missing_bytes:,} bytes" in str(caught.value) and "budget=" in caught.value.hint


class Erratic(nn.Module):
    """Its workspace jumps up and down with the batch: nothing at other sizes tells what it takes at this one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scratch = torch.ones((len(x) * 2654435761 % 97 + 3) * 2**20, dtype=torch.uint8)
        del scratch
        return self.linear(x)


def test_a_model_that_cannot_be_lifted_is_bracketed_and_the_plan_says_why() -> None:
    data = torch.randn(4, 16, 64), torch.randn(4, 16, 8)
    work = Workload(Erratic(), data, loss=lambda m, b: F.mse_loss(m(b[0]), b[1]))
    budget = committed_bytes() + 250 * 2**20
    plan = fit_plan(work, target_batch=2048, budget=budget)
    assert plan.method == "bracketed"
    assert "don't follow" in plan.provenance.reasons["method"] and any("Bracketed" in note for note in plan.notes)
    assert sum(plan.split) == 2048
    assert plan.measured_peak_bytes is not None and plan.measured_peak_bytes <= budget


class Switching(nn.Module):
    """Computes otherwise from 200 samples on, so that sizes there don't follow from smaller ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 1024), nn.Linear(1024, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        return self.outer(h if len(x) < 200 else sum((h * k).tanh() for k in range(1, 9)))


@pytest.mark.slow
def test_between_two_recorded_sizes_others_are_recorded_where_none_is_predicted() -> None:
    data = torch.randn(64, 64), torch.randn(64, 8)
    work = Workload(Switching(), data, loss=lambda m, b: F.mse_loss(m(b[0]), b[1]), optimizer="sgd")
    fit_plan(work, target_batch=4, verify=False, check=False)  # imports what both need
    budget = int((committed_bytes() + 45 * 2**20) / 0.98)  # 1,021 samples need a little more
    plan = fit_plan(work, target_batch=4096, budget=budget, check=False)
    assert plan.method == "bracketed"
    assert plan.micro_batch >= 500, plan.evidence.recordings
    assert plan.measured_peak_bytes is not None and plan.measured_peak_bytes <= budget


class Chunked(nn.Module):
    """Works on seven samples at a time, whose blocks are just too small for the cache of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(256, 4096), nn.Linear(4096, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.outer(self.inner(chunk).relu()) for chunk in x.split(7)])


@pytest.mark.slow
def test_where_plannings_own_heap_is_in_the_way_another_process_is_advised() -> None:
    work = Workload(
        Chunked(),
        (torch.randn(64, 256), torch.randn(64, 8)),
        loss=lambda m, b: F.mse_loss(m(b[0]), b[1]),
        optimizer="sgd",
    )
    fit_plan(work, target_batch=4, verify=False, check=False)
    with pytest.raises(DoesNotFit, match="train_in_new_process=True"):
        fit_plan(work, target_batch=4096, budget=committed_bytes() + 80 * 2**20, check=False)


def test_a_budget_too_small_for_two_primes_is_recorded_size_by_size() -> None:
    fit_plan(net(), (torch.randn(2, 8), torch.zeros(2).long()), target_batch=2)  # imports what all of them need
    budget = committed_bytes() + 110 * 2**20
    data = torch.randn(2, 16384, 64), torch.randn(2, 16384, 8)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    work = Workload(model, data, loss=lambda m, b: F.mse_loss(m(b[0]), b[1]))
    plan = fit_plan(work, target_batch=6, budget=budget)
    assert plan.method == "bracketed" and "too small" in plan.provenance.reasons["method"]
    assert plan.measured_peak_bytes is not None and plan.measured_peak_bytes <= budget


def test_what_samples_share_is_counted_once() -> None:
    def loss(m: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(m(b["x"]), b["y"]) + 0 * b["table"].sum()

    table = torch.zeros(2**20)  # 4 MiB; times 512 it would be 2 GiB
    sample = {"x": torch.randn(4, 8), "y": torch.randn(4, 4), "table": table}
    work = Workload(net(), sample, loss=loss, shared={"table"})
    plan = fit_plan(work, target_batch=512, budget=committed_bytes() + 300 * 2**20)
    assert plan.split == (512,) and plan.memory.input_bytes < 2**20


def test_a_model_that_is_mostly_parameters_is_not_taken_for_one_that_hardly_fits() -> None:
    model = nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 1024))  # 48 MiB; gradients and state 144
    sample = torch.randn(4, 2048), torch.zeros(4).long()
    plan = fit_plan(model, sample, target_batch=64, budget=committed_bytes() + 450 * 2**20)
    assert plan.method == "replayed", plan.provenance.reasons["method"]


def test_a_scheduler_with_few_steps_is_not_used_up_by_planning() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    work = Workload(
        model, batch(busy()), optimizer=optimizer,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=2),
    )  # fmt: skip
    assert plan_of(work).verified


KEEPS = """
import json, torch, torch.nn.functional as F
from torch import nn
from autoaccum import Workload, fit_plan
from autoaccum.process_memory import committed_bytes
class Keeps(nn.Module):  # holds on to its last activation, into the next micro-batch and into the next window
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(8, 256), nn.Linear(256, 8), None
    def forward(self, x):
        self.last = self.one(x).detach().clone()
        return self.two(self.last + self.one(x))
data = torch.randn(4, 1024, 8), torch.randn(4, 1024, 8)
work = Workload(Keeps(), data, loss=lambda m, b: F.mse_loss(m(b[0]), b[1]))
plan = fit_plan(work, target_batch=64, budget=committed_bytes() + 400 * 2**20)
print(json.dumps([plan.method, plan.predicted_peak_bytes, plan.measured_peak_bytes, work.model.last is None]))
"""


def test_what_a_model_keeps_from_window_to_window_is_predicted() -> None:
    # In a process of its own: what other tests left in this one may be given back to the system while it is measured.
    done = run_forked(KEEPS)
    assert done.returncode == 0, done.stderr
    method, predicted, measured, nothing_left = json.loads(done.stdout)
    assert method == "replayed" and nothing_left
    assert abs(predicted - measured) < 4 * 2**20  # 64 MiB are kept; planning's own objects are in both


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"target_batch": 0}, "target_batch is 0"),
        ({"target_batch": -3}, "at least 1"),
        ({"target_batch": 2.5}, "target_batch is 2.5"),
        ({"target_batch": 3, "world_size": 4}, "cannot be shared by 4 ranks"),
        ({"budget": "much"}, "'much' is not"),
        ({"budget": "1GiB", "headroom": "2GiB"}, "leaves nothing"),
        ({"device": "cuda"}, "on cpu, not on cuda"),
        ({"max_micro_batch": 0}, "max_micro_batch is 0"),
    ],
)
def test_bad_input_is_refused_in_words(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_plan(net(), batch(busy()), **how)


def test_a_batch_of_unequal_lengths_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"batch\[1\]"):
        fit_plan(net(), (torch.randn(4, 8), torch.zeros(3).long()), target_batch=8)


def test_a_model_that_returns_a_tuple_is_refused_with_what_to_write() -> None:
    model = nn.LSTM(8, 4, batch_first=True)
    with pytest.raises(UsageError, match="tuple") as caught:
        fit_plan(model, (torch.randn(4, 3, 8), torch.zeros(4, 3).long()), target_batch=8)
    assert "loss=" in caught.value.hint


def test_a_linear_model_tells_its_own_sample() -> None:
    case = Case(net(), torch.optim.SGD(net().parameters()))
    before = dump(case)
    plan = fit_plan(case.model, target_batch=32, budget=BUDGET)
    assert_as_before(case, before)
    assert any("8 features a sample" in note for note in plan.notes)
    assert plan.split == (32,)


def test_a_hugging_face_model_tells_its_own_sample() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    plan = fit_plan(transformers.GPT2LMHeadModel(config), target_batch=16, budget=BUDGET)
    assert any("32 tokens" in note and "Assumed" in note for note in plan.notes)
    assert plan.provenance.signature[0].trailing_shape == (32,)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "torch.randn(2, 3, 224, 224)"),
        (nn.Embedding(50, 4), "torch.randint(50, (2,"),
    ],
)
def test_a_model_that_does_not_tell_gets_the_line_to_write(model: nn.Module, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        fit_plan(model, target_batch=8)
    assert line in caught.value.hint


def test_batch_statistics_keep_two_samples_in_a_micro_batch() -> None:
    work = Workload(net(nn.BatchNorm1d(16)), (torch.randn(4, 8), torch.zeros(4).long()))
    plan = plan_of(work, target_batch=9, max_micro_batch=3, verify=False)
    assert plan.split == (3, 3, 3)
    with pytest.raises(UsageError, match="9 samples cannot be divided into micro-batches of at least 2 and at most 2"):
        plan_of(work, target_batch=9, max_micro_batch=2)
    with pytest.raises(UsageError, match="smallest micro-batch allowed, 2"):
        plan_of(work, target_batch=9, max_micro_batch=1)
