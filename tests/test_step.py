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

from autoaccum import LossTerms, NotFinite, UsageError, Workload
from autoaccum.simulation.solver import split_within
from autoaccum.state.rng import same_state, take_rng
from autoaccum.window.step import TrainingContext, open_context, train_window
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


def window_of(context: TrainingContext, batch: Any, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    train_window(context, list(cut(batch, sizes)), sizes)
    assert isinstance(context.optimizer, Capture)
    return context.optimizer.seen[-1]


def mean_of_samples(model: nn.Module, batch: Any) -> torch.Tensor:
    """Has no labels to count: it is weighted by samples."""
    return (model(batch[0]).square().sum(1) * batch[0][:, 0]).mean()


@DTYPES
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("loss", [default_loss, pair_sum, mean_of_samples])
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
    whole = (default_loss if loss is pair_sum else loss)(model, batch)
    assert float(result.loss) == pytest.approx(float(whole.detach()), rel=1e-5)


@pytest.mark.parametrize("sizes", [(16, 16, 1), (60, 4), (16,) * 6 + (4,), (1, 1, 30)], ids=str)
@pytest.mark.parametrize("loss", [default_loss, pair_sum])
def test_a_smaller_last_micro_batch_weighs_what_it_holds(loss: Callable[..., Any], sizes: tuple[int, ...]) -> None:
    model, batch = mlp(), vectors(sum(sizes))
    want = gradients(model, loss, batch)
    naive = mean_of([gradients(model, loss, piece) for piece in cut(batch, sizes)])
    got = window_of(open_context(Workload(model, loss=loss, optimizer=Capture)), batch, sizes)
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
def test_a_micro_batch_that_counts_nothing_adds_nothing_and_no_nan(given: bool) -> None:
    model, batch = tagger(), ragged()
    batch["labels"][8:16] = IGNORED
    count = token_count if given else None
    got = window_of(open_context(Workload(model, loss=token_sum, optimizer=Capture, count=count)), batch, (8,) * 8)
    assert all(bool(g.isfinite().all()) for g in got)
    assert distance(got, gradients(model, token_sum, batch)) <= FP64


def masked_mean(model: nn.Module, batch: Any) -> torch.Tensor:
    """By hand, 0 / 0 where nothing counts: its gradient is NaN then."""
    kept = (batch["labels"] != IGNORED).double()
    losses = F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * kept.flatten()).sum() / kept.sum()


@pytest.mark.parametrize("sizes", [(16,), (4,) * 4], ids=["k = 1", "k = 4"])
@pytest.mark.parametrize(
    ("loss", "count"),
    [(token_sum, None), (token_sum, token_count), (masked_mean, token_count)],
    ids=["counted by forward", "count=", "mean with count="],
)
def test_a_window_in_which_nothing_counts_leaves_everything_bit_equal(
    loss: Callable[..., Any], count: Any, sizes: tuple[int, ...]
) -> None:
    model, batch = tagger(), ragged(16)
    work = Workload(
        model,
        loss=loss,
        count=count,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        scaler=None,
        clip_grad_norm=1.0,
    )
    context = open_context(work)
    assert train_window(context, list(cut(batch, sizes)), sizes).stepped  # there is momentum now
    before, state = state_of(model), copy.deepcopy(context.optimizer.state_dict())
    batch["labels"][:] = IGNORED
    result = train_window(context, list(cut(batch, sizes)), sizes)
    assert not result.stepped
    assert same_tensors(state_of(model), before)
    assert str(context.optimizer.state_dict()) == str(state)
    assert context.scheduler.last_epoch == 1
    assert all(p.grad is None for p in model.parameters())


def test_a_mean_of_nothing_in_one_micro_batch_adds_nothing() -> None:
    model, batch = tagger(), ragged(16)
    batch["labels"][4:8] = IGNORED
    context = open_context(Workload(model, loss=masked_mean, count=token_count, optimizer=Capture))
    result = train_window(context, list(cut(batch, (4,) * 4)), (4,) * 4)
    assert bool(result.loss.isfinite())
    assert result.stepped


# --- terms that come on top --------------------------------------------------------------------------------------


def penalty(model: nn.Module) -> torch.Tensor:
    return 0.3 * sum((p**2).sum() for p in model.parameters())


def penalized(model: nn.Module, batch: Any) -> LossTerms:
    total, count = token_sum(model, batch)
    return LossTerms(total, count, penalty(model))


@pytest.mark.parametrize("given", [False, True], ids=["counted by forward", "count="])
@pytest.mark.parametrize("sizes", [(16,), (8, 8), (2,) * 8, (11, 3, 2)], ids=str)
def test_a_penalty_given_apart_counts_once(sizes: tuple[int, ...], given: bool) -> None:
    def whole(m: nn.Module, b: Any) -> torch.Tensor:
        total, count = token_sum(m, b)
        return total / count + penalty(m)

    model, batch = tagger(), ragged(16)
    want = gradients(model, whole, batch)
    count = token_count if given else None
    context = open_context(Workload(model, loss=penalized, count=count, optimizer=Capture))
    result = train_window(context, list(cut(batch, sizes)), sizes)
    assert distance(context.optimizer.seen[-1], want) <= FP64  # type: ignore[attr-defined]
    assert float(result.loss) == pytest.approx(float(whole(model, batch).detach()), rel=1e-12)
    if len(sizes) == 8:  # the usual mistake: the sum is divided by the window's count, the penalty isn't
        counted = int(token_count(batch))
        context_of = [
            gradients(model, lambda m, b: token_sum(m, b)[0] / counted + penalty(m), p) for p in cut(batch, sizes)
        ]
        assert distance(mean_of(context_of, [1.0] * 8), want) > NAIVE


def test_a_term_of_each_micro_batch_is_weighted_by_samples() -> None:
    def spread(logits: torch.Tensor) -> torch.Tensor:
        return logits.std()

    def loss(m: nn.Module, b: Any) -> LossTerms:
        logits = m(b[0])
        return LossTerms(F.cross_entropy(logits, b[1], reduction="sum"), len(b[1]), spread(logits))

    model, batch, sizes = mlp(), vectors(16), (10, 6)
    aux = [gradients(model, lambda m, b: spread(m(b[0])), piece) for piece in cut(batch, sizes)]
    want = mean_of([gradients(model, default_loss, batch), *aux], [1, 10 / 16, 6 / 16])
    got = window_of(open_context(Workload(model, loss=loss, optimizer=Capture)), batch, sizes)
    assert distance(got, want) <= FP64


def watched(
    loss: Callable[..., Any], count: Callable[..., Any] | None = None, model: nn.Module | None = None
) -> tuple[TrainingContext, list[str]]:
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
    context = open_context(Workload(model, loss=loss, optimizer=Capture, count=counted if count else None))
    context.optimizer.register_step_post_hook(lambda *_: events.append("step"))
    return context, events


def test_the_count_of_the_window_is_known_before_its_first_backward() -> None:
    context, events = watched(token_sum)
    for first in (True, False):
        window_of(context, ragged(16), (4, 4, 4, 4))
        before = events[: events.index("forward")]
        assert before.count("counting forward") == 4 + first  # the very first asks whether it is a pair
        assert events[len(before) :] == ["forward", "backward"] * 4 + ["step"]
        events.clear()


def test_count_spares_the_counting_forward() -> None:
    context, events = watched(token_sum, token_count)
    window_of(context, ragged(16), (4, 4, 4, 4))
    assert events == ["count"] * 4 + ["forward", "backward"] * 4 + ["step"]


def test_a_window_of_one_micro_batch_brings_its_own_count() -> None:
    context, events = watched(token_sum)
    window_of(context, ragged(16), (16,))
    assert events == ["forward", "backward", "step"]


def test_a_mean_is_asked_once_whether_it_is_a_pair_and_never_counted() -> None:
    context, events = watched(lambda m, b: default_loss(m, b), model=mlp())
    for extra in (1, 0):
        window_of(context, vectors(16), (4, 4, 4, 4))
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
        context = open_context(Workload(model, loss=token_sum, optimizer=Capture, count=count))
        torch.manual_seed(5)
        got = [window_of(context, ragged(16), (4, 4, 4, 4)) for _ in range(2)]
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
    got = window_of(open_context(Workload(model, loss=popping, optimizer=Capture)), ragged(16), (4, 4, 4, 4))
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
    clip = nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", lambda *a, **k: (count("clip"), clip(*a, **k))[1])
    work = Workload(
        mlp(),
        vectors(2),
        optimizer=lambda params: Capture(params, lr=1.0),
        scheduler=lambda optimizer: CountedSchedule(optimizer, count),
        clip_grad_norm=1e-3,
        between_steps=lambda model: count("between"),
    )
    runner = runner_for(work, 16, 4)
    runner.context.optimizer.register_step_post_hook(lambda *_: count("optimizer"))
    results = list(runner.epoch([vectors(24), vectors(18)]))  # 16, 16, 10
    assert [result.samples for result in results] == [16, 16, 10]
    assert count.calls == dict.fromkeys(["clip", "optimizer", "schedule", "between"], 3)
    assert runner.context.optimizer.param_groups[0]["lr"] == 0.5**3


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
    assert runner.context.scaler.get_scale() == 2.0**9
    assert count.calls == dict.fromkeys(["unscale", "step", "update"], 1)
    assert all(p.grad is None for p in model.parameters())
    assert runner.step(vectors(16, dtype)).stepped  # and the next one trains
    assert count.calls["schedule"] == 1


@pytest.mark.parametrize("clip", [None, 1e-2])
@pytest.mark.parametrize("choice", ["skip", "raise", "warn", None])
def test_what_happens_to_a_gradient_that_is_not_finite_is_the_users_choice(
    choice: str | None, clip: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = mlp(), vectors(16)
    batch[0][5] = float("nan")  # micro-batch 2 of 4
    before = state_of(model)
    work = Workload(
        model,
        vectors(2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        clip_grad_norm=clip,
        on_nonfinite=choice,
    )
    runner = runner_for(work, 16, 4)
    if choice == "raise":
        with pytest.raises(NotFinite, match="isn't finite"):
            runner.step(batch)
    else:
        assert runner.step(batch).stepped == (choice != "skip")
    untouched = choice in ("skip", "raise")
    assert same_tensors(state_of(model), before) == untouched
    assert runner.context.scheduler.last_epoch == int(not untouched)
    assert ("isn't finite" in caplog.text) == (choice in ("skip", "warn"))
    assert all(p.grad is None for p in model.parameters())
    if untouched:
        assert runner.step(vectors(16)).stepped


def test_a_scaler_and_a_choice_for_what_is_not_finite_go_together() -> None:
    dtype = torch.float32
    model, batch = mlp(dtype), vectors(16, dtype)
    batch[0][5] = float("inf")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    runner = runner_for(Workload(model, vectors(2, dtype), scaler=scaler, on_nonfinite="raise"), 16, 4)
    with pytest.raises(NotFinite):
        runner.step(batch)
    assert scaler.get_scale() == 2.0**9  # so that it may fit next time


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 1, 1, 1)], ids=str)
def test_what_is_in_no_group_of_the_optimizer_adds_up_nowhere(sizes: tuple[int, ...]) -> None:
    model = mlp()
    optimizer = Capture(list(model.parameters())[:2])
    window_of(open_context(Workload(model, optimizer=optimizer)), vectors(4), sizes)
    assert all(p.grad is None for p in model.parameters())


def test_the_default_loss_weighs_micro_batches_by_the_classes_that_are_not_ignored() -> None:
    inputs, classes = vectors(8)
    classes[:3] = -100
    classes[5] = -100
    model = mlp()
    want = gradients(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (inputs, classes))
    context = open_context(Workload(model, (inputs, classes), optimizer=Capture))
    pieces = list(cut((inputs, classes), (3, 3, 2)))  # nothing counts in the first
    train_window(context, pieces, (3, 3, 2))
    assert distance(context.optimizer.seen[-1], want) <= FP64
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
    context = open_context(work)
    train_window(context, list(cut((inputs, classes), (5, 3))), (5, 3))
    assert distance(context.optimizer.seen[-1], want) <= FP64


@pytest.mark.parametrize("sizes", [(8,), (4, 4)])
@pytest.mark.parametrize("extra", ["logits", "three"])
def test_a_tuple_that_is_no_sum_and_count_is_refused(sizes: tuple[int, ...], extra: str) -> None:
    def loss(m: nn.Module, b: Any) -> Any:
        logits = m(b[0])
        mean = F.cross_entropy(logits, b[1])
        return (mean, logits) if extra == "logits" else (mean, len(logits), 1)

    context = open_context(Workload(mlp(), vectors(8), loss=loss, optimizer=Capture))
    with pytest.raises(UsageError, match=r"not \(sum, count\)"):
        train_window(context, list(cut(vectors(8), sizes)), sizes)
