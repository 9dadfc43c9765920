"""Batch normalization and its relatives within a window: exact where that can be, and said where it can't."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_train import (
    FP64,
    NAIVE,
    Capture,
    cut,
    distance,
    gradients,
    one_thread,  # noqa: F401
    runner_for,
    same_tensors,
    seen,
    state_of,
    vectors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoaccum import OutOfMemory, UsageError, Workload
from autoaccum.window import context, norms
from autoaccum.window.step import open_context, train_window
from autoaccum.workload import default_loss

SIZES = (7, 5, 4)


def normed(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Linear(8, 5)).to(dtype)
    for layer in layers:  # statistics as though it had been trained
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    return model


def norm_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if hasattr(m, "running_mean"))


def train(model: nn.Module, batch: Any, sizes: tuple[int, ...], how: str | None, **more: Any) -> list[torch.Tensor]:
    context = open_context(Workload(model, batch, optimizer=Capture, batchnorm=how, **more))
    train_window(context, list(cut(batch, sizes)), sizes)
    return context.optimizer.seen[-1]  # type: ignore[attr-defined,no-any-return]


def whole_statistics(model: nn.Module, batch: Any) -> Any:
    """The normalization after one whole batch, by torch."""
    twin = copy.deepcopy(model)
    default_loss(twin, batch)
    return norm_of(twin)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_merged_running_statistics_are_those_of_the_whole_batch(momentum: float | None) -> None:
    model, batch = normed(nn.BatchNorm1d(8, momentum=momentum)), vectors(16)
    for seed in (1, 2, 3):
        batch = vectors(16, seed=seed)
        want = whole_statistics(model, batch)
        naive = copy.deepcopy(model)
        train(naive, batch, SIZES, "per_micro_batch")
        train(model, batch, SIZES, "merged")
        found = norm_of(model)
        assert relative(found.running_mean, want.running_mean) <= FP64
        assert relative(found.running_var, want.running_var) <= FP64
        assert int(found.num_batches_tracked) == int(want.num_batches_tracked) == seed
        assert found.momentum == momentum
        assert relative(norm_of(naive).running_var, want.running_var) > 0.01


def test_merging_keeps_the_gradient_of_per_micro_batch_statistics() -> None:
    model, batch = normed(nn.BatchNorm1d(8)), vectors(16)
    whole = gradients(model, default_loss, batch)
    got = [train(copy.deepcopy(model), batch, SIZES, how) for how in ("merged", "per_micro_batch", None)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*got, strict=True))
    assert distance(got[0], whole) > NAIVE  # which is why it is said


def test_a_large_mean_with_a_small_spread_is_merged_without_cancellation() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6, momentum=1.0), nn.Linear(6, 5))
    g = torch.Generator().manual_seed(0)
    batch = 100 + 0.01 * torch.randn(64, 6, generator=g), torch.arange(64) % 5
    train(model, batch, (16,) * 4, "merged")
    want = batch[0].double()
    assert relative(model[0].running_mean.double(), want.mean(0)) <= 1e-6
    assert relative(model[0].running_var.double(), want.var(0)) <= 1e-3


def checkpointed(model: nn.Module, batch: Any) -> torch.Tensor:
    x = checkpoint(lambda inputs: model(inputs), batch[0].requires_grad_(), use_reentrant=False)
    return nn.functional.cross_entropy(x, batch[1])


def test_checkpointing_does_not_count_statistics_twice() -> None:
    model, batch = normed(nn.BatchNorm1d(8)), vectors(16)
    want = whole_statistics(model, batch)
    naive = copy.deepcopy(model)
    train(naive, batch, SIZES, None, loss=checkpointed)
    assert int(norm_of(naive).num_batches_tracked) == 2 * len(SIZES)
    train(model, batch, SIZES, "merged", loss=checkpointed)
    assert int(norm_of(model).num_batches_tracked) == 1
    assert relative(norm_of(model).running_var, want.running_var) <= FP64


def test_a_module_that_is_used_twice_is_updated_twice_as_by_a_whole_batch() -> None:
    def twice(model: Any, batch: Any) -> torch.Tensor:
        h = model[1](model[0](batch[0]))
        return nn.functional.cross_entropy(model[3](model[1](3 * model[0](batch[0].flip(1))) + h), batch[1])

    model, batch = normed(nn.BatchNorm1d(8)), vectors(16)
    twin = copy.deepcopy(model)
    twice(twin, batch)
    train(model, batch, SIZES, "merged", loss=twice)
    assert relative(norm_of(model).running_mean, norm_of(twin).running_mean) <= FP64
    assert relative(norm_of(model).running_var, norm_of(twin).running_var) <= FP64
    assert int(norm_of(model).num_batches_tracked) == 2


def test_images_are_merged_by_their_pixels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5)).double()
    batch = torch.randn(16, 2, 6, 6).double() * torch.linspace(0.2, 3, 16)[:, None, None, None], torch.arange(16) % 5
    model(batch[0])
    want = whole_statistics(model, batch)
    train(model, batch, (9, 4, 3), "merged")
    assert relative(norm_of(model).running_var, want.running_var) <= FP64


def short_once(context: Any, at: int, where: str = "forward") -> list[int]:
    """Makes a Runner's loss run out of memory once, at a micro-batch; returns the sizes that were given."""
    given, inner = list[int](), context.loss

    def loss(model: nn.Module, batch: Any) -> Any:
        out = inner(model, batch)
        if torch.is_grad_enabled():
            given.append(len(batch[0]))
            if len(given) == at + 1:
                raise torch.OutOfMemoryError("short")
        return out

    context.loss = loss
    context.loss_is_pair = False
    return given


@pytest.mark.parametrize("at", [0, 2])
def test_after_a_recovered_out_of_memory_statistics_are_of_the_window_once(at: int) -> None:
    model, batch = normed(nn.BatchNorm1d(8)), vectors(16)
    want = whole_statistics(model, batch)
    runner = runner_for(Workload(model, vectors(4), optimizer=Capture, batchnorm="merged", loss=default_loss), 16, 4)
    short_once(runner.context, at)
    assert runner.step(batch).retries == 1
    found = norm_of(model)
    assert int(found.num_batches_tracked) == 1
    assert relative(found.running_mean, want.running_mean) <= FP64
    assert relative(found.running_var, want.running_var) <= FP64
    assert found.momentum == 0.1 and not found._forward_hooks


@pytest.mark.parametrize("how", ["merged", "frozen"])
def test_an_error_in_a_window_leaves_modules_as_they_were(how: str) -> None:
    model, batch = normed(nn.BatchNorm1d(8)), vectors(16)
    before = state_of(model)

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        default_loss(m, b)
        raise KeyError("no such thing")

    with pytest.raises(KeyError):
        train(model, batch, SIZES, how, loss=loss, count=lambda b: len(b[1]))
    assert same_tensors(state_of(model), before)
    assert norm_of(model).momentum == 0.1 and norm_of(model).training and not norm_of(model)._forward_hooks


@pytest.mark.parametrize("sizes", [(16,), SIZES, (1,) * 16], ids=str)
def test_frozen_statistics_give_the_gradient_of_the_whole_batch_and_stay(sizes: tuple[int, ...]) -> None:
    def frozen(m: Any, b: Any) -> torch.Tensor:
        norm_of(m).eval()
        return default_loss(m, b)

    model, batch = normed(nn.BatchNorm1d(8)), vectors(16)
    before = state_of(model)
    want = gradients(model, frozen, batch)
    assert distance(train(model, batch, sizes, "frozen"), want) <= FP64
    assert same_tensors(state_of(model), before)
    assert norm_of(model).training  # a mode is the user's


def test_batch_statistics_are_said_aloud_by_name(caplog: pytest.LogCaptureFixture) -> None:
    runner_for(Workload(normed(nn.BatchNorm1d(8)), vectors(4)), 16, 4)
    assert "Batch normalization (1) takes the statistics of micro-batches" in caplog.text
    caplog.clear()
    runner_for(Workload(normed(nn.BatchNorm1d(8)), vectors(4), batchnorm="merged"), 16, 4)
    assert "merged over the window" in caplog.text
    caplog.clear()
    runner_for(Workload(normed(nn.BatchNorm1d(8)), vectors(4), batchnorm="frozen"), 16, 4)
    runner_for(Workload(normed(nn.BatchNorm1d(8)), vectors(4)), 16, 16)
    runner_for(Workload(normed(nn.GroupNorm(2, 8)), vectors(4)), 16, 4)
    assert not caplog.text


def test_what_becomes_of_instance_and_synchronized_normalization_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def instance() -> nn.Module:
        return normed(nn.InstanceNorm1d(8, track_running_stats=True))

    for how in (None, "frozen"):
        runner_for(Workload(instance(), vectors(4), batchnorm=how), 16, 4)
        assert "Instance normalization (1) is exact in its gradient, but its running statistics" in caplog.text
        caplog.clear()
    runner_for(Workload(instance(), vectors(4), batchnorm="merged"), 16, 4)
    runner_for(Workload(instance(), vectors(4)), 16, 16)
    runner_for(Workload(normed(nn.InstanceNorm1d(8)), vectors(4)), 16, 4)  # nothing runs
    assert not caplog.text
    runner_for(Workload(normed(nn.SyncBatchNorm(8)), vectors(4)), 16, 4)
    assert "(1) takes the statistics of micro-batches" in caplog.text and "over ranks, not over time" in caplog.text


@pytest.mark.parametrize("how", [None, "merged"])
def test_no_micro_batch_of_one_sample_where_batch_statistics_are_taken(how: str | None) -> None:
    model = normed(nn.BatchNorm1d(8))
    work = Workload(model, vectors(4), batchnorm=how, loss=default_loss, optimizer=Capture)
    runner = runner_for(work, 12, 3)
    given = short_once(runner.context, 1)
    assert runner.step(vectors(12)).split == (2,) * 6  # no piece of 3 could be cut by itself
    assert given == [3, 3] + [2] * 6
    assert runner.step(vectors(9)).split == (3, 2, 2, 2)
    runner.context.loss = lambda m, b: (_ for _ in ()).throw(torch.OutOfMemoryError("short"))
    with pytest.raises(OutOfMemory):
        runner.step(vectors(4))
    assert min(given) == 2


def test_frozen_statistics_allow_micro_batches_of_one_sample() -> None:
    runner = runner_for(Workload(normed(nn.BatchNorm1d(8)), vectors(4), batchnorm="frozen", optimizer=Capture), 4, 1)
    assert runner.step(vectors(4)).split == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("layer", "how", "said"),
    [
        (lambda: nn.BatchNorm1d(8), "ghost", "not known"),
        (lambda: nn.BatchNorm1d(8, track_running_stats=False), "frozen", "keeps no running statistics"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(layer: Callable[[], nn.Module], how: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_context(Workload(normed(layer()), vectors(4), batchnorm=how))


def test_synchronized_statistics_are_merged_in_one_process_and_refused_over_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = normed(nn.SyncBatchNorm(8)), vectors(16)
    want = whole_statistics(normed(nn.BatchNorm1d(8)), batch)
    train(model, batch, SIZES, "merged")
    assert relative(norm_of(model).running_var, want.running_var) <= FP64
    monkeypatch.setattr(context, "ranks_here", lambda: 2)
    with pytest.raises(UsageError, match="1 of the model takes its statistics over 2 ranks"):
        open_context(Workload(model, batch, batchnorm="merged"))


def test_merging_with_a_compiled_model_is_refused() -> None:
    with pytest.raises(UsageError, match="compiled"):
        open_context(Workload(torch.compile(normed(nn.BatchNorm1d(8))), vectors(4), batchnorm="merged"))


def instances(model: Any, batch: Any) -> torch.Tensor:
    h = model[1](model[0](batch[0]).reshape(-1, 2, 4))
    return nn.functional.cross_entropy(model[3](torch.tanh(h.reshape(-1, 8))), batch[1])


def test_instance_normalization_is_exact_and_its_running_statistics_merge() -> None:
    model, batch = normed(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)), vectors(16)
    want = gradients(model, instances, batch)
    twin, naive = copy.deepcopy(model), copy.deepcopy(model)
    instances(twin, batch)
    assert distance(train(naive, batch, SIZES, None, loss=instances), want) <= FP64
    assert relative(norm_of(naive).running_var, norm_of(twin).running_var) > 0.01
    assert distance(train(model, batch, SIZES, "merged", loss=instances), want) <= FP64
    assert relative(norm_of(model).running_mean, norm_of(twin).running_mean) <= FP64
    assert relative(norm_of(model).running_var, norm_of(twin).running_var) <= FP64


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
@pytest.mark.parametrize("loss", [default_loss, checkpointed])
def test_spectral_normalization_iterates_once_per_window_and_is_exact(kind: str, loss: Any) -> None:
    norm = nn.utils.parametrizations.spectral_norm if kind == "parametrization" else nn.utils.spectral_norm
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 5)).double()
    batch = vectors(16)
    for _ in range(2):
        twin = copy.deepcopy(model) if kind == "parametrization" else _hooked_copy(model, norm)
        default_loss(twin, batch).backward()
        got = train(model, batch, SIZES, None, loss=loss)
        assert distance(got, [p.grad for p in twin.parameters()]) <= FP64
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    hook = next(iter(model[0]._forward_pre_hooks.values()), None)
    assert hook is None or hook.n_power_iterations == 1
    assert all(module.training for module in model.modules())


def _hooked_copy(model: Any, norm: Any) -> nn.Module:
    """A module whose weight is made by a hook can't be copied by deepcopy after a forward."""
    twin = nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 5)).double()
    twin.load_state_dict(model.state_dict())
    return twin


values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=12)


@given(values, values, values)
@settings(max_examples=60, deadline=None)
def test_merging_is_that_of_all_values_in_whatever_order(a: list[float], b: list[float], c: list[float]) -> None:
    def of(xs: list[float]) -> norms.Statistics:
        x = torch.tensor(xs, dtype=torch.float64)
        return norms.Statistics(len(xs), x.mean()[None], ((x - x.mean()) ** 2).sum()[None])

    whole = of(a + b + c)
    for merged in (
        norms.merge(norms.merge(of(a), of(b)), of(c)),
        norms.merge(of(c), norms.merge(of(b), of(a))),
    ):
        assert merged.count == whole.count
        assert float(merged.mean) == pytest.approx(float(whole.mean), rel=1e-9, abs=1e-9)
        assert float(merged.deviations) == pytest.approx(float(whole.deviations), rel=1e-9, abs=1e-6)


def test_after_an_out_of_memory_the_gradient_is_that_of_the_smaller_plan() -> None:
    first, batch = normed(nn.BatchNorm1d(8)), vectors(16)
    work = Workload(first, vectors(4), optimizer=Capture, batchnorm="merged", loss=default_loss)
    second = copy.deepcopy(first)
    runner = runner_for(work, 16, 4)
    short_once(runner.context, 1)
    result = runner.step(batch)
    want = train(second, batch, result.split, "merged")
    assert all(torch.equal(a, b) for a, b in zip(seen(runner)[-1], want, strict=True))
