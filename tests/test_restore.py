"""Snapshots of the user's state: every bit that training changes is named and put back."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from autoaccum.errors import RestoreError, UsageError
from autoaccum.state import snapshot as restore
from autoaccum.window.step import TrainingContext, train_window


@dataclass(eq=False)
class Case:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any = None
    scheduler: Any = None
    clip: float | None = None
    ids: bool = False

    @property
    def kept(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "scheduler": self.scheduler,
        }

    def train(self, windows: int = 2) -> None:
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        context = TrainingContext(
            self.model, loss, self.optimizer, torch.device("cpu"), self.scaler, self.scheduler, self.clip
        )
        for _ in range(windows):
            inputs = torch.randint(0, 8, (6, 8)) if self.ids else torch.randn(6, 8)
            batch = inputs, torch.randint(0, 4, (6,))
            pieces = [tuple(t[a:b] for t in batch) for a, b in ((0, 4), (4, 6))]
            train_window(context, pieces, [4, 2])


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, classes = batch
    dtype = next(model.parameters()).dtype
    logits = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
    return F.cross_entropy(logits.float(), classes)


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), *extra, nn.ReLU(), nn.Linear(16, 4))


# ---------------------------------------------------------------------------------------------------------------------
# The comparison: all of it copied by value, with who is who beside, and not one line of restore.py


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone().contiguous().reshape(-1)  # numpy() would make the storage itself unresizable
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def frozen(value: Any, seen: set[int] | None = None) -> Any:
    seen = set() if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if id(value) in seen:
        return ("again", id(value))
    seen.add(id(value))
    return (type(value).__name__, id(value), _inside(value, seen))


def _inside(value: Any, seen: set[int]) -> Any:
    if isinstance(value, torch.Tensor):
        grad = frozen(value.grad, seen) if value.is_leaf else id(value.grad_fn)
        flags = value.requires_grad, value.is_leaf, value.dtype, value.shape, value.device
        if value.is_sparse:
            return flags, value.is_coalesced(), raw(value._indices()), raw(value._values())
        if value.is_meta:
            return flags, grad
        attributes = frozen(vars(value), seen) if isinstance(value, nn.Parameter) else None
        return flags, value.data_ptr(), value.stride(), raw(value), grad, attributes
    if isinstance(value, dict):
        return [(id(k) if isinstance(k, torch.Tensor) else repr(k), frozen(v, seen)) for k, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [frozen(item, seen) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, torch.Generator):
        return raw(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    followed = nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler
    return frozen(vars(value), seen) if isinstance(value, followed) else "opaque"


def dump(case: Case) -> dict[str, Any]:
    """Everything, in pieces, so that a failing assert shows which."""
    numpy_state = np.random.get_state(legacy=True)
    return {
        **{f"module {name}": frozen(vars(module)) for name, module in case.model.named_modules()},
        "modules": [(name, id(module)) for name, module in case.model.named_modules(remove_duplicate=False)],
        "parameters": [(name, frozen(p)) for name, p in case.model.named_parameters(remove_duplicate=False)],
        "buffers": [(name, frozen(b)) for name, b in case.model.named_buffers(remove_duplicate=False)],
        "state dict": [(name, t.data_ptr(), raw(t)) for name, t in case.model.state_dict().items() if not t.is_meta],
        "optimizer": frozen(vars(case.optimizer)),
        "scheduler": frozen(case.scheduler),
        "scaler": frozen(case.scaler),
        "random": random.getstate(),
        "numpy": (numpy_state[1].tobytes(), numpy_state[2:]),
        "torch": raw(torch.get_rng_state()),
    }


def assert_as_before(case: Case, before: dict[str, Any]) -> None:
    now = dump(case)
    assert now.keys() == before.keys()
    assert [name for name in now if now[name] != before[name]] == []


# ---------------------------------------------------------------------------------------------------------------------
# The cases


class Busy(nn.Module):
    """All that a module might do to itself in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.old = nn.Linear(2, 2)
        self.register_buffer("running", torch.ones(3))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("gone", torch.zeros(2))
        self.register_parameter("late", None)
        self.swapped = nn.Parameter(torch.ones(2))
        self.pointed = nn.Parameter(torch.ones(2))
        self.calls, self.rate, self.mode = 0, 0.5, "warm"
        self.hidden: torch.Tensor | None = torch.zeros(2)
        self.deleted = {"a": [1, 2]}
        self.cache: list[Any] = [torch.zeros(2), {"k": torch.ones(2)}]
        self.ring: deque[int] = deque([1, 2], maxlen=2)
        self.ordered = OrderedDict(a=1, b=2)
        self.names = {"x"}
        self.pair = (1, [2])
        self.generator = torch.Generator().manual_seed(3)
        self.dice = random.Random(4)
        self.counts = np.zeros(3)
        self.outside = [nn.Linear(2, 2)]
        self.lock, self.call = threading.Lock(), lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(4, generator=self.generator) * self.dice.random() + random.random() + np.random.rand()
        out = self.linear(x) * self.rate + noise.to(x.dtype)
        self.running = self.running * 0.9
        with torch.no_grad():
            self.in_place += 1
            self.cache[0] += 1
            self.cache[1]["k"].mul_(2)
            self.outside[0].weight.add_(1)
        self.total += out.sum()
        self.calls, self.rate, self.mode = self.calls + 1, self.rate * 0.9, "hot"
        self.hidden = out.detach()
        self.cache.append(out.detach())
        self.cache[1]["new"] = None
        self.ring.append(self.calls)
        self.ordered.move_to_end("a")
        self.names.add(str(self.calls))
        self.pair[1].append(3)
        self.counts += 1
        self.lock, self.call = threading.Lock(), lambda x: x
        self.total = self.total.detach()
        if self.calls == 1:
            self._first()
        return out

    def _first(self) -> None:
        del self.deleted, self.old, self.gone
        self.late = nn.Parameter(torch.ones(2))
        self.extra = nn.Linear(2, 2)
        self.swapped = nn.Parameter(torch.zeros(2))
        self.pointed.data = torch.zeros(5)
        self.linear.bias.requires_grad_(False)
        self.linear.weight.note = "seen"
        self.linear.register_forward_hook(lambda *args: None)
        self.outside[0].eval()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.head = nn.Linear(16, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("window", self.embed.weight.detach()[2:5])  # a view of the parameter

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids).mean(1))


def adamw_fresh() -> Case:
    model = net()
    return Case(model, torch.optim.AdamW(model.parameters()))


def adamw_existing() -> Case:
    model = net()
    case = Case(model, torch.optim.AdamW(model.parameters(), amsgrad=True))
    case.train(1)
    return case


def existing_gradients() -> Case:
    case = adamw_existing()
    loss(case.model, (torch.randn(6, 8), torch.randint(0, 4, (6,)))).backward()
    case.model[0].bias.grad = None
    return case


def adamw_fused_scaler() -> Case:
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    return Case(model, torch.optim.AdamW(model.parameters(), fused=True), scaler=scaler)


def sgd_momentum() -> Case:
    model = net()
    return Case(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def frozen_parameters() -> Case:
    model = net().eval()
    model[0].requires_grad_(False)
    return Case(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def tied() -> Case:
    torch.manual_seed(2)
    model = Tied()
    return Case(model, torch.optim.AdamW(model.parameters()), ids=True)


def batchnorm_dropout() -> Case:
    model = net(nn.BatchNorm1d(16), nn.Dropout(0.5))
    return Case(model, torch.optim.AdamW(model.parameters()))


def busy() -> Case:
    model = Busy()
    return Case(model, torch.optim.AdamW([model.linear.weight, model.linear.bias, model.swapped]))


def one_cycle() -> Case:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Case(model, optimizer, scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9))


def sequential_schedulers() -> Case:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    kinds = torch.optim.lr_scheduler
    warm, then = kinds.LinearLR(optimizer, 0.1, total_iters=2), kinds.CosineAnnealingLR(optimizer, 5)
    return Case(model, optimizer, scheduler=kinds.SequentialLR(optimizer, [warm, then], [1]))


def bf16_with_fp32_state() -> Case:
    model = net().bfloat16()
    case = Case(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    case.train(1)
    for state in case.optimizer.state.values():
        state["master"] = state["momentum_buffer"].float() + 1e-7
    return case


def parametrized() -> Case:
    model = net()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[2])
    return Case(model, torch.optim.AdamW(model.parameters()))


def clipped() -> Case:
    case = adamw_fresh()
    case.clip = 0.01
    return case


def scaled() -> Case:
    case = sgd_momentum()
    case.scaler, case.clip = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1), 0.1
    return case


def scaled_before() -> Case:
    case = scaled()
    case.train(1)
    return case


def sparse_gradients() -> Case:
    torch.manual_seed(2)
    model = nn.Sequential(nn.EmbeddingBag(8, 4, sparse=True))
    case = Case(model, torch.optim.SparseAdam(model.parameters()), ids=True)
    case.train(1)
    loss(model, (torch.randint(0, 8, (6, 8)), torch.randint(0, 4, (6,)))).backward()
    return case


CASES = [
    adamw_fresh, adamw_existing, existing_gradients, adamw_fused_scaler, sgd_momentum, frozen_parameters, tied,
    batchnorm_dropout, busy, one_cycle, sequential_schedulers, bf16_with_fp32_state, parametrized, clipped, scaled,
    scaled_before, sparse_gradients,
]  # fmt: skip


@pytest.mark.parametrize("make", CASES)
def test_two_windows_leave_no_trace(make: Callable[[], Case]) -> None:
    case = make()
    before = dump(case)
    snapshot = restore.take(**case.kept)
    assert_as_before(case, before)  # taking it changes nothing
    assert snapshot.differences() == []
    case.train()
    assert snapshot.differences() != []
    assert dump(case) != before
    snapshot.restore()
    assert snapshot.differences() == []
    assert_as_before(case, before)
    snapshot.restore()
    assert_as_before(case, before)


@pytest.mark.parametrize("make", CASES)
def test_training_goes_on_as_if_nothing_had_been(make: Callable[[], Case]) -> None:
    """Two windows, from the same random state, with and without others in between."""
    results = []
    for planned in (False, True):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        case = make()
        if planned:
            with restore.kept(**case.kept):
                case.train()
        case.train()
        results.append([raw(t) for t in case.model.state_dict().values()])
    assert results[0] == results[1]


# ---------------------------------------------------------------------------------------------------------------------
# One bit, in each category, is named


def flip(tensor: torch.Tensor) -> None:
    tensor.detach().view(-1).view(torch.uint8)[-1] ^= 1


def _rich() -> Case:
    model = nn.Sequential(net(nn.BatchNorm1d(16)), Busy())
    first = model[0]
    optimizer = torch.optim.AdamW(first.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    case = Case(model, optimizer, torch.amp.GradScaler("cpu"), scheduler)
    case.scaler.scale(torch.ones(()))
    first(torch.randn(6, 8)).sum().backward()
    optimizer.step()
    first(torch.randn(6, 8)).sum().backward()
    return case


def _state(case: Case) -> dict[str, torch.Tensor]:
    return case.optimizer.state[case.model[0][0].weight]


def _set(owner: Callable[[Case], Any], name: str, value: Any) -> Callable[[Case], Any]:
    return lambda case: setattr(owner(case), name, value)


MUTATIONS: list[tuple[str, Callable[[Case], Any]]] = [
    ("0.0.weight", lambda c: flip(c.model[0][0].weight)),
    ("0.1.running_mean", lambda c: flip(c.model[0][1].running_mean)),
    ("0.1.num_batches_tracked", lambda c: c.model[0][1].num_batches_tracked.add_(1)),
    ("1.running", lambda c: setattr(c.model[1], "running", c.model[1].running.clone())),
    ("1.pointed", lambda c: setattr(c.model[1].pointed, "data", c.model[1].pointed.data.clone())),
    ("1.swapped", lambda c: setattr(c.model[1], "swapped", nn.Parameter(torch.ones(2)))),
    ("1.added", lambda c: c.model[1].register_buffer("added", torch.ones(2))),
    ("1.gone", lambda c: delattr(c.model[1], "gone")),
    ("module 1.extra", lambda c: c.model[1].add_module("extra", nn.ReLU())),
    ("module 1.old", lambda c: delattr(c.model[1], "old")),
    ("gradient of 0.0.weight", lambda c: flip(c.model[0][0].weight.grad)),
    ("gradient of 0.0.bias", lambda c: setattr(c.model[0][0].bias, "grad", None)),
    ("gradient of 1.linear.weight", lambda c: setattr(c.model[1].linear.weight, "grad", torch.zeros(4, 8))),
    ("requires_grad of 0.0.bias", lambda c: c.model[0][0].bias.requires_grad_(False)),
    ("attribute note of 0.0.bias", lambda c: setattr(c.model[0][0].bias, "note", 1)),
    ("autograd history of 1.total", lambda c: c.model[1].total.add_(c.model[1].linear.bias.sum() * 0)),
    ("training mode of 0.1", lambda c: c.model[0][1].eval()),
    ("training mode of the model", lambda c: setattr(c.model, "training", False)),
    ("module attribute 1.calls", lambda c: setattr(c.model[1], "calls", 1)),
    ("module attribute 1.rate", lambda c: setattr(c.model[1], "rate", 0.5 + 2**-53)),
    ("module attribute 1.mode", lambda c: setattr(c.model[1], "mode", "hot")),
    ("module attribute 1.new", lambda c: setattr(c.model[1], "new", None)),
    ("module attribute 1.deleted", lambda c: delattr(c.model[1], "deleted")),
    ("module attribute 1.deleted['a'][1]", lambda c: c.model[1].deleted["a"].__setitem__(1, 3)),
    ("module attribute 1.hidden", lambda c: flip(c.model[1].hidden)),
    ("module attribute 1.cache[0]", lambda c: flip(c.model[1].cache[0])),
    ("module attribute 1.cache[1]['k']", lambda c: flip(c.model[1].cache[1]["k"])),
    ("module attribute 1.cache[2]", lambda c: c.model[1].cache.append(1)),
    ("module attribute 1.ring[0]", lambda c: c.model[1].ring.append(2)),
    ("module attribute 1.ordered", lambda c: c.model[1].ordered.move_to_end("a")),
    ("module attribute 1.names", lambda c: c.model[1].names.add("y")),
    ("module attribute 1.pair[1][1]", lambda c: c.model[1].pair[1].append(3)),
    ("module attribute 1.generator", lambda c: torch.randn(1, generator=c.model[1].generator)),
    ("module attribute 1.dice", lambda c: c.model[1].dice.random()),
    ("module attribute 1.counts", lambda c: c.model[1].counts.__iadd__(1)),
    ("module attribute 1.lock", lambda c: setattr(c.model[1], "lock", threading.Lock())),
    ("optimizer state of 0.0.weight: exp_avg", lambda c: flip(_state(c)["exp_avg"])),
    ("optimizer state of 0.0.weight: step", lambda c: _state(c)["step"].add_(1)),
    ("optimizer state of 0.0.weight: new", lambda c: _state(c).update(new=1)),
    ("optimizer state of 0.0.weight", lambda c: c.optimizer.state.pop(c.model[0][0].weight)),
    ("optimizer state of 1.linear.bias", lambda c: c.optimizer.state[c.model[1].linear.bias]),
    ("optimizer attribute param_groups[0]['lr']", lambda c: c.optimizer.param_groups[0].update(lr=0.2)),
    ("optimizer attribute _opt_called", lambda c: setattr(c.optimizer, "_opt_called", False)),
    ("scheduler attribute last_epoch", lambda c: setattr(c.scheduler, "last_epoch", 7)),
    ("scheduler attribute _last_lr", lambda c: setattr(c.scheduler, "_last_lr", [0.3])),
    ("scaler attribute _scale", lambda c: flip(c.scaler._scale)),
    ("scaler attribute _growth_factor", lambda c: c.scaler.set_growth_factor(3.0)),
    ("torch RNG", lambda c: torch.rand(1)),
    ("NumPy RNG", lambda c: np.random.rand()),
    ("Python RNG", lambda c: random.random()),
]


@pytest.mark.parametrize(("name", "change"), MUTATIONS, ids=[name for name, _ in MUTATIONS])
def test_one_bit_is_named_and_put_back(name: str, change: Callable[[Case], Any]) -> None:
    case = _rich()
    before = dump(case)
    snapshot = restore.take(**case.kept)
    change(case)
    found = snapshot.differences()
    assert name in found
    assert len(found) <= 2, found  # a deque's two entries move together; nothing else may be blamed
    assert dump(case) != before
    snapshot.restore()
    assert snapshot.differences() == []
    assert_as_before(case, before)


def test_nan_is_equal_to_itself_and_signed_zero_is_not() -> None:
    case = _rich()
    with torch.no_grad():
        case.model[0][0].weight.fill_(float("nan"))
        case.model[0][0].bias.zero_()
    case.model[1].rate = float("nan")
    snapshot = restore.take(**case.kept)
    case.model[1].rate = float("nan") + 1
    assert snapshot.differences() == []
    with torch.no_grad():
        case.model[0][0].bias.neg_()
    assert snapshot.differences() == ["0.0.bias"]


def test_tensors_in_one_storage_are_distinguished() -> None:
    flat = torch.zeros(12)
    model = nn.Module()
    model.a, model.b = nn.Parameter(flat[:4]), nn.Parameter(flat[4:10].view(3, 2).t())
    snapshot = restore.take(model=model)
    assert snapshot.host_bytes == 48
    flip(flat[5:6])
    assert snapshot.differences() == ["b"]
    flip(flat[5:6]), flip(flat[11:])
    assert snapshot.differences() == ["a"]  # bytes that no tensor covers go by the storage's first tensor
    snapshot.restore()
    assert raw(flat) == bytes(48)


def test_a_storage_that_was_freed_gets_its_bytes_back() -> None:
    case = adamw_fresh()
    snapshot = restore.take(**case.kept)
    before = [raw(p) for p in case.model.parameters()]
    case.model[0].weight.untyped_storage().resize_(0)
    assert snapshot.differences() == ["0.weight"]
    snapshot.restore()
    assert [raw(p) for p in case.model.parameters()] == before


def test_a_read_only_buffer_is_not_written(tmp_path: Any) -> None:
    """Writing to it would end the process."""
    path = tmp_path / "table"
    np.ones(4096, dtype=np.float32).tofile(path)
    model = net()
    with pytest.warns(UserWarning, match="not writable"):
        model.register_buffer("table", torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r")))
    with restore.kept(model=model):
        flip(model[0].weight)


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_gradient_that_is_changed_in_place(coalesced: bool) -> None:
    case = sparse_gradients()
    weight = case.model[0].weight
    grad = weight.grad
    assert not grad.is_coalesced()
    if coalesced:
        grad = weight.grad = grad.coalesce()
    before = dump(case)
    snapshot = restore.take(**case.kept)
    assert snapshot.host_bytes >= grad._values().nbytes + grad._indices().nbytes
    grad.add_(grad.detach().clone())
    assert snapshot.differences() == ["gradient of 0.weight"]
    snapshot.restore()
    assert snapshot.differences() == []
    assert_as_before(case, before)


def test_wrapper_subclass() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Module()
    model.weight = nn.Parameter(TwoTensor(torch.ones(3), torch.zeros(3)))
    snapshot = restore.take(model=model)
    assert snapshot.host_bytes == 24
    with torch.no_grad():
        model.weight.add_(1)
    assert snapshot.differences() != []
    snapshot.restore()
    assert snapshot.differences() == []
    assert model.weight.a.tolist() == [1, 1, 1]
    assert model.weight.b.tolist() == [0, 0, 0]


def test_meta_models_have_nothing_to_copy() -> None:
    model = net().to("meta")
    snapshot = restore.take(model=model)
    assert snapshot.host_bytes == 0
    assert snapshot.differences() == []
    model[0].weight = nn.Parameter(torch.empty(16, 8, device="meta"))
    assert snapshot.differences() == ["0.weight"]
    snapshot.restore()
    assert snapshot.differences() == []


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(UsageError, match="no shape"):
        restore.take(model=nn.LazyLinear(3))


# ---------------------------------------------------------------------------------------------------------------------
# The light form


def test_light_form_covers_what_a_forward_moves_and_no_more() -> None:
    case = _rich()
    before = dump(case)
    with restore.kept(**case.kept, storages=False) as snapshot:
        case.model[1](torch.randn(6, 8))
        case.model[0](torch.randn(6, 8))
        case.model[0][1].eval()
        case.model[0][1].calls = 1
        assert snapshot.differences()
    assert case.model[1].pointed.shape == (5,)  # parameters are not covered
    case.model[1].pointed.data = torch.ones(2)
    now = dump(case)
    for name in ("buffers", "scheduler", "scaler", "torch", "numpy", "random", "modules", "module 0.1"):
        assert now[name] == before[name]
    assert case.model[1].calls == 0 and "extra" not in dict(case.model[1].named_children())
    full = restore.host_bytes_needed(**case.kept)
    buffers = sum(b.nbytes for b in case.model.buffers())
    assert buffers <= snapshot.host_bytes < buffers + 200 < full


@pytest.mark.parametrize(("name", "change"), MUTATIONS, ids=[name for name, _ in MUTATIONS])
def test_light_form_names_and_puts_back_the_same_but_parameters_and_optimizer(
    name: str, change: Callable[[Case], Any]
) -> None:
    case = _rich()
    before = dump(case)
    snapshot = restore.take(**case.kept, storages=False)
    change(case)
    covered = not name.startswith(("0.0.", "1.pointed", "grad", "requires", "attribute", "optimizer", "scheduler"))
    assert (name in snapshot.differences()) == covered
    snapshot.restore()
    assert snapshot.differences() == []
    assert (dump(case) == before) == covered


def test_light_form_neither_holds_nor_puts_back_gradients_and_hooks() -> None:
    case = _rich()
    weight = case.model[0][0].weight
    gone = weakref.ref(weight.grad)
    snapshot = restore.take(**case.kept, storages=False)
    handle = case.model[0].register_forward_hook(lambda *args: None)
    case.model.zero_grad(set_to_none=True)
    assert gone() is None  # a snapshot that kept it would cost the window that memory
    snapshot.restore()
    assert weight.grad is None
    assert handle.id in case.model[0]._forward_hooks


def test_small_storages_are_copied_together_and_kept_apart() -> None:
    model = nn.Module()
    for index, values in enumerate(
        [torch.ones(3), torch.ones(0), torch.tensor(True), torch.ones(2, dtype=torch.cfloat)]
    ):
        model.register_buffer(f"b{index}", values)
    model.register_buffer("conjugate", torch.full((2,), 1 + 2j).conj())
    model.register_buffer("large", torch.ones(1 << 14))
    before = [raw(b) for b in model.buffers()]
    snapshot = restore.take(model=model, storages=False)
    for buffer in model.buffers():
        buffer.zero_()
    assert snapshot.differences() == ["b0", "b2", "b3", "conjugate", "large"]
    snapshot.restore()
    assert snapshot.differences() == []
    assert [raw(b) for b in model.buffers()] == before


def test_light_form_leaves_parameters_and_optimizer_state_alone() -> None:
    case = batchnorm_dropout()
    case.train(1)
    snapshot = restore.take(**case.kept, storages=False)
    buffers = [raw(b) for b in case.model.buffers()]
    case.train(1)
    trained = [raw(p) for p in case.model.parameters()]
    state = frozen(case.optimizer.state)
    snapshot.restore()
    assert [raw(b) for b in case.model.buffers()] == buffers
    assert [raw(p) for p in case.model.parameters()] == trained
    assert frozen(case.optimizer.state) == state


# ---------------------------------------------------------------------------------------------------------------------
# Host memory


def test_host_bytes_count_each_storage_once() -> None:
    case = tied()
    weight_bytes = 8 * 16 * 4
    assert restore.host_bytes_needed(**case.kept) == weight_bytes
    assert restore.take(**case.kept).host_bytes == weight_bytes
    case.train(1)
    assert restore.take(**case.kept).host_bytes == 3 * weight_bytes + 4  # exp_avg, exp_avg_sq and step


def test_too_little_host_memory_is_said_before_anything_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1024, 1024, bias=False)
    monkeypatch.setattr(restore, "_available_bytes", lambda: 3 << 20)
    monkeypatch.setattr(restore, "_host_copy", lambda storage: pytest.fail("copied"))
    with pytest.raises(UsageError, match=r"4\.0 MiB of host memory, and 3\.0 MiB"):
        restore.take(model=model)


def test_available_bytes_are_read() -> None:
    available = restore._available_bytes()
    assert available is not None and available > 1 << 20


# ---------------------------------------------------------------------------------------------------------------------
# Every way out


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError])
def test_kept_restores_when_it_is_left_by(error: type[BaseException]) -> None:
    case = _rich()
    before = dump(case)
    with pytest.raises(error), restore.kept(**case.kept):
        flip(case.model[0][0].weight)
        case.model[1](torch.randn(6, 8))
        raise error("enough")
    assert_as_before(case, before)


@pytest.mark.parametrize("first", [None, KeyboardInterrupt])
def test_ctrl_c_while_restoring_waits(first: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _rich()
    before = dump(case)
    put_rng, calls = restore.put_rng, []

    def interrupted(states: dict[str, Any]) -> None:
        calls.append(1)
        signal.raise_signal(signal.SIGINT)
        put_rng(states)

    monkeypatch.setattr(restore, "put_rng", interrupted)
    before_all = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), restore.kept(**case.kept):
        flip(case.model[0][0].weight)
        torch.rand(1)
        if first is not None:
            raise first
    assert calls
    assert signal.signal(signal.SIGINT, before_all) is handler
    assert_as_before(case, before)


def test_kept_works_off_the_main_thread() -> None:
    case = adamw_fresh()
    before = dump(case)

    def work() -> None:
        with contextlib.suppress(ValueError), restore.kept(**case.kept):
            case.train()
            raise ValueError

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_as_before(case, before)


def test_what_cannot_be_put_back_is_named_after_all_else_was() -> None:
    case = _rich()
    busy = case.model[1]
    busy.hidden = busy.linear.bias * 2
    history = busy.hidden.grad_fn
    snapshot = restore.take(**case.kept)
    busy.hidden.mul_(3)
    flip(case.model[0][0].weight)
    busy.calls = 5
    torch.rand(1)
    with pytest.raises(RestoreError, match=r"module attribute 1\.hidden .*another function") as caught:
        snapshot.restore()
    assert "0.0.weight" not in str(caught.value)
    assert busy.hidden.grad_fn is not history
    assert snapshot.differences() == ["autograd history of module attribute 1.hidden"]
