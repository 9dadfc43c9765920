"""What lanes compute again in the backward has the bits that were saved, whatever a model does to its tensors."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import Capture, cut, one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoaccum import UsageError, Workload
from autoaccum.window.lanes.cheap_operations import CHEAP, operation_of
from autoaccum.window.lanes.host_store import HostStore
from autoaccum.window.step import open_context, train_window

Tensors = Sequence[torch.Tensor]
CHANNELS = 4


def store_for(parts: int | None = None, *, recomputes: bool, least_bytes: int = 1) -> HostStore:
    """A store as a GPU's lanes have it, for tensors of this CPU."""
    store = HostStore(torch.device("cpu"), None)
    store.begin((), least_bytes, parts=parts, recomputes=recomputes)
    return store


# Any program has the same gradient


def norm(x: torch.Tensor) -> torch.Tensor:
    """As lanes normalize: by statistics that are there."""
    ones = torch.linspace(0.5, 2, CHANNELS)
    return torch.native_batch_norm(x, ones, ones - 1, ones / 3, ones + 1, False, 0.0, 1e-5)[0]


def conv(x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, torch.linspace(-1, 1, CHANNELS * CHANNELS * 9).view(CHANNELS, CHANNELS, 3, 3), padding=1)


def halves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A view of what was joined, as channel shuffles take."""
    return torch.cat([x, y], 1)[:, ::2]


def in_bf16(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x.bfloat16()).float()


ONE: tuple[Callable[[Any], torch.Tensor], ...] = (
    norm, conv, in_bf16, torch.relu, F.silu, torch.sigmoid, F.hardswish, torch.clone,
    lambda x: F.relu(x, inplace=True), lambda x: F.silu(x, inplace=True), lambda x: F.hardtanh(x, inplace=True),
    lambda x: x.mul_(0.5), lambda x: x[:, :2].relu_()[:, :1] + x,
    lambda x: x.transpose(2, 3), lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: F.dropout(x, 0.3),
    lambda x: x * x.mean((2, 3), keepdim=True), lambda x: torch.cat([x, x], 1).chunk(2, 1)[1],
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: F.layer_norm(x, x.shape[1:]),
    lambda x: x.square().neg_().exp(),
)  # fmt: skip
TWO: tuple[Callable[[Any, Any], torch.Tensor], ...] = (
    halves, torch.add, torch.mul, lambda x, y: x.add_(y), lambda x, y: x.mul_(y), lambda x, y: torch.lerp(x, y, 0.25),
    lambda x, y: torch.where(x > y, x, y), lambda x, y: torch.cat([x, y, x], 1)[:, CHANNELS : 2 * CHANNELS],
    lambda x, y: x.bfloat16().add_(y).float(), lambda x, y: x.bfloat16().add_(y).relu_() + x,
)  # fmt: skip
MEETING = len(ONE) + len(TWO)
programs = st.lists(st.tuples(st.integers(0, MEETING), st.integers(0, 50), st.integers(0, 50)), min_size=3, max_size=14)


def train(program: Sequence[tuple[int, int, int]], store: HostStore | None) -> Tensors:
    """Run a program, and return the gradients of its inputs."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, CHANNELS, 5, 5, requires_grad=True) for _ in range(2)]
    made, part = [each * 1.0 for each in inputs], 0
    with contextlib.nullcontext() if store is None else store.moving(2):
        for number, first, second in program:
            if number == MEETING:
                part += 1
                if store is not None:
                    store.enter(0, part)
                continue
            x, y = (made[at % len(made)] for at in (first, second))
            made.append(ONE[number](x) if number < len(ONE) else TWO[number - len(ONE)](x, y))
        loss = sum(each.sum() for each in made[-4:])
    if store is not None:
        store.end_forward()
    loss.backward()  # type: ignore[union-attr]
    return [each.grad if each.grad is not None else torch.zeros(()) for each in inputs]


@settings(max_examples=200, deadline=None)
@given(programs, st.sampled_from([None, 0, 1, 2]))
def test_any_program_has_the_same_gradient(program: Sequence[tuple[int, int, int]], parts: int | None) -> None:
    try:
        want = train(program, None)
    except RuntimeError as error:
        assert "inplace" in str(error)  # autograd refuses it, whoever keeps what it saves
        return
    got = train(program, store_for(parts, recomputes=True))
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other) or (one.isnan() == other.isnan()).all()


# Nets in lanes


class Gated(nn.Module):
    """An inverted residual block with its squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, 1, 12), nn.BatchNorm2d(12), nn.SiLU(inplace=True))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 3, 1), nn.SiLU(), nn.Conv2d(3, 12, 1))
        self.out = nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.deep(self.wide(x))
        return x + self.out(h * torch.sigmoid(self.gate(h)))


class Dense(nn.Module):
    """Layers that take what all before them made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 * i), nn.ReLU(inplace=True), nn.Conv2d(4 * i, 4, 3, padding=1))
            for i in range(1, 6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)).add_(x))


def net(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), *blocks, nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(5)
    )


def in_lanes(model: nn.Module, monkeypatch: pytest.MonkeyPatch, *, recomputes: bool, **more: Any) -> Any:
    """Train a window in lanes; return the gradient, and the store."""
    store, sizes = HostStore(torch.device("cpu"), None), (3, 1, 4, 3)
    batch = torch.linspace(-2, 3, 11 * 2 * 64).view(11, 2, 8, 8).sin(), torch.arange(11) % 5

    def found(context: Any) -> HostStore:
        context.host_store = store
        stay = (*context.model.parameters(), *context.model.buffers())
        store.begin(stay, 64, context.autocast_dtype, recomputes=recomputes)
        return store

    monkeypatch.setattr("autoaccum.window.lanes.training._host_store", found)
    context = open_context(Workload(copy.deepcopy(model), batch, optimizer=Capture, batchnorm="exact", **more))
    torch.manual_seed(3)
    train_window(context, list(cut(batch, sizes)), sizes)
    return context.optimizer.seen[-1], store  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize(
    ("blocks", "least"), [((), 1.1), ((Gated(), Gated()), 2.0), ((Dense(),), 2.0), ((Residual(), Residual()), 1.3)]
)
def test_lanes_have_the_same_bits_and_keep_less(
    monkeypatch: pytest.MonkeyPatch, blocks: tuple[nn.Module, ...], least: float, precision: str | None
) -> None:
    model = net(*blocks)
    model(torch.zeros(2, 2, 8, 8))
    want, kept = in_lanes(model, monkeypatch, recomputes=False, precision=precision)
    got, spared = in_lanes(model, monkeypatch, recomputes=True, precision=precision)
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))
    assert kept.recomputation.bytes == 0 < spared.recomputation.bytes
    assert kept.saved_bytes > least * spared.saved_bytes and kept.returned_bytes > spared.returned_bytes


# Its edges


def same_as_autograd(compute: Callable[[torch.Tensor], torch.Tensor], parts: int | None = None) -> None:
    """What follows from a saved exponential has autograd's gradient, and something is computed again."""

    def gradient(store: HostStore | None) -> torch.Tensor:
        x = torch.linspace(-1, 1, 64).requires_grad_()
        with contextlib.nullcontext() if store is None else store.moving(1):
            loss = compute(x.exp()).sum()  # saved by its own node: what follows is computed from it
        if store is not None:
            store.end_forward()
        loss.backward()
        assert x.grad is not None
        return x.grad

    store = store_for(parts, recomputes=True, least_bytes=100)
    assert torch.equal(gradient(store), gradient(None)) and store.recomputation.bytes > 0


def test_what_is_needed_twice_is_not_written_over() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        twice = F.silu(x)
        return F.hardswish(twice * (twice * 2 + 1))

    same_as_autograd(compute)


def test_what_is_drawn_anew_is_not_what_it_was() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        noise = (x + 1).detach().uniform_()  # in the memory of what follows from x
        return x * noise * torch.sigmoid(x)

    same_as_autograd(compute)


@pytest.mark.parametrize("parts", [None, 0])
def test_what_is_written_over_unseen_by_autograd_is_computed_from_what_it_was(parts: int | None) -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        shift = torch.full((1,), 3.0)
        out = (x + shift).sigmoid()
        shift.data.mul_(0)
        return out.square()

    same_as_autograd(compute, parts)


def test_what_is_asked_for_under_autocast_is_computed_as_it_was() -> None:
    def gradient(store: HostStore | None) -> torch.Tensor:
        x = torch.linspace(-1, 1, 64).requires_grad_()
        with contextlib.nullcontext() if store is None else store.moving(1):
            kept = x.exp()
            loss = F.softplus(kept.bfloat16()).square().sum()
        if store is not None:
            store.end_forward()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which has softplus in fp32
            loss.backward()
        assert x.grad is not None
        return x.grad

    store = store_for(recomputes=True, least_bytes=100)
    assert torch.equal(gradient(store), gradient(None)) and store.recomputation.bytes > 0


def test_what_stays_is_freed_with_what_needs_it() -> None:
    store = store_for(0, recomputes=True)
    x = torch.randn(2, CHANNELS, 5, 5, requires_grad=True)
    with store.moving(2):
        kept = conv(x).exp()
        loss = conv(torch.relu(norm(kept))).sum()
    storage = weakref.ref(kept.untyped_storage())
    del kept
    store.end_forward()
    loss.backward()
    del loss
    assert store.recomputation.bytes > 0 and storage() is None


def test_what_stays_and_was_written_over_is_refused() -> None:
    store = store_for(0, recomputes=False)
    with store.moving(1):
        out = torch.ones(8, requires_grad=True).exp()  # its node saves what it returns
        loss = out.sum()
    out.detach().mul_(2)
    with pytest.raises(UsageError, match="was written to after it was saved"):
        loss.backward()


def test_a_parameter_that_was_written_over_is_refused() -> None:
    """As an optimizer's step in a hook does; the sum that it was part of has saved nothing of it."""
    shift = nn.Parameter(torch.full((64,), 0.5))
    store = HostStore(torch.device("cpu"), None)
    store.begin((shift,), 100, recomputes=True)
    x = torch.linspace(-1, 1, 64).requires_grad_()
    with store.moving(1):
        loss = torch.sigmoid(x.exp() + shift).sum()
    with torch.no_grad():
        shift.mul_(0)
    with pytest.raises(UsageError, match="was written to after it was saved"):
        loss.backward()


def test_cheap_operations_and_their_namesakes_in_place() -> None:
    aten = torch.ops.aten
    for name in CHEAP:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            found = operation_of(getattr(packet, overload))
            assert "out" in overload or (found is not None and found.repeat is getattr(packet, overload)), name
    for one, other in ((aten.relu_.default, aten.relu.default), (aten.add_.Tensor, aten.add.Tensor)):
        found = operation_of(one)
        assert found is not None and found.repeat is other and found.in_place
    for func in (aten.convolution.default, aten.bernoulli.default, aten.view.default, len):
        assert operation_of(func) is None
    writes = operation_of(aten.bernoulli_.float)
    assert writes is not None and writes.repeat is None and writes.written == (0,)
    named = operation_of(aten.add.out)
    assert named is not None and named.repeat is None and named.written_names == ("out",)
