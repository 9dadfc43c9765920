"""What the functions of a workload hold is put back after planning and after an out-of-memory, to the bit."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_train import Capture, mlp, one_thread, plan_for, runner_for, seen, vectors  # noqa: F401
from test_restore import frozen
from torch import nn

from autoaccum import OutOfMemory, Workload, fit_plan
from autoaccum.exactness import check
from autoaccum.state import snapshot
from autoaccum.state.closures import holdings
from autoaccum.window.norms import find_norms
from autoaccum.window.step import open_context, train_window
from autoaccum.workload import default_loss

Loss = Callable[[nn.Module, Any], torch.Tensor]


def normed(spectral: bool = False) -> nn.Module:
    """Another network, with running statistics and maybe a power iteration."""
    torch.manual_seed(3)
    first: nn.Module = nn.Linear(6, 8)
    if spectral:
        first = nn.utils.parametrizations.spectral_norm(first)
    return nn.Sequential(first, nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()


# --- ways to hold something: each gives a loss, and what it holds, to be compared


def by_closure() -> tuple[Loss, Any]:
    net = normed(spectral=True)
    return lambda m, b: default_loss(m, b) + (m(b[0]) - net(b[0])).square().mean(), net


teacher = normed()
counts = {"calls": 0}
CALLS = 0


def global_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    global CALLS
    CALLS += 1
    counts["calls"] += 1
    return default_loss(model, batch) + helper(batch[0]).square().mean()


def helper(x: torch.Tensor) -> torch.Tensor:
    return teacher(x)  # type: ignore[no-any-return]


def by_globals() -> tuple[Loss, Any]:
    return global_loss, [teacher, counts, lambda: CALLS]


class Centres:
    """A callable with a buffer of its own, moved in place, and a counter; a moving average of the model's weights."""

    best = 0.0

    def __init__(self) -> None:
        self.centres = torch.zeros(5, 6, dtype=torch.float64)
        self.calls, self.seen = 0, np.zeros(3)
        self.shadow: dict[str, torch.Tensor] = {}

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        self.calls += 1
        self.seen += 1
        Centres.best += 1
        self.centres[y] += 0.1 * (x - self.centres[y])
        self.average(model)
        return default_loss(model, batch) + (model(x) @ self.centres).mean()

    def average(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.shadow.setdefault(name, p.detach().clone()).mul_(0.9).add_(p.detach(), alpha=0.1)

    def state(self) -> Any:
        return self.centres, self.calls, self.seen, self.shadow, Centres.best


def by_object() -> tuple[Loss, Any]:
    loss = Centres()
    return loss, loss.state


def by_method() -> tuple[Loss, Any]:
    loss = Centres()
    return loss.__call__, loss.state


def by_partial() -> tuple[Loss, Any]:
    def inner(nets: list[nn.Module], m: nn.Module, b: Any, *, kept: list[Any]) -> torch.Tensor:
        kept.append(len(b[0]))
        return default_loss(m, b) + nets[0](b[0]).square().mean()

    nets, kept = [normed()], list[Any]()
    return functools.partial(inner, nets, kept=kept), [nets[0], kept]


def by_default() -> tuple[Loss, Any]:
    state: dict[str, Any] = {"net": normed(), "n": 0}

    def loss(m: nn.Module, b: Any, state: dict[str, Any] = state) -> torch.Tensor:
        state["n"] += 1
        state[f"call {state['n']}"] = True
        return default_loss(m, b) + state["net"](b[0]).square().mean()

    return loss, state


def by_variable() -> tuple[Loss, Any]:
    centre, calls = torch.zeros(6, dtype=torch.float64), 0

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        nonlocal centre, calls
        centre, calls = 0.9 * centre + b[0].mean(0), calls + 1
        return default_loss(m, b) + (b[0] - centre).square().mean()

    return loss, lambda: (centre, calls)


def by_attribute() -> tuple[Loss, Any]:
    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        loss.calls += 1  # type: ignore[attr-defined]
        return default_loss(m, b) + loss.net(b[0]).square().mean()  # type: ignore[attr-defined]

    loss.calls, loss.net = 0, normed()  # type: ignore[attr-defined]
    return loss, loss.__dict__


def by_module() -> tuple[Loss, Any]:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(6, dtype=torch.float64))
            self.net, self.calls, self.generator = normed(), 0, torch.Generator().manual_seed(0)

        def forward(self, m: nn.Module, b: Any) -> torch.Tensor:
            self.calls += 1
            self.centre.mul_(0.9).add_(b[0].mean(0))
            noise = torch.rand(6, generator=self.generator)
            return default_loss(m, b) + self.net(b[0] - self.centre + noise).square().mean()

    loss = Criterion()
    return loss, loss


WAYS = [by_closure, by_globals, by_object, by_method, by_partial, by_default, by_variable, by_attribute, by_module]


def state_of(held: Any) -> Any:
    """By value, and who is who; not one line of restore.py."""
    held = held() if callable(held) and not isinstance(held, nn.Module) else held
    if isinstance(held, (list, tuple)):
        return [state_of(each) for each in held]
    if isinstance(held, nn.Module):
        return [(frozen(vars(m)), [(frozen(p), frozen(p.grad)) for p in m.parameters()]) for m in held.modules()]
    return frozen(held)


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_loss_holds_is_put_back_after_windows(make: Callable[[], tuple[Loss, Any]], fails: bool) -> None:
    loss, held = make()
    model = mlp()
    before = state_of(held)

    def failing(m: nn.Module, b: Any) -> torch.Tensor:
        out = loss(m, b)
        if fails and torch.is_grad_enabled():
            out.backward()
            raise ArithmeticError
        return out

    work = Workload(model, vectors(4), loss=failing)
    context = open_context(work)
    with (
        pytest.raises(ArithmeticError) if fails else contextlib.nullcontext(),
        snapshot.kept(model=model, optimizer=context.optimizer, held=holdings(model, loss=failing)),
    ):
        train_window(context, [vectors(4), vectors(4)], [4, 4])
        assert state_of(held) != before
    assert state_of(held) == before


@pytest.mark.parametrize("make", WAYS)
def test_an_out_of_memory_leaves_what_a_loss_holds_as_though_nothing_had_been(
    make: Callable[[], tuple[Loss, Any]],
) -> None:
    """Micro-batches of 8 fail, after their forward and their backward; those of 4 were trained from the start."""
    found = []
    for micro in (8, 4):
        loss, held = make()
        start = state_of(held)

        def short(m: nn.Module, b: Any, loss: Loss = loss) -> torch.Tensor:
            out = loss(m, b)
            if len(b[0]) > 4 and torch.is_grad_enabled():
                out.backward()
                raise torch.OutOfMemoryError("short")
            return out

        torch.manual_seed(0)
        runner = runner_for(Workload(mlp(), vectors(4), loss=short, optimizer=Capture), 8, micro)
        with snapshot.kept(model=None, held=holdings(nn.Module(), loss=loss)):
            result = runner.step(vectors(8))
            assert result.retries == (micro == 8) and max(result.split) == 4
            after = state_of(held) if held is not None else None
            assert after != start
            values = [t.clone() for t in tensors_of(held)]
        found.append((values, seen(runner)[0]))
    (one, gradient), (other, expected) = found
    assert len(one) == len(other) and all(map(torch.equal, one, other))
    assert all(map(torch.equal, gradient, expected))


def tensors_of(held: Any) -> list[torch.Tensor]:
    held = held() if callable(held) and not isinstance(held, nn.Module) else held
    if isinstance(held, nn.Module):
        return [*held.buffers(), *(p.grad for p in held.parameters() if p.grad is not None)]
    if isinstance(held, dict):
        return tensors_of(list(held.values()))
    if isinstance(held, (list, tuple)):
        return [t for each in held for t in tensors_of(each)]
    return [torch.as_tensor(held)] if not isinstance(held, str) else []


@pytest.mark.parametrize("fails", ["", "loss", "between"])
def test_planning_leaves_what_functions_hold_to_the_bit(fails: str) -> None:
    """A GAN's other network, trained within the loss by an optimizer of its own, and an average of the weights."""
    other = normed(spectral=True)
    other_optimizer = torch.optim.Adam(other.parameters())
    average = torch.optim.swa_utils.AveragedModel(mlp())
    history: list[float] = []
    calls = 0

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if torch.is_grad_enabled():
            other(b[0]).square().mean().backward()
            other_optimizer.step()
        if fails == "loss" and calls > 4:
            raise ArithmeticError
        return default_loss(m, b) - 0.1 * other(b[0]).mean()

    def between(m: nn.Module) -> None:
        average.update_parameters(m)
        history.append(float(next(m.parameters()).detach().sum()))
        if fails == "between":
            raise ArithmeticError

    work = Workload(mlp(), vectors(4), loss=loss, between_steps=between)
    held = [other, vars(other_optimizer), average, history, work.model]
    before = [state_of(each) for each in held]
    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        fit_plan(work, target_batch=16, max_micro_batch=8, budget="4GiB", check=not fails)
    assert [state_of(each) for each in held] == before
    assert calls == 0 and history == []


def test_check_leaves_what_a_loss_holds_to_the_bit() -> None:
    loss = Centres()
    before = state_of(loss.state)
    check.check(Workload(mlp(), vectors(8), loss=loss))
    assert state_of(loss.state) == before


# --- what has no copy, and what isn't followed


def test_what_is_too_large_to_be_copied_is_named_where_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    still, moved = normed(), nn.Linear(64, 64)

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return still(b[0]).mean() + moved(b[0]).mean()  # type: ignore[no-any-return]

    model = mlp()
    needed = sum(t.nbytes for t in model.state_dict().values())
    monkeypatch.setattr(snapshot, "_CHECKED_BYTES", 0)
    monkeypatch.setattr(snapshot, "_available_bytes", lambda: needed + 16_000)  # the smaller ones fit in half of that
    refused = pytest.raises(snapshot.RestoreError, match=r"moved.weight \(too large to be copied beforehand\)")
    with refused, snapshot.kept(model=model, held=holdings(model, loss=loss)), torch.no_grad():
        moved.weight.add_(1)
        still[0].weight.add_(1)
    assert torch.equal(still[0].weight, normed()[0].weight)


def test_a_window_that_moves_a_teachers_weights_is_not_repeated() -> None:
    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        with torch.no_grad():
            teacher[0].weight.mul_(1)
        if len(b[0]) > 4:
            raise torch.OutOfMemoryError("short")
        return default_loss(m, b) + teacher(b[0]).square().mean()

    runner = runner_for(Workload(mlp(), vectors(4), loss=loss, optimizer=Capture), 8, 8)
    with pytest.raises(OutOfMemory, match=r"moves teacher\.0\.weight .*short"):
        runner.step(vectors(8))


def test_data_that_an_object_holds_is_neither_copied_nor_gone_through() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.data = [torch.ones(1000) for _ in range(5000)]
            self.table = torch.ones((1 << 24) + 1)
            self.net = normed()

        def loss(self, m: nn.Module, b: Any) -> torch.Tensor:
            return default_loss(m, b) + self.net(b[0]).mean()

    model = mlp()
    held = holdings(model, loss=Trainer().loss)
    assert list(held.modules) == ["loss.net"]
    for storages in (True, False):
        assert snapshot.host_bytes_needed(model=None, held=held, storages=storages) < 10_000


def test_of_installed_packages_objects_only_tensors_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Average:
        """As torch_ema keeps one; and a queue of its own, which somebody else may have emptied meanwhile."""

        def __init__(self) -> None:
            self.shadow, self.queue, self.calls = [torch.zeros(3)], ["event"], 0

    average = Average()
    monkeypatch.setattr(Average, "__module__", "torch_ema")
    module = types.ModuleType("torch_ema")
    module.__file__ = "/usr/lib/python3/site-packages/torch_ema/__init__.py"
    monkeypatch.setitem(sys.modules, "torch_ema", module)

    def loss(m: nn.Module, b: Any) -> Any:
        return m(b), average

    with snapshot.kept(model=None, held=holdings(nn.Module(), loss=loss)):
        average.shadow[0].add_(1)
        average.queue.clear()
        average.calls += 1
    assert float(average.shadow[0].sum()) == 0 and average.queue == [] and average.calls == 1


def test_a_light_snapshot_of_what_is_held_is_quick() -> None:
    """A teacher beside a model costs what the model costs, and a loss without one nearly nothing."""
    nets = [nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(20))) for _ in range(2)]

    def light(**of: Any) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            snapshot.take(model=nets[0], storages=False, **of)
            times.append(time.perf_counter() - start)
        return min(times)  # what other programs take of the processor only adds to the others

    alone = light()
    beside = light(held=holdings(nets[0], loss=lambda m, b: m(b) + nets[1](b)))
    assert beside < 3.5 * alone
    assert light(held=holdings(nets[0], loss=global_loss_of_nothing)) < 1.5 * alone


def global_loss_of_nothing(m: nn.Module, b: Any) -> torch.Tensor:
    return F.cross_entropy(m(b[0]), b[1])


# --- batch statistics, modules that count, and names


def test_batch_statistics_of_what_a_loss_holds_follow_the_same_rules(caplog: pytest.LogCaptureFixture) -> None:
    net = normed(spectral=True)
    model = mlp()
    loss: Loss = lambda m, b: default_loss(m, b) + net(b[0]).square().mean()  # noqa: E731
    work = Workload(model, vectors(4), loss=loss, optimizer=Capture, batchnorm="merged")
    context = open_context(work)
    assert list(context.norms.batch) == ["net.1"] and len(context.norms.spectral) == 1
    whole = runner_for(work, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    whole.step(vectors(8))
    wanted = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(before)
    net.zero_grad()
    runner_for(work, 8, 4).step(vectors(8))
    assert any(not torch.equal(value, before[name]) for name, value in wanted.items())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)
    assert "net.1" in caplog.text
    net.eval()
    assert not find_norms(model, context.held.modules).batch


def test_what_a_module_of_the_loss_keeps_is_reported_by_its_own_name(caplog: pytest.LogCaptureFixture) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean.add_(x.detach().abs().mean())
            return x * self.mean

    centre, history = nn.Sequential(Counts()), list[int]()

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        history.append(1)
        return default_loss(m, (centre(b[0]), b[1]))

    work = Workload(mlp(), vectors(12), loss=loss, optimizer=Capture)
    verdict = check.check(work)
    assert verdict.module == "centre.0 (Counts)"
    assert "centre.get_submodule('0').eval()" in " ".join(verdict.advice)
    runner = runner_for(work, 8, 4)
    for _ in range(3):
        runner.step(vectors(8))
    assert "The forward changes centre.0.mean: 2 times" in caplog.text
    assert "history" not in caplog.text

    alone = check.check(Workload(Root(), vectors(12), optimizer=Capture))
    assert "get_submodule" not in " ".join(alone.advice) and "the model (Root) changes" in alone.words


class Root(nn.Module):
    """What each forward moves is in the model itself, not in a module of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(1.1)
        out: torch.Tensor = self.inner(x * self.mean)
        return out
