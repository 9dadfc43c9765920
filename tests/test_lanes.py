"""Lanes: a window's micro-batches meet where samples interact, and its gradient is one whole batch's."""

from __future__ import annotations

import contextlib
import copy
import gc
import signal
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import FP32, FP64, NAIVE, Capture, cut, one_thread, runner_for, seen, vectors  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoaccum
from autoaccum import OutOfMemory, UsageError, Workload
from autoaccum.exactness import check
from autoaccum.window import norms
from autoaccum.window.lanes import host_buffers, host_store, torch_internals
from autoaccum.window.lanes.backward_order import BackwardOrder
from autoaccum.window.lanes.baton import Lane, LanesEnded, Request, current_lane, run_lanes
from autoaccum.window.lanes.thread_state import ThreadState
from autoaccum.window.step import WindowResult, open_context, train_window
from autoaccum.workload import default_loss

SIZES = (7, 1, 4, 4)
UNCHANGED = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


def images(n: int = 16, depth: tuple[int, ...] = (6, 6), dtype: torch.dtype = torch.float64) -> Any:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, *depth, generator=g, dtype=torch.float64)
    return (x * torch.linspace(0.2, 3, n).reshape(-1, *[1] * (x.dim() - 1)) + 0.5).to(dtype), torch.arange(n) % 5


def net(norm: nn.Module, conv: Any = nn.Conv2d, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(2, 4, 3), norm, nn.ReLU(), conv(4, 3, 2), nn.Flatten(), nn.LazyLinear(5)).to(dtype)


def ready(model: nn.Module, batch: Any, loss: Any = default_loss) -> nn.Module:
    """The model with all its parameters made, and statistics as though it had been trained."""
    loss(model, batch)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            torch.manual_seed(1)
            module.running_mean.uniform_(-1, 1)  # type: ignore[operator,union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[operator,union-attr]
    return model


def lanes(model: nn.Module, batch: Any, sizes: tuple[int, ...] = SIZES, **more: Any) -> tuple[Any, WindowResult]:
    more = {"batchnorm": "exact", "loss": default_loss, **more}
    context = open_context(Workload(model, batch, optimizer=Capture, **more))
    result = train_window(context, list(cut(batch, sizes)), sizes)
    return context.optimizer.seen[-1], result  # type: ignore[attr-defined]


def whole(model: nn.Module, batch: Any, loss: Any = default_loss) -> tuple[Any, torch.Tensor]:
    out = loss(model, batch)
    out.backward()
    return [p.grad for p in model.parameters()], out.detach()


def distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The relative L2 distance of the flat gradients, and of the worst tensor where that is no mere rounding.

    A bias before a normalization has a gradient of 0: only rounding is left of it.
    """
    floor = 1e-3 * torch.cat([each.double().flatten() for each in want]).norm()
    apart = [(a.double() - b.double()).flatten() for a, b in zip(got, want, strict=True)]
    worst = max(float(off.norm() / max(b.double().norm(), floor)) for off, b in zip(apart, want, strict=True))
    return max(worst, flat_distance(got, want))


def flat_distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The relative L2 distance of the flat gradients: in half precision, a gradient of 0 is all rounding."""
    one, other = (torch.cat([each.double().flatten() for each in side]) for side in (got, want))
    return float((one - other).norm() / other.norm())


def agree(
    model: nn.Module, batch: Any, loss: Any = default_loss, limit: float = FP64, plain: Any = None, **more: Any
) -> None:
    """Gradient, loss and buffers of a window in lanes are those of one whole batch, by `plain` where that is given.

    Of lanes that normalize as one batch, and of those that each save their own, as on a GPU: where hooks see it.
    """
    ready(model, batch, loss)
    seen_by_hooks, twin = copy.deepcopy(model), copy.deepcopy(model)
    want, want_loss = whole(twin, batch, plain or loss)
    for each, hooks in ((model, contextlib.nullcontext()), (seen_by_hooks, UNCHANGED)):
        with hooks:
            got, result = lanes(each, batch, loss=loss, **more)
        assert distance(got, want) <= limit
        assert abs(float(result.loss - want_loss)) <= limit * max(1.0, abs(float(want_loss)))
        for (name, mine), theirs in zip(each.named_buffers(), twin.buffers(), strict=True):
            assert torch.allclose(mine, theirs, rtol=limit, atol=limit), name


class Scaled(nn.BatchNorm2d):
    """A normalization as frameworks derive them: more than torch's own forward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input) + 1


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, momentum=0.7, eps=0.1),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        Scaled(4),
    ],
    ids=str,
)
def test_images(norm: nn.Module) -> None:
    for _ in range(2):  # a second window finds the first one's threads and statistics
        agree(copy.deepcopy(net(norm)), images())


def test_timms_normalization_with_its_activation() -> None:
    layers = pytest.importorskip("timm.layers")
    agree(net(layers.BatchNormAct2d(4)), images())


def test_vectors_sequences_and_volumes() -> None:
    torch.manual_seed(0)
    agree(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double(), vectors(16))
    agree(net(nn.BatchNorm1d(4), nn.Conv1d), images(depth=(9,)))
    agree(net(nn.BatchNorm3d(4), nn.Conv3d), images(depth=(5, 4, 5)))


def test_channels_last_and_single_precision() -> None:
    x, y = images(dtype=torch.float32)
    model = ready(net(nn.BatchNorm2d(4), dtype=torch.float32), (x, y))
    agree(model.to(memory_format=torch.channels_last), (x.to(memory_format=torch.channels_last), y), limit=FP32)


class Tangled(nn.Module):
    """Norms used twice, shared between branches, in evaluation mode and on what needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.still = nn.BatchNorm1d(6), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.still.eval()
        x = self.first(x)
        branches = self.shared(self.one(x)) + torch.tanh(self.shared(self.two(x)))
        with torch.no_grad():
            target = self.shared(branches)
        return self.head(self.still(self.shared(branches)) + target)


def test_norms_used_twice_shared_frozen_and_without_gradients() -> None:
    torch.manual_seed(0)
    agree(Tangled().double(), vectors(16))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "squeeze", pytest.param("densenet121", marks=pytest.mark.slow)]
)
def test_models_of_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")

    torch.manual_seed(0)
    if name == "squeeze":  # the whole table: python -m benchmarks.lanes --exactness
        model: nn.Module = net(nn.BatchNorm2d(4))
    else:
        small = {"densenet121": {"block_config": (2, 2), "growth_rate": 8, "num_init_features": 8}}.get(name)
        make = torchvision.models.DenseNet if small else getattr(torchvision.models, name)
        model = make(num_classes=5, **(small or {}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = torch.randn(6, 2 if name == "squeeze" else 3, 32, 32).double(), torch.arange(6) % 5
    agree(model.double(), batch, sizes=(3, 2, 1))


def test_sums_counts_ignored_labels_and_representations() -> None:
    def summed(model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    batch = vectors(16)
    batch[1][:6] = -100
    batch[1][7] = -100  # all of the second micro-batch
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()
    agree(copy.deepcopy(model), batch)
    got, result = lanes(copy.deepcopy(model), vectors(16), loss=summed)
    want, loss = whole(copy.deepcopy(model), vectors(16))
    assert distance(got, want) <= FP64
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-12)
    got, _ = lanes(copy.deepcopy(model), vectors(16), encode=lambda m, b: m(b[0]), loss=lambda m, z: _info_nce(z))
    want, _ = whole(copy.deepcopy(model), vectors(16), lambda m, b: _info_nce(m(b[0])))
    assert distance(got, want) <= FP64


def _info_nce(z: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z @ z.flip(1).T, torch.arange(len(z)))


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
def test_spectral_normalization_iterates_in_the_first_lane_only(kind: str) -> None:
    norm = nn.utils.parametrizations.spectral_norm if kind == "parametrization" else nn.utils.spectral_norm

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), norm(nn.Linear(8, 5))).double()

    one, two, batch = made(), made(), vectors(16)
    want, _ = whole(one, batch)
    got, _ = lanes(two, batch)
    assert distance(got, want) <= FP64
    assert all(
        torch.equal(a, b) or torch.allclose(a, b, atol=FP64) for a, b in zip(one.buffers(), two.buffers(), strict=True)
    )


def test_without_hooks_one_node_gives_one_batchs_bits() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(16, 3, 4, 4), torch.randn(16, 3, 4, 4)

    def loss(model: Any, batch: Any) -> Any:
        out = F.relu(model(batch[0]), inplace=True)  # each lane writes into its own part of what all were given
        return (out * batch[1]).sum(), 1

    one, other, twin = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    (loss(twin, (x, weights))[0] / len(SIZES)).backward()
    got, _ = lanes(one, (x, weights), loss=loss)
    with UNCHANGED:
        lanes(other, (x, weights), loss=loss)
    want = [p.grad for p in twin.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(one.running_var, twin.running_var)  # type: ignore[arg-type]
    assert not torch.equal(other.running_var, twin.running_var)  # type: ignore[arg-type]


class Cropped(nn.Module):
    """Inputs whose length differs between micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.conv(x[..., : 5 + len(x)])))
        return self.out(hidden.mean(-1))  # type: ignore[no-any-return]


def test_lanes_of_different_lengths_share_their_statistics() -> None:
    torch.manual_seed(0)
    x, y = images(depth=(12,))
    model = Cropped().double()
    twin = copy.deepcopy(model)
    hidden = [twin.conv(part[..., : 5 + len(part)]) for part, _ in cut((x, y), SIZES)]
    values = torch.cat([each.transpose(1, 2).reshape(-1, 4) for each in hidden])
    normed = torch.tanh(F.batch_norm(values, None, None, twin.norm.weight, twin.norm.bias, True))
    ends = normed.split([each.shape[0] * each.shape[2] for each in hidden])
    pooled = [end.view(len(each), -1, 4).mean(1) for end, each in zip(ends, hidden, strict=True)]
    F.cross_entropy(twin.out(torch.cat(pooled)), y).backward()
    got, _ = lanes(model, (x, y))
    assert distance(got, [p.grad for p in twin.parameters()]) <= FP64  # type: ignore[misc]


def test_a_lane_whose_output_nothing_uses_counts_in_the_others_statistics() -> None:
    def loss(model: Any, batch: Any) -> Any:
        out = model[2:](model[1](model[0](batch[0])))
        return (F.cross_entropy(out, batch[1], reduction="sum") if len(batch[0]) != 1 else out.sum().detach() * 0), 1

    batch, model = vectors(16), norm_net()
    twin = copy.deepcopy(model)
    out = twin(batch[0])
    keep = [i for i in range(16) if i != 7]  # SIZES: the second micro-batch is sample 7
    (F.cross_entropy(out[keep], batch[1][keep], reduction="sum") / len(SIZES)).backward()
    for hooks in (contextlib.nullcontext(), UNCHANGED):
        with hooks:
            got, _ = lanes(copy.deepcopy(model), batch, loss=loss)
        assert distance(got, [p.grad for p in twin.parameters()]) <= FP64  # type: ignore[misc]


# What torch keeps for each thread, and draws


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_within_a_lane_stays_there(dtype: torch.dtype) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", dtype):
            hidden = model[1](model[0](batch[0]))  # type: ignore[index]
            assert hidden.dtype == dtype
        assert not torch.is_autocast_enabled("cpu")
        return F.cross_entropy(model[3](torch.tanh(hidden.float())), batch[1])  # type: ignore[index]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))
    batch = vectors(16, dtype=torch.float32)
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    want, _ = whole(twin, batch, loss)
    got, _ = lanes(model, batch, loss=loss, scaler=torch.amp.GradScaler("cpu") if dtype == torch.float16 else None)
    off, _ = lanes(plain, batch, (8, 4, 4), loss=loss, batchnorm=None)
    rounding = 2 * torch.finfo(dtype).eps
    assert flat_distance(got, want) <= rounding < 0.1 * flat_distance(off, want)


def test_precision_of_the_workload_covers_lanes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))
    batch = vectors(16, dtype=torch.float32)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        want, _ = whole(twin, batch)
    got, _ = lanes(model, batch, precision="bf16")
    assert flat_distance(got, want) <= 2 * torch.finfo(torch.bfloat16).eps


def dropping(**how: Any) -> Callable[[nn.Module, Any], torch.Tensor]:
    """A loss with random draws on both sides of a normalization, maybe checkpointed."""

    def inner(model: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = model[1](F.dropout(model[0](x), 0.4, True))
        return model[3](F.dropout(torch.tanh(model[1](hidden)), 0.4, True))  # type: ignore[no-any-return]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        x = batch[0].requires_grad_()
        out = checkpoint(inner, model, x, **how) if how else inner(model, x)
        return F.cross_entropy(out, batch[1])

    return loss


def test_draws_are_reproducible_and_checkpointing_repeats_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()
    found, twins = [], []
    for how in ({}, {}, {"use_reentrant": False}):
        twins.append(copy.deepcopy(model))
        torch.manual_seed(5)
        found.append(lanes(twins[-1], vectors(16), loss=dropping(**how))[0])
        after = torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert distance(found[2], found[0]) <= FP64
    assert all(torch.allclose(a, b, atol=FP64) for a, b in zip(twins[0].buffers(), twins[2].buffers(), strict=True))
    assert int(twins[2][1].num_batches_tracked) == 2
    torch.manual_seed(5)
    lanes(copy.deepcopy(model), vectors(16), loss=dropping())
    assert torch.equal(torch.rand(1), after)  # and the caller's draws go on the same way
    torch.manual_seed(6)
    assert distance(lanes(copy.deepcopy(model), vectors(16), loss=dropping())[0], found[0]) > NAIVE


def test_a_checkpointed_block_across_a_norm_has_the_whole_batchs_gradient() -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        x = batch[0].requires_grad_()
        return F.cross_entropy(checkpoint(lambda given: model(given), x, use_reentrant=False), batch[1])

    torch.manual_seed(0)
    agree(Tangled().double(), vectors(16), loss, plain=default_loss)  # torch's own repetition updates statistics twice


# One gradient through all lanes


def test_a_lane_goes_back_before_the_next_ones_share_of_the_loss() -> None:
    order, backward = BackwardOrder(is_on=False), []

    def watched(name: str, x: torch.Tensor) -> torch.Tensor:
        out = x * 2
        assert out.grad_fn is not None
        out.grad_fn.register_prehook(lambda *_: backward.append(name))
        return out

    ends = [watched(name, torch.ones(1, requires_grad=True)) for name in ("one", "two")]
    order.end_forward()
    loss = watched("share of one", ends[0]) + watched("share of two", ends[1])
    order.let_lanes_go_first(loss)
    loss.backward()
    assert backward == ["share of two", "two", "share of one", "one"]


def test_the_backward_goes_lane_by_lane_between_meetings() -> None:
    order: list[tuple[str, int]] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
            lane = current_lane()
            ctx.at = name, -1 if lane is None else lane.index
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            order.append(ctx.at)
            return grad, None

    def loss(model: Any, batch: Any) -> torch.Tensor:
        hidden = Watched.apply(Watched.apply(model[0](batch[0]), "a"), "b")
        hidden = Watched.apply(Watched.apply(model[1](hidden), "c"), "d")
        return F.cross_entropy(model[3](hidden), batch[1])

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()
    lanes(model, vectors(16), loss=loss)
    back = [(name, lane) for pair in (("d", "c"), ("b", "a")) for lane in (3, 2, 1, 0) for name in pair]
    assert order == back


# What is said of it


def test_check_finds_it_exact_and_a_loss_that_couples_samples_not() -> None:
    found = check.check(Workload(norm_net().float(), vectors(12, torch.float32), batchnorm="exact"), isolated=False)
    assert found.kind == "exact" and found.error <= FP64
    plain = check.check(Workload(norm_net().float(), vectors(12, torch.float32)), isolated=False)
    assert not plain.exact and "batchnorm='exact'" in plain.advice[1]
    coupled = Workload(
        norm_net().float(), vectors(12, torch.float32), loss=lambda m, b: _info_nce(m(b[0])), batchnorm="exact"
    )
    assert check.check(coupled, isolated=False).kind == "not decomposable"


def test_lightning_and_tune_refuse_it() -> None:
    from autoaccum.integrations.lightning import ExactAccumulation
    from autoaccum.tuning.tasks import facts_of

    with pytest.raises(UsageError, match="isn't tuned"):
        facts_of(Workload(norm_net(), vectors(4), batchnorm="exact"))

    with pytest.raises(UsageError, match="one after the other"):
        ExactAccumulation(16, batchnorm="exact")


# What waits on the host


def stored(
    monkeypatch: pytest.MonkeyPatch, limit_bytes: int | None = None, parts: int | None = None
) -> host_store.HostStore:
    """A store as a GPU's lanes have it, for tensors of this CPU, of any size."""
    monkeypatch.setattr(host_store, "THRESHOLD_BYTES", 1)
    monkeypatch.setattr(host_buffers, "BUFFER_BYTES", 1 << 12)
    store = host_store.HostStore(torch.device("cpu"), limit_bytes)

    def found(context: Any) -> host_store.HostStore:
        context.host_store = store
        store.begin((*context.model.parameters(), *context.model.buffers()), parts=parts)
        return store

    monkeypatch.setattr("autoaccum.window.lanes.training._host_store", found)
    return store


def test_what_is_saved_comes_back_from_buffers_that_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(monkeypatch)
    x, y = images()
    for batch in ((x, y), (x.to(memory_format=torch.channels_last), y)):
        agree(net(nn.BatchNorm2d(4)), batch)
        held = store.bytes
        assert held >= store.saved_bytes > x.nbytes
        assert store.returned_bytes > store.saved_bytes  # a norm's input comes back twice
        agree(net(nn.BatchNorm2d(4)), batch)
        assert store.bytes == held
    agree(Tangled().double(), vectors(16))


def test_parameters_and_what_two_operations_save_move_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(monkeypatch)
    model, x = nn.Linear(6, 8), torch.randn(4, 6, requires_grad=True)  # so that the weight is saved
    store.begin(tuple(model.parameters()))
    with store.moving(4):
        hidden = torch.relu(model(x))  # its result is saved by relu and by exp's neighbour
        out = (hidden * hidden.detach()).sum() + hidden.square().sum()
    assert store.saved_bytes == x.nbytes + hidden.nbytes
    out.backward()
    assert store.returned_bytes <= store.saved_bytes + 3 * hidden.nbytes


@pytest.mark.parametrize("samples", [2, 7])
def test_what_moves_is_decided_per_sample(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    store = stored(monkeypatch)
    store.begin((), bytes_per_sample=4 * 50)
    wide, narrow = (torch.randn(samples, n, requires_grad=True) for n in (60, 40))
    with store.moving(samples):
        (wide.exp().sum() + narrow.exp().sum()).backward()
    assert store.moved == [4 * 60 * samples]


def test_what_has_the_rows_of_all_lanes_moves_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(monkeypatch)
    store.begin((), bytes_per_sample=1 << 20)
    store.move_gathered({12})
    with store.moving(4):
        for shape in ((12, 3), (4, 3), (12,)):
            torch.ones(shape, requires_grad=True).exp()
    assert store.moved == [4 * 12 * 3]


def test_what_the_last_parts_save_stays_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for parts in (None, 0, 1, 2, 3):
        store = stored(monkeypatch, parts=parts)
        torch.manual_seed(0)
        norms = (nn.Sequential(nn.Conv2d(2 if i == 0 else 4, 4, 3), nn.BatchNorm2d(4), nn.SiLU()) for i in range(2))
        agree(nn.Sequential(*norms, nn.Flatten(), nn.LazyLinear(5)).double(), images())
        moved.append(store.moved)
    everything, *fewer = moved
    assert fewer[0] == [] and fewer[3] == everything  # two meetings, three parts
    assert 0 < sum(fewer[1]) < sum(fewer[2]) < sum(everything)
    assert fewer[1] == everything[: len(fewer[1])]


def test_what_stays_is_freed_with_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(monkeypatch)
    store.begin((), parts=0)
    with store.moving(1):
        out = torch.ones(100, requires_grad=True).exp()  # its node saves what it returns
    freed = weakref.ref(out)
    del out
    assert freed() is None and store.moved == []


def test_what_stayed_moves_after_an_out_of_memory() -> None:
    class Short(nn.Module):
        fails = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if Short.fails:
                Short.fails = False
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return x

    Short.fails = False
    model, batch = nn.Sequential(norm_net(), Short()).double(), vectors(24)
    work = Workload(model, vectors(4), optimizer=Capture, batchnorm="exact")
    plan = autoaccum.fit_plan(work, target_batch=24, max_micro_batch=8, check=False)
    want, _ = whole(copy.deepcopy(model), batch)
    runner = autoaccum.Runner(work, replace(plan, memory=replace(plan.memory, moved_parts=1)))
    Short.fails = True
    result = runner.step(batch)
    assert result.retries == 1 and result.split == (8, 8, 8) and runner.context.moved_parts is None
    assert distance(seen(runner)[-1], want) <= FP64


def test_buffers_use_what_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(monkeypatch)
    store.begin(())
    with store.moving(1):
        for n in (100, 900, 2000, 30, 1024, 1, 700):
            torch.randn(n, requires_grad=True).exp()
    assert len(store.moved) == 7 and store.bytes == host_buffers.buffer_bytes(store.moved) > 3 * 4096


def test_what_autocast_casts_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(monkeypatch)
    model, x = nn.Linear(6, 8), torch.randn(4, 6, requires_grad=True)
    store.begin(tuple(model.parameters()), cast=torch.bfloat16)
    with store.moving(4), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert store.moved == [2 * x.numel()]  # and not the weight's cast, which all lanes share


def test_what_is_needed_next_is_brought_back_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store, most = stored(monkeypatch), 0
    fetch = host_store.HostStore._fetch

    def counted(self: host_store.HostStore, kept: Any) -> Any:
        nonlocal most
        found = fetch(self, kept)
        most = max(most, (self._ahead is not None) + 1)
        return found

    monkeypatch.setattr(host_store.HostStore, "_fetch", counted)
    torch.manual_seed(0)
    layers = [nn.Conv2d(2 if i == 0 else 4, 4, 3, padding=1) for i in range(4)]
    inner = (each for conv in layers for each in (conv, nn.BatchNorm2d(4), nn.ReLU()))
    agree(nn.Sequential(*inner, nn.Flatten(), nn.LazyLinear(5)).double(), images())
    saves = len(store.moved)
    assert saves > 30 and store.late <= 2  # the first that is needed, and one that is needed with another
    assert store._ahead is None and most == 1


def test_tensors_that_are_asked_for_twice_or_never_come_back_right(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return grad * ctx.saved_tensors[1], grad * ctx.saved_tensors[0]

    store = stored(monkeypatch)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    store.begin(())
    with store.moving(6):
        unused = [(x.detach().requires_grad_() * i).exp() for i in range(8)]
        y = Greedy.apply(x.sin(), x.cos())
    y.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, (2 * x).cos())
    assert store._ahead is not None  # of those that nobody asks for
    unused[0].sum().backward()
    store.end()
    assert store._ahead is None and not store._saves


def test_a_host_that_is_too_small_is_named_before_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(monkeypatch, limit_bytes=5000)
    with pytest.raises(OutOfMemory, match=r"more than 4\.9 KiB on the host"):
        lanes(ready(net(nn.BatchNorm2d(4)), images()), images())
    assert store.bytes <= 5000


def test_a_plan_for_a_cpu_is_that_of_one_micro_batch_and_trains() -> None:
    model, batch = norm_net(), vectors(24)
    work = Workload(model, vectors(4), optimizer=Capture, batchnorm="exact")
    plan = autoaccum.fit_plan(work, target_batch=24, max_micro_batch=8, check=False)
    assert plan.split == (8, 8, 8) and plan.memory.host_bytes == 0
    assert "Micro-batches run in lanes" in plan.notes[0]
    assert autoaccum.Plan.from_json(plan.to_json()) == plan
    want, _ = whole(copy.deepcopy(model), batch)
    runner = autoaccum.Runner(work, plan)
    assert runner.step(batch).split == (8, 8, 8)
    assert distance(seen(runner)[-1], want) <= FP64
    whole_plan = autoaccum.fit_plan(work, target_batch=24, check=False)
    assert whole_plan.split == (24,) and whole_plan.predicted_peak_bytes == pytest.approx(
        plan.predicted_peak_bytes, rel=0.05
    )


# gather_window


def two_towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    towers = {name: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)) for name in ("image", "text")}
    return nn.ModuleDict(towers).double()


def clip_loss(model: Any, batch: Any) -> torch.Tensor:
    """CLIP's loss, as one writes it for one batch, with two words more."""
    image = autoaccum.gather_window(F.normalize(model["image"](batch[0]), dim=-1))
    text = autoaccum.gather_window(F.normalize(model["text"](batch[1]), dim=-1))
    logits = 10 * image @ text.T
    places = torch.arange(len(logits))
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


def test_clips_loss_over_the_window() -> None:
    model, batch = two_towers(), (vectors(16)[0], vectors(16, seed=2)[0])
    want, loss = whole(copy.deepcopy(model), batch, clip_loss)
    got, result = lanes(copy.deepcopy(model), batch, loss=clip_loss, batchnorm=None, batch_interactions="exact")
    assert distance(got, want) <= FP64
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-12)
    naive, _ = lanes(copy.deepcopy(model), batch, loss=clip_loss, batchnorm=None)  # outside it returns its argument
    assert distance(naive, want) > NAIVE


def test_a_load_balance_over_the_window() -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        routed = autoaccum.gather_window(model["image"](batch[0]).softmax(-1))
        chosen = F.one_hot(routed.argmax(-1), 4).to(routed.dtype)
        balance = 4 * (chosen.mean(0) * routed.mean(0)).sum()
        return F.mse_loss(model["text"](batch[0]), batch[0][:, :4]) + 0.1 * balance

    model, batch = two_towers(), (vectors(16)[0],)
    want, _ = whole(copy.deepcopy(model), batch, loss)
    got, _ = lanes(copy.deepcopy(model), batch, loss=loss, batch_interactions="exact")
    assert distance(got, want) <= FP64
    assert distance(lanes(copy.deepcopy(model), batch, loss=loss, batchnorm=None)[0], want) > 1e-3


def test_gathering_a_number_is_refused() -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        return autoaccum.gather_window(default_loss(model, batch))

    model = nn.Sequential(nn.Linear(6, 5)).double()
    with pytest.raises(UsageError, match="without dimensions"):
        lanes(model, vectors(16), loss=loss)
    assert autoaccum.gather_window(torch.ones(())).dim() == 0  # outside of a window


# Limits and faults: each lane ends, and the next window trains


def norm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()


def branching(model: Any, batch: Any) -> torch.Tensor:
    hidden = model[0](batch[0])
    if len(batch[0]) != 4:
        hidden = model[1](hidden)
    return F.cross_entropy(model[3](hidden), batch[1])


def failing(model: Any, batch: Any) -> torch.Tensor:
    hidden = model[1](model[0](batch[0]))
    if len(batch[0]) == 1:
        raise KeyError("no such thing")
    return F.cross_entropy(model[3](model[1](hidden)), batch[1])


def penalized(model: Any, batch: Any) -> torch.Tensor:
    x = batch[0].requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.cross_entropy(out, batch[1]) + slope.square().mean()


def reentrant(model: Any, batch: Any) -> torch.Tensor:
    out: Any = checkpoint(lambda x: model(x), batch[0].requires_grad_(), use_reentrant=True)
    return F.cross_entropy(out, batch[1])


@pytest.mark.parametrize(
    ("loss", "error", "said"),
    [
        (branching, UsageError, "the first is at batch normalization '1', number 3 is at its end"),
        (failing, KeyError, "no such thing"),
        (penalized, UsageError, "takes a gradient through a batch normalization"),
        (reentrant, UsageError, "'1' is inside a block that torch.utils.checkpoint runs with use_reentrant=True"),
    ],
)
def test_what_lanes_cannot_do_ends_all_of_them_by_name(loss: Any, error: Any, said: str) -> None:
    model, batch = norm_net(), vectors(16)
    context = open_context(Workload(model, batch, optimizer=Capture, batchnorm="exact", loss=loss))
    with pytest.raises(error, match=said):
        train_window(context, list(cut(batch, SIZES)), SIZES)
    assert not any(isinstance(each, Lane) and each for each in gc.get_objects())  # none that has begun and waits
    model.zero_grad()
    context.loss = default_loss
    want, _ = whole(copy.deepcopy(model), batch)
    train_window(context, list(cut(batch, SIZES)), SIZES)
    assert distance(context.optimizer.seen[-1], want) <= FP64  # type: ignore[attr-defined]


def test_one_value_in_the_whole_window_is_an_error_as_in_one_batch() -> None:
    class Lonely(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(x[:1] if len(x) == 1 else x[:0]))

    x, y = vectors(4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        lanes(Lonely().double(), (x, y), (3, 1), loss=lambda m, b: m(b[0]).sum())


def test_a_norm_that_takes_its_statistics_unseen_is_refused_by_name() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            assert self.running_mean is not None
            with torch.no_grad():
                self.running_mean.lerp_(input.mean(0), 0.1)
            return (input - input.mean(0)) / input.std(0)

    model = nn.Sequential(nn.Linear(6, 8), Own(8), nn.Linear(8, 5)).double()
    with pytest.raises(UsageError, match=r"1 \(Own\) took the statistics of single micro-batches"):
        lanes(model, vectors(16), (8, 8))


def test_compiled_scripted_and_absent_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {
        "is compiled": torch.compile(norm_net()),
        "is a TorchScript module": torch.jit.script(norm_net()),
        "splits each micro-batch over devices": nn.DataParallel(norm_net()),
    }
    for said, model in refused.items():
        with pytest.raises(UsageError, match=said):
            open_context(Workload(model, vectors(4), batchnorm="exact"))
    monkeypatch.setattr("autoaccum.window.lanes.limits.are_absent", lambda: True)
    with pytest.raises(UsageError, match="on a fake process group"):
        open_context(Workload(norm_net(), vectors(4), batchnorm="exact"))
    monkeypatch.undo()
    with pytest.raises(UsageError, match="batch_interactions 'some' is not known"):
        open_context(Workload(norm_net(), vectors(4), batch_interactions="some"))


def test_a_normalization_whose_output_nothing_uses() -> None:
    """In torch 2.6 its node is gone by the time that the backward is ordered."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = net(nn.BatchNorm2d(4)), nn.BatchNorm2d(2).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(2 * x.requires_grad_())
            return self.inner(x)  # type: ignore[no-any-return]

    model, batch = Heads(), images()
    ready(model, batch)
    twin = copy.deepcopy(model)
    want, _ = whole(twin, batch)
    used = [i for i, each in enumerate(want) if each is not None]
    context = open_context(Workload(model, batch, loss=default_loss, batchnorm="exact"))
    got: list[Any] = []
    context.optimizer.register_step_pre_hook(lambda *_: got.extend(p.grad for p in model.parameters()))
    train_window(context, list(cut(batch, SIZES)), SIZES)
    assert [each is None for each in got] == [each is None for each in want]
    assert distance([got[i] for i in used], [want[i] for i in used]) <= FP64


def test_a_loop_without_lanes_refuses() -> None:
    window = norms.Window(norms.find_norms(norm_net()), "exact", 2)
    with pytest.raises(UsageError, match="one after the other"), window.entered(), window.forward():
        pass


def in_lanes(works: list[Callable[[], Any]]) -> list[Any]:
    return run_lanes(works, None, lambda lane: contextlib.nullcontext(), ThreadState(torch.device("cpu")))


def test_lanes_run_one_at_a_time_in_the_callers_thread() -> None:
    running, most, threads = [0], [0], set()

    def work() -> int:
        for _ in range(20):
            running[0] += 1
            most[0] = max(most[0], running[0])
            threads.add(threading.get_ident())
            running[0] -= 1
            lane = current_lane()
            assert lane is not None
            lane.ask(Request(("here",), lambda: "here", lane.index, lambda values: [sum(values)] * len(values)))
        return sum(range(3))

    assert in_lanes([work] * 5) == [3] * 5
    assert most == [1] and threads == {threading.get_ident()} and current_lane() is None


def test_an_interrupt_ends_all_lanes() -> None:
    import _thread

    ended: list[int] = []

    def work() -> None:
        lane = current_lane()
        assert lane is not None
        try:
            if lane.index == 1:
                _thread.interrupt_main()
            lane.ask(Request(("here",), lambda: "here", None, lambda values: values))
        finally:
            ended.append(lane.index)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started with & ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            in_lanes([work] * 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [1, 0] and current_lane() is None
    assert in_lanes([lambda: 1] * 3) == [1, 1, 1]


def test_a_lane_that_asks_again_while_it_is_unwound_ends_as_well() -> None:
    asked = []

    def stubborn() -> None:
        lane = current_lane()
        assert lane is not None
        for _ in range(3):
            try:
                lane.ask(Request(("here",), lambda: "here", None, lambda values: values))
            except BaseException as error:
                asked.append(type(error))
        raise ValueError("of no use to anybody")

    def failing_work() -> None:
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        in_lanes([stubborn, failing_work])
    assert asked == [LanesEnded] * 3


@pytest.mark.parametrize("at", [0, 3])
def test_out_of_memory_in_a_lane_trains_the_window_in_smaller_ones(at: int) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        out = default_loss(model, batch)
        given.append(len(batch[0]))
        if len(given) == at + 1 and current_lane() is not None:
            raise torch.OutOfMemoryError("short")
        return out

    given: list[int] = []
    model, batch = norm_net(), vectors(16)
    twin = copy.deepcopy(model)
    want, _ = whole(twin, batch)
    runner = runner_for(Workload(model, vectors(4), optimizer=Capture, batchnorm="exact", loss=default_loss), 16, 4)
    runner.context.loss, runner.context.loss_is_pair = loss, False
    result = runner.step(batch)
    assert result.retries == 1 and max(result.split) < 4
    assert distance(seen(runner)[-1], want) <= FP64
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[index,arg-type]
    assert torch.allclose(model[1].running_var, twin[1].running_var, atol=FP64)  # type: ignore[index,arg-type]


def test_a_runner_trains_tails_and_micro_batches_of_one_sample() -> None:
    model, batch = norm_net(), vectors(16)
    runner = runner_for(Workload(model, vectors(4), optimizer=Capture, batchnorm="exact"), 4, 1)
    for samples in (4, 3):
        part = batch[0][:samples], batch[1][:samples]
        want, _ = whole(copy.deepcopy(model), part)
        assert runner.step(part).split == (1,) * samples
        assert distance(seen(runner)[-1], want) <= FP64


# Private names of torch


class _Seen(torch.overrides.TorchFunctionMode):
    """Count the functions that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_sequence_numbers_are_read_and_set() -> None:
    x = torch.ones(2, requires_grad=True)
    expected = torch_internals.next_sequence_number()
    node = (x * 2).grad_fn
    assert torch_internals.sequence_number(node) == expected == torch_internals.next_sequence_number() - 1
    torch_internals.set_sequence_number(node, 1 << 40)
    assert torch_internals.sequence_number(node) == 1 << 40


def test_modes_off_and_on_again() -> None:
    with _Seen() as mode:
        with torch_internals.modes_off():
            torch.ones(2).add(1)
        assert mode.count == 0
        torch.ones(2).add(1)
    assert mode.count > 0


def test_the_backward_runs_with_modes_on() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return (x * 3).exp()

    x = torch.ones(2, requires_grad=True)
    loss = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum()
    with _Seen() as mode:
        torch_internals.run_backward(loss)
    assert mode.count >= 2  # the second forward is seen
    assert x.grad is not None and torch.allclose(x.grad, 3 * torch.ones(2).mul(3).exp())
