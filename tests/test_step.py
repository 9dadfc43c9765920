"""The gradient of a window is that of one whole batch. Gradients are compared, never losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP32,
    FP64,
    IGNORED,
    NAIVE,
    Capture,
    cut,
    distance,
    gradients,
    mean_of,
    mlp,
    one_thread,  # noqa: F401
    pad,
    runner_for,
    same_tensors,
    seen,
    sequence,
    state_of,
    tagger,
    token_count,
    token_sum,
    vectors,
    weighted_count,
    weighted_sum,
)
from torch import nn

from autoaccum import UsageError, Workload
from autoaccum.rng import same_state, take_rng
from autoaccum.solve import split_within
from autoaccum.step import Parts, open_parts, train_window
from autoaccum.workload import default_loss

STEPS = (1, 2, 3, 5, 8, 64)
TOLERANCES = {torch.float64: FP64, torch.float32: FP32}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32"])
RAGGED = (8, 8, 8, 4, 2, 1, 1, 1)


def ragged(samples: int = 64) -> dict[str, torch.Tensor]:
    """Lengths 8, 8, 8, 4, 2, 1, 1, 1: one of each in every eighth of the batch, and long ones first."""
    lengths = [RAGGED[i * len(RAGGED) // samples] for i in range(samples)]
    return pad([sequence(length, seed=i) for i, length in enumerate(lengths)], length=8)


def pair_sum(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def window_of(parts: Parts, batch: Any, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    train_window(parts, list(cut(batch, sizes)), sizes)
    assert isinstance(parts.optimizer, Capture)
    return parts.optimizer.seen[-1]


@DTYPES
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("loss", [default_loss, pair_sum])
def test_every_split_of_64_gives_the_gradient_of_the_whole_batch(
    loss: Callable[..., Any], k: int, dtype: torch.dtype
) -> None:
    model, batch = mlp(dtype), vectors(64, dtype)
    want = gradients(model, loss, batch)
    runner = runner_for(Workload(model, vectors(2, dtype), loss=loss, optimizer=Capture), 64, -(-64 // k))
    result = runner.step(batch)
    assert result.split == split_within(64, -(-64 // k))
    assert len(result.split) == k
    assert result.samples == sum(result.split) == 64
    assert distance(seen(runner)[-1], want) <= TOLERANCES[dtype]
    assert float(result.loss) == pytest.approx(float(default_loss(model, batch).detach()), rel=1e-6)


@pytest.mark.parametrize("sizes", [(16, 16, 1), (60, 4), (16,) * 6 + (4,), (1, 1, 30)], ids=str)
@pytest.mark.parametrize("loss", [default_loss, pair_sum])
def test_a_smaller_last_micro_batch_weighs_what_it_holds(loss: Callable[..., Any], sizes: tuple[int, ...]) -> None:
    model, batch = mlp(), vectors(sum(sizes))
    want = gradients(model, loss, batch)
    naive = mean_of([gradients(model, loss, piece) for piece in cut(batch, sizes)])
    got = window_of(open_parts(Workload(model, loss=loss, optimizer=Capture)), batch, sizes)
    assert distance(got, want) <= FP64
    assert distance(naive, want) > NAIVE


@DTYPES
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("given", [False, True], ids=["counted by forward", "count="])
@pytest.mark.parametrize(
    ("loss", "count"), [(token_sum, token_count), (weighted_sum, weighted_count)], ids=["ragged", "class weights"]
)
def test_ragged_tokens_and_class_weights_give_the_gradient_of_the_whole_batch(
    loss: Callable[..., Any], count: Callable[..., Any], given: bool, k: int, dtype: torch.dtype
) -> None:
    model, batch = tagger(dtype), ragged()
    want = gradients(model, loss, batch)
    work = Workload(model, pad([sequence(8, 0)]), loss=loss, optimizer=Capture, count=count if given else None)
    runner = runner_for(work, 64, -(-64 // k))
    result = runner.step(batch)
    assert len(result.split) == k
    assert distance(seen(runner)[-1], want) <= TOLERANCES[dtype]
    total, counted = loss(model, batch)
    assert float(result.loss) == pytest.approx(float((total / counted).detach()), rel=1e-6)
    if 1 < k <= 8:
        naive = mean_of([gradients(model, loss, piece) for piece in cut(batch, result.split)])
        assert distance(naive, want) > NAIVE


@pytest.mark.parametrize("given", [False, True], ids=["counted by forward", "count="])
@pytest.mark.parametrize("ignored", [slice(8, 16), slice(0, 64)], ids=["one micro-batch", "all"])
def test_a_micro_batch_that_counts_nothing_adds_nothing_and_no_nan(ignored: slice, given: bool) -> None:
    model, batch = tagger(), ragged()
    batch["labels"][ignored] = IGNORED
    total, counted = token_sum(copy.deepcopy(model), batch)
    count = token_count if given else None
    got = window_of(open_parts(Workload(model, loss=token_sum, optimizer=Capture, count=count)), batch, (8,) * 8)
    assert all(bool(g.isfinite().all()) for g in got)
    if counted:
        assert distance(got, gradients(model, token_sum, batch)) <= FP64
    else:
        assert float(total.detach()) == 0
        assert not any(g.count_nonzero() for g in got)


def watched(
    loss: Callable[..., Any], count: Callable[..., Any] | None = None, model: nn.Module | None = None
) -> tuple[Parts, list[str]]:
    """Parts whose forwards, backwards, counts and steps write down their order."""
    model, events = model or tagger(), []

    def forward(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        events.append("forward" if torch.is_grad_enabled() else "counting forward")
        if out.requires_grad:
            out.register_hook(lambda grad: events.append("backward"))

    def counted(batch: Any) -> Any:
        assert count is not None
        events.append("count")
        return count(batch)

    model.register_forward_hook(forward)
    parts = open_parts(Workload(model, loss=loss, optimizer=Capture, count=counted if count else None))
    parts.optimizer.register_step_post_hook(lambda *_: events.append("step"))
    return parts, events


def test_the_count_of_the_window_is_known_before_its_first_backward() -> None:
    parts, events = watched(token_sum)
    for first in (True, False):
        window_of(parts, ragged(16), (4, 4, 4, 4))
        before = events[: events.index("forward")]
        assert before.count("counting forward") == 4 + first  # the very first asks whether it is a pair
        assert events[len(before) :] == ["forward", "backward"] * 4 + ["step"]
        events.clear()


def test_count_spares_the_counting_forward() -> None:
    parts, events = watched(token_sum, token_count)
    window_of(parts, ragged(16), (4, 4, 4, 4))
    assert events == ["count"] * 4 + ["forward", "backward"] * 4 + ["step"]


def test_a_window_of_one_micro_batch_brings_its_own_count() -> None:
    parts, events = watched(token_sum)
    window_of(parts, ragged(16), (16,))
    assert events == ["forward", "backward", "step"]


def test_a_mean_is_asked_once_whether_it_is_a_pair_and_never_counted() -> None:
    parts, events = watched(default_loss, model=mlp())
    for extra in (1, 0):
        window_of(parts, vectors(16), (4, 4, 4, 4))
        assert events == ["counting forward"] * extra + ["forward", "backward"] * 4 + ["step"]
        events.clear()


class Noisy(nn.Module):
    """Draws random numbers and moves buffers and attributes in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tagger = Tagged()
        self.norm = nn.BatchNorm1d(8)
        self.calls = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        h = F.dropout(self.tagger.embedding(ids), 0.3)
        return self.tagger.out(F.dropout(self.norm(h.transpose(1, 2)).transpose(1, 2), 0.3))


class Tagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(11, 8), nn.Linear(8, 7)


def test_the_counting_forward_leaves_random_state_and_buffers_untouched() -> None:
    torch.manual_seed(0)
    first = Noisy().double()
    found = []
    for count in (None, token_count):
        model = copy.deepcopy(first)
        parts = open_parts(Workload(model, loss=token_sum, optimizer=Capture, count=count))
        torch.manual_seed(5)
        got = [window_of(parts, ragged(16), (4, 4, 4, 4)) for _ in range(2)]
        found.append(([g for grads in got for g in grads], state_of(model), model.calls, take_rng()))
    (ones, buffers, calls, rng), (others, other_buffers, other_calls, other_rng) = found
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
    assert same_tensors(buffers, other_buffers)
    assert calls == other_calls == 8
    assert same_state(rng, other_rng)


def test_a_loss_may_take_its_batch_apart() -> None:
    def popping(model: nn.Module, batch: dict[str, Any]) -> Any:
        return token_sum(model, {"ids": batch.pop("ids"), "labels": batch.pop("labels")})

    model = tagger()
    got = window_of(open_parts(Workload(model, loss=popping, optimizer=Capture)), ragged(16), (4, 4, 4, 4))
    assert distance(got, gradients(model, token_sum, ragged(16))) <= FP64


# --- once per window ---------------------------------------------------------------------------------------------


class Counted:
    """How often what was called; a plain object, which no snapshot follows."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __call__(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1


class CountedScaler(torch.amp.GradScaler):
    def __init__(self, count: Counted, scale: float = 2.0**10) -> None:
        super().__init__("cpu", init_scale=scale)
        self.count = count

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.count("unscale")
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        self.count("step")
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        self.count("update")
        super().update(new_scale)


class CountedSchedule(torch.optim.lr_scheduler.LambdaLR):
    def __init__(self, optimizer: torch.optim.Optimizer, count: Counted) -> None:
        super().__init__(optimizer, lambda step: 0.5**step)
        self.count = count

    def step(self, epoch: Any = None) -> None:
        if hasattr(self, "count"):
            self.count("schedule")
        super().step(epoch)


def test_scheduler_clipping_step_and_between_come_once_per_window(monkeypatch: pytest.MonkeyPatch) -> None:
    count = Counted()
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a, **k: (count("clip"), clip(*a, **k))[1])
    work = Workload(
        mlp(),
        vectors(2),
        optimizer=lambda params: Capture(params, lr=1.0),
        scheduler=lambda optimizer: CountedSchedule(optimizer, count),
        clip_grad_norm=1e-3,
        between=lambda model: count("between"),
    )
    runner = runner_for(work, 16, 4)
    runner.parts.optimizer.register_step_post_hook(lambda *_: count("optimizer"))
    results = list(runner.epoch([vectors(24), vectors(18)]))  # 16, 16, 10
    assert [result.samples for result in results] == [16, 16, 10]
    assert count.calls == dict.fromkeys(["clip", "optimizer", "schedule", "between"], 3)
    assert runner.parts.optimizer.param_groups[0]["lr"] == 0.5**3


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("largest_norm", [1e-2, 1e3], ids=["clipped", "not reached"])
def test_clipping_is_that_of_the_whole_batch(largest_norm: float, k: int) -> None:
    model, batch = mlp(), vectors(64)
    twin = copy.deepcopy(model)
    default_loss(twin, batch).backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), largest_norm)
    work = Workload(model, vectors(2), optimizer=Capture, clip_grad_norm=largest_norm)
    runner = runner_for(work, 64, -(-64 // k))
    result = runner.step(batch)
    assert distance(seen(runner)[-1], [p.grad for p in twin.parameters() if p.grad is not None]) <= FP64
    assert result.grad_norm is not None
    assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-12)


@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("clip", [None, 1e-2])
def test_a_scaler_unscales_steps_and_updates_once_per_window(precision: str | None, clip: float | None) -> None:
    count, dtype = Counted(), torch.float32
    model, batch = mlp(dtype), vectors(16, dtype)
    want = gradients(model, default_loss, batch)
    norm = torch.cat([g.flatten() for g in want]).norm()
    scaler = CountedScaler(count)
    work = Workload(
        model,
        vectors(2, dtype),
        optimizer=Capture,
        precision=precision,
        scaler=scaler,
        scheduler=lambda optimizer: CountedSchedule(optimizer, count),
        clip_grad_norm=clip,
    )
    runner = runner_for(work, 16, 4)
    assert runner.step(batch).stepped
    assert count.calls == dict.fromkeys(["unscale", "step", "update", "schedule"], 1)
    scale = 1 if clip is None else clip / norm
    assert distance(seen(runner)[-1], [g * scale for g in want]) <= (FP32 if precision is None else 5e-3)


@pytest.mark.parametrize("clip", [None, 1e-2])
def test_inf_in_one_micro_batch_leaves_parameters_and_schedule_as_they_were(clip: float | None) -> None:
    count, dtype = Counted(), torch.float32
    model, batch = mlp(dtype), vectors(16, dtype)
    batch[0][5] = float("inf")  # micro-batch 2 of 4
    before = state_of(model)
    work = Workload(
        model,
        vectors(2, dtype),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9),
        scaler=CountedScaler(count),
        scheduler=lambda optimizer: CountedSchedule(optimizer, count),
        clip_grad_norm=clip,
    )
    runner = runner_for(work, 16, 4)
    result = runner.step(batch)
    assert not result.stepped
    assert same_tensors(state_of(model), before)
    assert runner.parts.scaler.get_scale() == 2.0**9
    assert count.calls == dict.fromkeys(["unscale", "step", "update"], 1)
    assert all(p.grad is None for p in model.parameters())
    assert runner.step(vectors(16, dtype)).stepped  # and the next one trains
    assert count.calls["schedule"] == 1


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 1, 1, 1)], ids=str)
def test_what_is_in_no_group_of_the_optimizer_adds_up_nowhere(sizes: tuple[int, ...]) -> None:
    model = mlp()
    optimizer = Capture(list(model.parameters())[:2])
    window_of(open_parts(Workload(model, optimizer=optimizer)), vectors(4), sizes)
    assert all(p.grad is None for p in model.parameters())


def test_the_default_loss_weighs_micro_batches_by_the_classes_that_are_not_ignored() -> None:
    inputs, classes = vectors(8)
    classes[:3] = -100
    classes[5] = -100
    model = mlp()
    want = gradients(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (inputs, classes))
    parts = open_parts(Workload(model, (inputs, classes), optimizer=Capture))
    pieces = list(cut((inputs, classes), (3, 3, 2)))  # nothing counts in the first
    train_window(parts, pieces, (3, 3, 2))
    assert distance(parts.optimizer.seen[-1], want) <= FP64
    naive = mean_of([gradients(model, default_loss, piece) for piece in pieces], [3 / 8, 3 / 8, 2 / 8])
    assert distance(naive, want) > 0.05


def test_a_mean_is_weighted_by_the_count_that_is_given() -> None:
    inputs, classes = vectors(8)
    weights = torch.linspace(0.1, 5, 5, dtype=torch.float64)
    model = mlp()

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return F.cross_entropy(m(b[0]), b[1], weight=weights)

    want = gradients(model, loss, (inputs, classes))
    work = Workload(model, (inputs, classes), loss=loss, count=lambda b: weights[b[1]].sum(), optimizer=Capture)
    parts = open_parts(work)
    train_window(parts, list(cut((inputs, classes), (5, 3))), (5, 3))
    assert distance(parts.optimizer.seen[-1], want) <= FP64


@pytest.mark.parametrize("sizes", [(8,), (4, 4)])
@pytest.mark.parametrize("extra", ["logits", "three"])
def test_a_tuple_that_is_no_sum_and_count_is_refused(sizes: tuple[int, ...], extra: str) -> None:
    def loss(m: nn.Module, b: Any) -> Any:
        logits = m(b[0])
        mean = F.cross_entropy(logits, b[1])
        return (mean, logits) if extra == "logits" else (mean, len(logits), 1)

    parts = open_parts(Workload(mlp(), vectors(8), loss=loss, optimizer=Capture))
    with pytest.raises(UsageError, match=r"not \(sum, count\)"):
        train_window(parts, list(cut(vectors(8), sizes)), sizes)
