"""Losses over the representations of a whole window: the gradient of the whole batch, with the same dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP64,
    Capture,
    cut,
    distance,
    one_thread,  # noqa: F401
    runner_for,
    same_tensors,
    state_of,
    vectors,
)
from torch import nn

from autoaccum import Plan, UsageError, Workload, fit_plan
from autoaccum.devices.cpu.recorder import record
from autoaccum.phases import FIRST, LATER
from autoaccum.simulation.recording import live_peak
from autoaccum.state.rng import put_rng, same_state, take_rng
from autoaccum.window.step import open_context, train_window

SIZES = (7, 5, 4)
Gradients = list[torch.Tensor]


class Encoder(nn.Module):
    """Two layers with dropout, and a temperature that only the loss uses."""

    def __init__(self, *norm: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 16), *norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 8), nn.Dropout(0.3)
        )
        self.scale = nn.Parameter(torch.tensor(2.0))


def encoder(*norm: nn.Module) -> Encoder:
    torch.manual_seed(0)
    return Encoder(*norm).double()


def encode_pair(model: Any, batch: Any) -> Any:
    """Two views, as contrastive learning has them, and the class."""
    return {"one": model.body(batch[0]), "two": model.body(batch[0].flip(1)), "label": batch[1]}


def info_nce(model: Any, found: Any) -> torch.Tensor:
    scores = F.normalize(found["one"], dim=1) @ F.normalize(found["two"], dim=1).T
    return F.cross_entropy(scores * model.scale.exp(), torch.arange(len(scores)))


def supervised_contrastive(model: Any, found: Any) -> torch.Tensor:
    z = F.normalize(found["one"], dim=1)
    scores = (z @ z.T * model.scale.exp()).fill_diagonal_(-1e9)
    same = (found["label"][:, None] == found["label"]).double().fill_diagonal_(0)
    return -(scores.log_softmax(1) * same).sum() / same.sum()


def batch_hard(model: Any, found: Any) -> torch.Tensor:
    apart = torch.cdist(found["one"], found["one"] + 1e-3)
    same = found["label"][:, None] == found["label"]
    farthest = apart.masked_fill(~same, 0).amax(1)
    nearest = apart.masked_fill(same, 1e9).amin(1)
    return F.softplus(farthest - nearest).mean()


def barlow_twins(model: Any, found: Any) -> torch.Tensor:
    one, two = ((z - z.mean(0)) / z.std(0) for z in (found["one"], found["two"]))
    c = one.T @ two / len(one)
    return (c.diagonal() - 1).square().sum() + 0.01 * c.masked_fill(torch.eye(len(c), dtype=bool), 0).square().sum()


def dice(model: Any, found: Any) -> torch.Tensor:
    chosen, label = found["one"].softmax(1), F.one_hot(found["label"], 8)
    return 1 - 2 * (chosen * label).sum() / (chosen.sum() + label.sum())


def pairs_auc(model: Any, found: Any) -> torch.Tensor:
    scores, positive = found["one"][:, 0], found["label"] < 2
    return torch.sigmoid(scores[~positive][None] - scores[positive][:, None]).mean()


def weighted_classes(model: Any, found: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.linspace(0.1, 5, 8, dtype=torch.float64)
    total = F.cross_entropy(found["one"], found["label"], weights, reduction="sum")
    return total, weights[found["label"]].sum()


LOSSES = [info_nce, supervised_contrastive, batch_hard, barlow_twins, dice, pairs_auc, weighted_classes]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def together(model: nn.Module, loss: Callable[..., Any], batch: Any, sizes: tuple[int, ...]) -> tuple[Gradients, Any]:
    """All encodings in one graph, drawn in the order of the micro-batches; then the loss: what doesn't fit."""
    twin = copy.deepcopy(model)
    found = [encode_pair(twin, piece) for piece in cut(batch, sizes)]
    joined = {key: torch.cat([each[key] for each in found]) for key in found[0]}
    out = loss(twin, joined)
    value = out[0] / out[1] if isinstance(out, tuple) else out
    value.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()], value.detach()


class Filled(Capture):
    """Takes a missing gradient for zero: not every loss uses the temperature."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        self.seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params])


def cached(model: nn.Module, loss: Any, batch: Any, sizes: tuple[int, ...], **more: Any) -> tuple[Gradients, Any]:
    context = open_context(Workload(model, batch, encode=encode_pair, loss=loss, optimizer=Filled, **more))
    result = train_window(context, list(cut(batch, sizes)), sizes)
    return context.optimizer.seen[-1], result  # type: ignore[attr-defined]


@EVERY_LOSS
@pytest.mark.parametrize("sizes", [SIZES, (16,), (2,) * 8], ids=str)
def test_it_is_the_gradient_of_all_representations_in_one_graph(loss: Any, sizes: tuple[int, ...]) -> None:
    model, batch = encoder(), vectors(16)
    rng = take_rng()
    want, value = together(model, loss, batch, sizes)
    after = take_rng()
    put_rng(rng)
    got, result = cached(model, loss, batch, sizes)
    assert distance(got, want) <= FP64
    assert float(result.loss) == pytest.approx(float(value), rel=1e-12)
    now = take_rng()
    assert all(
        same_state(now[name], state) for name, state in after.items()
    )  # what comes after draws what it would have drawn


def test_without_the_random_states_it_would_be_the_gradient_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = encoder(), vectors(16)
    rng = take_rng()
    want, _ = together(model, info_nce, batch, SIZES)
    monkeypatch.setattr("autoaccum.window.cached_representations.put_rng", lambda state: None)
    put_rng(rng)
    got, _ = cached(model, info_nce, batch, SIZES)
    assert distance(got, want) > 0.5


def test_it_costs_one_more_forward() -> None:
    model, batch, forwards = encoder(), vectors(16), list[bool]()
    model.body.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    cached(model, info_nce, batch, SIZES)
    assert forwards == [False] * 6 + [True] * 6  # two views of three micro-batches
    forwards.clear()
    cached(model, info_nce, batch, (16,))
    assert forwards == [True] * 2  # one micro-batch needs no cache


@pytest.mark.parametrize("how", [None, "merged", "frozen"])
def test_batch_statistics_are_counted_once_per_forward(how: str | None) -> None:
    model, batch = encoder(nn.BatchNorm1d(16)), vectors(16)
    twin = copy.deepcopy(model)
    rng = take_rng()
    if how == "frozen":
        twin.body[1].eval()
    want, _ = together(twin, info_nce, batch, SIZES)
    if how != "merged":
        for piece in cut(batch, SIZES):
            encode_pair(twin, piece)  # once each: what together did on its copy
    put_rng(rng)
    got, _ = cached(model, info_nce, batch, SIZES, batchnorm=how)
    assert distance(got, want) <= FP64
    if how == "merged":
        assert int(model.body[1].num_batches_tracked) == 2  # two views, once a window
        encode_pair(twin, batch)
        assert torch.allclose(model.body[1].running_mean, twin.body[1].running_mean, rtol=0, atol=1e-12)
        assert torch.allclose(model.body[1].running_var, twin.body[1].running_var, rtol=0, atol=1e-12)
    else:
        assert same_tensors(state_of(model.body[1]), state_of(twin.body[1]))


def test_a_scaler_scales_once() -> None:
    model, batch = encoder(), vectors(16)
    rng = take_rng()
    want, _ = together(model, info_nce, batch, SIZES)
    put_rng(rng)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    got, result = cached(model, info_nce, batch, SIZES, scaler=scaler)
    assert distance(got, want) <= FP64
    assert result.stepped and scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("at", ["first", "second", "backward"])
def test_an_out_of_memory_starts_the_window_over(at: str) -> None:
    model, batch, failed = encoder(), vectors(16), list[int]()
    rng = take_rng()
    want, _ = together(model, info_nce, batch, (3, 3, 2, 2, 2, 2, 2))  # 6, 5 and 5 cut by what comes after

    def encode(m: Any, b: Any) -> Any:
        found = encode_pair(m, b)
        wanted = torch.is_grad_enabled() == (at != "first")
        if len(b[0]) > 3 and wanted and at != "backward" and len(failed) < 3:
            failed.append(1)
            raise torch.OutOfMemoryError("short")
        if len(b[0]) > 3 and at == "backward" and torch.is_grad_enabled():
            found["one"].register_hook(lambda grad: (_ for _ in ()).throw(torch.OutOfMemoryError("short")))
        return found

    work = Workload(model, vectors(2), encode=encode, loss=info_nce, optimizer=Filled)
    runner = runner_for(work, 16, 6)
    put_rng(rng)
    result = runner.step(batch)
    assert result.retries >= 1
    put_rng(rng)
    want, _ = together(model, info_nce, batch, result.split)
    assert distance(runner.context.optimizer.seen[-1], want) <= FP64  # type: ignore[attr-defined]


def test_representations_are_in_the_recorded_window() -> None:
    wide = nn.Linear(6, 4096).double()
    context = open_context(
        Workload(wide, vectors(7), encode=lambda m, b: m(b[0]), loss=lambda m, z: (z.T @ z).tanh().mean())
    )
    batch = vectors(7)

    def run(on_phase: Any) -> None:
        train_window(context, [batch, batch], (7, 7), on_phase=on_phase)

    recorded = record(run, micro_batch=7)
    first = next(phase for phase in recorded.phases if phase.name == FIRST)
    assert sum(event.bytes == 7 * 4096 * 8 for event in first.events) >= 2  # those of each micro-batch
    assert sum(event.bytes == 14 * 4096 * 8 for event in first.events) >= 2  # joined, and their gradient
    assert [phase.name for phase in recorded.phases][:2] == [FIRST, LATER]


@pytest.mark.parametrize("n", [7, 11])
def test_a_short_window_that_stands_for_a_longer_one_takes_its_loss(n: int) -> None:
    samples, shapes = 15 * n, list[Any]()

    def loss(model: Any, z: Any) -> torch.Tensor:
        shapes.append(z.shape)
        return (z @ z.T).tanh().mean()

    def peak(context: Any, steps: int) -> int:
        pieces = [vectors(n)] * steps
        recorded = record(lambda on: train_window(context, pieces, (n,) * steps, on_phase=on), micro_batch=n)
        return live_peak(phase for phase in recorded.phases if phase.name == FIRST)

    def context_of() -> Any:
        model = nn.Linear(6, 512).double()
        context = open_context(Workload(model, vectors(7), encode=lambda m, b: m(b[0]), loss=loss))
        train_window(context, [vectors(n)], (n,))
        return context

    short, long = context_of(), context_of()
    short.window_samples = samples
    states = 13 * torch.get_rng_state().nbytes  # of the micro-batches that there are not
    assert peak(short, 2) == pytest.approx(peak(long, 15) - states, rel=1e-3)
    assert shapes[2] == (samples, 512)
    assert peak(context_of(), 2) < 0.5 * peak(long, 15)  # which is why


def test_representations_that_cannot_be_joined_are_refused() -> None:
    def ragged(model: Any, batch: Any) -> Any:
        return model.body(batch[0])[:, : len(batch[0])]

    context = open_context(Workload(encoder(), vectors(6), encode=ragged, loss=lambda m, z: z.sum()))
    with pytest.raises(UsageError, match="can't be joined"):
        train_window(context, list(cut(vectors(6), (4, 2))), (4, 2))


def test_encode_without_a_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="without loss="):
        Workload(encoder(), vectors(6), encode=encode_pair)


def test_a_mixture_of_experts_auxiliary_loss_is_exact_over_router_logits() -> None:
    """The load balance is a product of two means: not a sum over micro-batches, but a function of what routes."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).train()
    ids = torch.randint(32, (8, 6))
    batch = {"input_ids": ids, "labels": ids}

    def encode(m: Any, b: Any) -> Any:
        out = m(input_ids=b["input_ids"])
        routed = tuple(each.reshape(len(b["input_ids"]), -1, 4) for each in out.router_logits)
        return {"logits": out.logits, "routed": routed, "labels": b["labels"]}

    def loss(m: Any, found: Any) -> torch.Tensor:
        main = m.loss_function(found["logits"], found["labels"], 32)
        return main + 0.5 * load_balancing_loss_func(tuple(z.reshape(-1, 4) for z in found["routed"]), 4, 2)

    twin = copy.deepcopy(model)
    twin(**batch).loss.backward()
    context = open_context(Workload(model, batch, encode=encode, loss=loss, optimizer=Filled))
    train_window(context, list(cut(batch, (3, 3, 2))), (3, 3, 2))
    want = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]
    assert distance(context.optimizer.seen[-1], want) <= 1e-5  # type: ignore[attr-defined]


def test_all_representations_are_in_the_plans_prediction() -> None:
    """They take what the window has, not what a micro-batch has: predicted from short windows, held to a whole one."""

    def loss(model: nn.Module, z: torch.Tensor) -> torch.Tensor:
        return (z - z.mean(0)).square().mean()

    def planned(samples: int) -> tuple[Workload, Plan]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 1024), nn.Dropout(0.3))
        work = Workload(model, vectors(4, torch.float32), encode=lambda m, b: m(b[0]), loss=loss)
        how = {"target_batch": samples, "max_micro_batch": 256, "check": False, "train_in_new_process": True}
        return work, fit_plan(work, **how, verify=False)

    work, plan = planned(8192)
    context, pieces = open_context(work), [vectors(256, torch.float32)] * 32
    train_window(context, pieces[:1], (256,))  # the optimizer's state
    whole = record(lambda on: train_window(context, pieces, (256,) * 32, on_phase=on), micro_batch=256)
    increment = plan.predicted_peak_bytes - plan.memory.baseline_bytes
    assert abs((increment - plan.memory.input_bytes) / live_peak(whole.phases) - 1) < 0.03
    _, short = planned(1024)
    representations = (8192 - 1024) * 1024 * 4
    assert (
        increment - (short.predicted_peak_bytes - short.memory.baseline_bytes) > 2 * representations
    )  # and their gradient
