"""Losses that take gradients themselves: forces of an energy, penalties on a gradient, a step within the loss."""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import FP64, Capture, distance, drained, gradients, one_thread  # noqa: F401
from torch import nn

from autoaccum import Runner, Workload, fit_plan
from autoaccum.devices.cpu import recorder
from autoaccum.exactness import check
from autoaccum.phases import FIRST, OnPhase
from autoaccum.window import step
from autoaccum.window.loss_form import settle_loss_form, window_count

ROWS = 12


class Potential(nn.Module):
    """An energy for each sample, and something that each forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 16), nn.Linear(16, 1, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.out(torch.tanh(self.inner(x)))


def potential() -> nn.Module:
    torch.manual_seed(0)
    return Potential().double()


def sample(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x * torch.linspace(0.2, 3, rows)[:, None], x.sin()


def forces(m: nn.Module, b: Any) -> torch.Tensor:
    """Gradients of the inputs, in the batch's own tensor."""
    x = b[0].requires_grad_()
    return -torch.autograd.grad(m(x).sum(), x, create_graph=True)[0]


def mean_of_forces(m: nn.Module, b: Any) -> torch.Tensor:
    return F.mse_loss(forces(m, b), b[1])


def sum_of_forces(m: nn.Module, b: Any) -> tuple[torch.Tensor, int]:
    return F.mse_loss(forces(m, b), b[1], reduction="sum"), b[1].numel()


def penalty(m: nn.Module, b: Any) -> tuple[torch.Tensor, int]:
    """Of a gradient at points between, as a critic has it; asserts what a loss may assert."""
    x = b[0].detach().lerp(b[1].detach(), 0.3).requires_grad_()
    out = m(x)
    assert out.requires_grad
    slope = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)[0]
    return ((slope.norm(dim=1) - 1) ** 2 + out[:, 0] ** 2).sum(), len(x)


def by_backward(m: nn.Module, b: Any) -> tuple[torch.Tensor, int]:
    """An adversarial input, by a backward of its own."""
    x = b[0].detach().clone().requires_grad_()
    slope = torch.autograd.grad(F.mse_loss(m(x), b[1][:, :1], reduction="sum"), x)[0]
    return F.mse_loss(m(x.detach() + 0.1 * slope.sign()), b[1][:, :1], reduction="sum"), len(x)


LOSSES = [mean_of_forces, sum_of_forces, penalty, by_backward]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_window_has_the_gradient_of_the_whole_batch(loss: Callable[..., Any]) -> None:
    batch = sample()
    work = Workload(potential(), batch, loss=loss, optimizer=Capture)
    assert check.check(work, isolated=False).kind == "exact"
    plan = fit_plan(work, target_batch=ROWS, budget="4GiB", verify=False, max_micro_batch=5)
    assert plan.accumulation_steps == 3 and plan.exactness.startswith("exact (tested on")
    runner = Runner(work, plan)
    runner.step(sample())

    def whole(m: nn.Module, b: Any) -> torch.Tensor:
        out = loss(m, b)
        return out[0] / out[1] if isinstance(out, tuple) else out

    [found] = runner.context.optimizer.seen
    assert distance(found, gradients(potential(), whole, sample())) < FP64


def test_representations_that_are_gradients() -> None:
    """The first pass of `encode=` is without gradients, but where it takes some itself."""
    spread = lambda m, z: -z.std(0).log().sum()  # noqa: E731
    work = Workload(potential(), sample(), encode=forces, loss=spread, optimizer=Capture)
    assert check.check(work, isolated=False).kind == "exact"
    context = step.open_context(work)
    step.train_window(context, [tuple(leaf[at : at + 4] for leaf in sample()) for at in (0, 4, 8)], [4, 4, 4])
    whole = gradients(potential(), lambda m, b: spread(m, forces(m, b)), sample())
    assert distance(context.optimizer.seen[0], whole) < FP64
    assert context.model.calls == 3  # once for each micro-batch; the attempt without gradients is undone


def test_others_are_asked_without_gradients_and_nothing_moves() -> None:
    asked = queue.SimpleQueue[bool]()

    def loss(m: nn.Module, b: Any, inner: Callable[..., Any]) -> Any:
        asked.put(torch.is_grad_enabled())
        return inner(m, b)

    for inner, wanted in ((lambda m, b: (m(b[0]).sum(), len(b[0])), False), (sum_of_forces, True)):
        context = step.open_context(Workload(potential(), sample(), loss=functools.partial(loss, inner=inner)))
        pieces = [tuple(leaf[:4] for leaf in sample())] * 2
        before = torch.get_rng_state()
        for _ in range(2):
            drained(asked)
            assert window_count(context, settle_loss_form(context, pieces), pieces) in (8, 48)
        assert set(drained(asked)) == {wanted} and context.takes_gradients is wanted
        assert context.model.calls == 0 and torch.equal(torch.get_rng_state(), before)
        assert not any(leaf.requires_grad for piece in pieces for leaf in piece)


def test_an_error_of_the_losss_own_is_raised_as_it_is() -> None:
    def loss(m: nn.Module, b: Any) -> Any:
        raise ValueError("no such batch")

    context = step.open_context(Workload(potential(), sample(), loss=loss))
    with pytest.raises(ValueError, match="no such batch"):
        settle_loss_form(context, [sample()] * 2)


def test_asking_takes_less_memory_than_the_window_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    context = step.open_context(Workload(model, sample(), loss=sum_of_forces))
    pieces = [sample(256), sample(256)]
    step.train_window(context, pieces, [256, 256])  # settles what is asked once, and makes the optimizer's state

    def asking(on_phase: OnPhase) -> None:
        with on_phase(FIRST):
            window_count(context, settle_loss_form(context, pieces), pieces)

    def window(on_phase: OnPhase) -> None:
        step.train_window(replace(context), pieces, [256, 256], on_phase=on_phase)

    ask, whole = (_peak_bytes(run) for run in (asking, window))
    assert 0 < ask <= whole


def _peak_bytes(run: Callable[[OnPhase], None]) -> int:
    held = peak = 0
    for phase in recorder.record(run, micro_batch=1).phases:
        for event in phase.events:
            held += event.bytes
            peak = max(peak, held)
    return peak
