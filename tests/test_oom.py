"""Running out of memory anywhere in a window changes nothing but the size of the micro-batches."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_train import (
    FP64,
    Capture,
    Rows,
    base_plan,
    cut,
    distance,
    gradients,
    mlp,
    one_thread,  # noqa: F401
    pad,
    recoveries,
    runner_for,
    same_tensors,
    seen,
    sequence,
    state_of,
    token_count,
    token_sum,
    vectors,
)
from torch import nn
from torch.utils.data import DataLoader

from autoaccum import OutOfMemory, Runner, Workload, fit_plan
from autoaccum.budget import BudgetItem
from autoaccum.devices import oom
from autoaccum.devices.cpu import budget
from autoaccum.state import snapshot
from autoaccum.state.rng import same_state, take_rng
from autoaccum.units import show_bytes
from autoaccum.workload import default_loss

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. "
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
)
ERRORS: dict[str, Callable[[], BaseException]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it."),
    "python": lambda: MemoryError(),
    "allocator": lambda: RuntimeError(ALLOCATOR),
}
each_error = pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
each_place = pytest.mark.parametrize("where", ["forward", "backward"])


class Fault:
    """Where to run out of memory; a plain object, which no snapshot follows and no retry winds back.

    Attributes:
        at: Micro-batches, counted from 0 over all attempts, and where in each to raise.
        most: The most samples that fit.
        forwards: Micro-batches begun, those that only count left out.
    """

    def __init__(self, error: Callable[[], BaseException] = ERRORS["allocator"]) -> None:
        self.error, self.at, self.most = error, dict[int, str](), 10**9
        self.forwards = self.counting = 0
        self.fails_counting_at: int | None = None
        self.on_forward: Callable[[], object] = lambda: None

    def check(self, index: int, where: str, samples: int) -> None:
        if self.at.get(index) == where or (samples > self.most and where == "backward"):
            raise self.error()


class Trip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fault: Fault) -> torch.Tensor:
        ctx.fault, ctx.index, ctx.samples = fault, fault.forwards, len(x)
        fault.forwards += 1
        fault.on_forward()
        fault.check(ctx.index, "forward", ctx.samples)
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.fault.check(ctx.index, "backward", ctx.samples)
        return grad, None


class Tripping(nn.Module):
    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return Trip.apply(x, self.fault)  # type: ignore[no-any-return,no-untyped-call]
        self.fault.counting += 1
        if self.fault.counting - 1 == self.fault.fails_counting_at:
            raise self.fault.error()
        return x


class Draws(nn.Module):
    """Draws from Python's and NumPy's generators too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.1 * random.random()) * (1 + 0.1 * np.random.rand())


class Calls(nn.Module):
    """Moves a buffer and a plain attribute in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.calls, self.sizes = 0, list[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        self.total += x.detach().sum()
        return x


KINDS: dict[str, Callable[[], list[nn.Module]]] = {
    "plain": lambda: [],
    "dropout": lambda: [nn.Dropout(0.3), Draws()],
    "batch norm": lambda: [nn.BatchNorm1d(16), Calls()],
}


def faulty(fault: Fault, kind: str = "plain") -> nn.Module:
    """Layers before and after the fault: after a failed backward only some have a gradient."""
    torch.manual_seed(0)
    extra = KINDS[kind]
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), *extra(), Tripping(fault), nn.Linear(16, 16), *extra(), nn.Tanh(), nn.Linear(16, 5)
    ).double()


def seed() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


def faulty_runner(fault: Fault, kind: str = "plain", micro: int = 4, **how: Any) -> Runner:
    how = {"sample": vectors(2), "optimizer": Capture, **how}
    return runner_for(Workload(faulty(fault, kind), **how), 16, micro)


# --- injected ----------------------------------------------------------------------------------------------------


# Every kind with every error, place and micro-batch: in pairs, not in all 72 combinations.
@pytest.mark.parametrize(
    ("kind", "index", "where", "error"),
    [
        pytest.param(kind, (n + 2 * k + 1) % 4, where, error, id=f"{kind}-{(n + 2 * k + 1) % 4}-{where}-{name}")
        for k, kind in enumerate(KINDS)
        for n, (where, (name, error)) in enumerate(itertools.product(("forward", "backward"), ERRORS.items()))
    ],
)
def test_running_out_anywhere_changes_nothing_but_the_micro_batch(
    kind: str, index: int, where: str, error: Callable[[], BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    batch, fault = vectors(16), Fault(error)
    runner, smaller = faulty_runner(fault, kind), faulty_runner(Fault(), kind, micro=2)
    want = gradients(faulty(Fault(), kind), default_loss, batch)
    seed()
    expected = smaller.step(batch)
    random_state = take_rng()
    seed()
    fault.at[index] = where
    result = runner.step(batch)

    assert fault.forwards == index + 1 + 8  # the whole window was started over
    assert result.retries == len(recoveries(caplog)) == 1
    assert result.split == expected.split == (2,) * 8
    if kind == "plain":
        assert distance(seen(runner)[0], want) <= FP64
    assert all(torch.equal(a, b) for a, b in zip(seen(runner)[0], seen(smaller)[0], strict=True))
    assert torch.equal(result.loss, expected.loss)
    assert same_state(take_rng(), random_state)
    assert same_tensors(state_of(runner.context.model), state_of(smaller.context.model))
    for one, other in zip(runner.context.model.modules(), smaller.context.model.modules(), strict=True):
        if isinstance(one, Calls) and isinstance(other, Calls):
            assert (one.calls, one.sizes) == (other.calls, other.sizes) == (8, [2] * 8)
    assert len(seen(runner)) == 1

    later = runner.step(batch)
    assert runner.micro_batch == 3
    assert (later.retries, max(later.split), later.number) == (0, 3, 2)
    if kind == "plain":
        assert distance(seen(runner)[1], want) <= FP64


@each_place
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("given", [False, True], ids=["counted by forward", "count="])
def test_a_window_that_starts_over_still_counts_all_its_tokens(given: bool, index: int, where: str) -> None:
    fault = Fault()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), Tripping(fault), nn.Linear(8, 7)).double()
    batch = pad([sequence(length, seed=i) for i, length in enumerate((8, 8, 8, 4, 2, 1, 1, 1) * 2)])
    want = gradients(model, lambda model, batch: token_sum(model, batch), batch)
    fault.forwards, fault.at = 0, {index: where}
    count = token_count if given else None
    runner = runner_for(Workload(model, batch, loss=token_sum, optimizer=Capture, count=count), 16, 4)
    runner.checks.rechecked = True  # the second look runs the model too, and would be what runs out
    assert runner.step(batch).retries == 1
    assert distance(seen(runner)[0], want) <= FP64


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("index", range(4))
def test_running_out_while_counting_is_recovered_from(
    window: int, index: int, caplog: pytest.LogCaptureFixture
) -> None:
    fault = Fault()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), Tripping(fault), nn.Linear(8, 7)).double()
    batch = pad([sequence(length, seed=i) for i, length in enumerate((8, 8, 8, 4, 2, 1, 1, 1) * 2)])
    want = gradients(model, token_sum, batch)
    runner = runner_for(Workload(model, batch, loss=token_sum, optimizer=Capture), 16, 4)
    runner.checks.rechecked = True  # the second look counts too, and would be what runs out
    fault.fails_counting_at = window * 5 + index
    results = [runner.step(batch) for _ in range(window + 1)]
    assert results[-1].retries == len(recoveries(caplog)) == 1
    assert "count" in recoveries(caplog)[0]
    assert distance(seen(runner)[-1], want) <= FP64


def test_running_out_twice_in_a_window_is_reported_twice(caplog: pytest.LogCaptureFixture) -> None:
    fault, batch = Fault(), vectors(16)
    fault.at = {1: "backward", 2 + 5: "forward"}
    runner = faulty_runner(fault)
    result = runner.step(batch)
    assert result.retries == len(recoveries(caplog)) == 2
    assert result.split == (1,) * 16
    assert distance(seen(runner)[0], gradients(faulty(Fault()), default_loss, batch)) <= FP64
    first, second = recoveries(caplog)
    assert "4" in first and "at most 3" in first and "all 16 samples" in first
    assert "2" in second and "at most 1" in second


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_runs_out_loses_and_repeats_no_sample(workers: int) -> None:
    fault, batch = Fault(), vectors(70)
    fault.at = {4 + 2: "backward"}  # in the second window
    loader = DataLoader(Rows(list(zip(*batch, strict=True))), batch_size=8, num_workers=workers)
    runner = faulty_runner(fault)
    results = list(runner.epoch(loader))
    assert [result.samples for result in results] == [16, 16, 16, 16, 6]
    assert [result.retries for result in results] == [0, 1, 0, 0, 0]
    for got, start in zip(seen(runner), range(0, 70, 16), strict=True):
        window = tuple(v[start : start + 16] for v in batch)
        assert distance(got, gradients(faulty(Fault()), default_loss, window)) <= FP64


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_loaded_before_it_was_lowered_are_cut_without_running_out_again(workers: int) -> None:
    fault, batch = Fault(), vectors(96)
    fault.most = 2
    loader = DataLoader(Rows(list(zip(*batch, strict=True))), batch_size=8, num_workers=workers)
    runner = faulty_runner(fault, micro=8)
    results = list(runner.epoch(loader))
    assert sum(result.retries for result in results) <= 3  # 8 to 7, cut to 4; 4 to 3, cut to 2; 3 to 2
    assert [result.retries for result in results[3:]] == [0] * 3
    assert all(max(result.split) <= 2 for result in results)
    for got, window in zip(seen(runner), cut(batch, [16] * 6), strict=True):
        assert distance(got, gradients(faulty(Fault()), default_loss, window)) <= FP64


@each_place
def test_the_scaler_is_as_though_nothing_had_happened(where: str) -> None:
    fault, batch = Fault(), vectors(16)
    fault.at = {2: where}
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    runner = faulty_runner(fault, scaler=scalers[0])
    assert runner.step(batch).retries == 1
    assert faulty_runner(Fault(), scaler=scalers[1], micro=2).step(batch).retries == 0
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert distance(seen(runner)[0], gradients(faulty(Fault()), default_loss, batch)) <= FP64


# --- what is not recovered from ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x6 and 5x16)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("memory format option is only supported by strided tensors"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
@each_place
def test_any_other_error_is_not_swallowed(where: str, error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    fault = Fault(lambda: error)
    fault.at = {1: where}
    runner = faulty_runner(fault)
    with pytest.raises(type(error)) as raised:
        runner.step(vectors(16))
    assert raised.value is error
    assert fault.forwards == 2
    assert runner.micro_batch == 4
    assert not recoveries(caplog)


@pytest.mark.parametrize("kind", ["plain", "dropout"])
def test_running_out_with_single_samples_raises_with_the_plans_numbers(kind: str) -> None:
    fault = Fault()
    fault.most = 0
    runner = faulty_runner(fault, kind)
    before, random_state = state_of(runner.context.model), take_rng()
    with pytest.raises(OutOfMemory) as raised:
        runner.step(vectors(16))
    text = str(raised.value)
    assert "micro-batch of 1" in text
    assert f"{show_bytes(runner.plan.predicted_peak_bytes)} for a micro-batch of 4" in text
    assert "--target-batch 16" in text
    assert raised.value.__context__ is None  # which would hold the activations
    assert same_tensors(state_of(runner.context.model), before)
    assert same_state(take_rng(), random_state)
    assert all(p.grad is None for p in runner.context.model.parameters())
    assert seen(runner) == []
    assert runner.number == 0


class Greedy(Capture):
    """Runs out of memory when half of the parameters are updated."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_running_out_in_the_optimizer_step_says_that_it_cannot_be_repeated(caplog: pytest.LogCaptureFixture) -> None:
    fault = Fault()
    runner = faulty_runner(fault, optimizer=Greedy)
    with pytest.raises(OutOfMemory, match="optimizer step ran out of memory") as raised:
        runner.step(vectors(16))
    assert "can't be repeated" in str(raised.value)
    assert fault.forwards == 4
    assert not recoveries(caplog)
    assert runner.micro_batch == 4


def packed(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ends = torch.tensor([len(sample["ids"]) for sample in samples]).cumsum(0)
    joined = {key: torch.cat([sample[key] for sample in samples]) for key in ("ids", "labels")}
    return {**joined, "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), ends])}


def packed_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    logits = model(batch["ids"])
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"), len(batch["labels"])


@pytest.mark.parametrize("fails", [False, True])
def test_packed_micro_batches_train_but_cannot_be_cut_again(fails: bool) -> None:
    fault = Fault()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), Tripping(fault), nn.Linear(8, 7)).double()
    samples = [sequence(length, seed=i) for i, length in enumerate((8, 8, 8, 4, 2, 1, 1, 1) * 2)]
    wants = [gradients(model, packed_sum, packed(samples[i : i + 8])) for i in (0, 8)]
    fault.forwards, fault.at = 0, {1: "backward"} if fails else {}
    work = Workload(model, packed(samples), loss=packed_sum, optimizer=Capture)
    runner = runner_for(work, 8, 4)
    loader = DataLoader(Rows(samples), batch_size=8, collate_fn=packed)
    if fails:
        with pytest.raises(OutOfMemory, match="can't be cut"):
            list(runner.epoch(loader))
        assert runner.micro_batch == 3  # from here on the collate function packs less
        assert all(p.grad is None for p in model.parameters())
        results = list(runner.epoch(loader))
        assert [max(result.split) for result in results] == [3, 3]
    else:
        assert [result.split for result in runner.epoch(loader)] == [(4, 4), (4, 4)]
    for got, want in zip(seen(runner), wants, strict=True):
        assert distance(got, want) <= FP64


# --- what it leaves behind ---------------------------------------------------------------------------------------


class Marker:
    """Lives as long as the graph node that holds it."""

    me: Marker
    held: torch.Tensor


class Apart:
    """Holds what a loss reaches and a restart must not put back: an object without a __dict__ isn't followed."""

    __slots__ = ("alive", "fault", "found")


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alive: list[weakref.ref[Any]]) -> torch.Tensor:
        ctx.marker, out = Marker(), x * 1
        ctx.save_for_backward(out)
        alive += [weakref.ref(ctx.marker), weakref.ref(out)]
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


@each_error
@each_place
@pytest.mark.parametrize("how", ["as raised", "wrapped", "kept", "in a cycle"])
def test_what_failed_is_freed_before_the_retry_begins(how: str, where: str, error: Callable[[], BaseException]) -> None:
    fault, alive, found, kept = Fault(error), list[Any](), list[int](), list[BaseException]()
    fault.at = {1: where}
    apart = Apart()
    apart.fault, apart.alive, apart.found = fault, alive, found

    def raised() -> BaseException:
        kept.append(error())
        return kept[-1]

    if how == "kept":  # by somebody's log, say
        fault.error = raised

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and apart.fault.forwards == 2:
            apart.found.append(sum(ref() is not None for ref in apart.alive))
        x = Marked.apply(batch[0].clone().requires_grad_(), apart.alive)  # type: ignore[no-untyped-call]
        if how == "in a cycle":
            cycle = Marker()
            cycle.me, cycle.held = cycle, x
        try:
            return default_loss(model, (x, batch[1]))
        except (RuntimeError, MemoryError) as inner:
            if how != "wrapped":
                raise
            raise MemoryError("no memory, says the loss") from inner

    runner = faulty_runner(fault, loss=loss)
    gc.disable()  # so that nothing is freed by chance
    try:
        assert runner.step(vectors(16)).retries == 1
    finally:
        gc.enable()
    assert len(alive) > 8
    assert found == [0]


# torch 2.6 raises a RuntimeError in its place.
AcceleratorError: Any = getattr(torch, "AcceleratorError", lambda message, code: RuntimeError(message))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError(ALLOCATOR), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (AcceleratorError("CUDA error: out of memory", 2), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError(""), False),
        (OSError(12, "Cannot allocate memory"), False),
        (ValueError("out of memory"), False),
    ],
    ids=repr,
)
def test_only_a_real_out_of_memory_counts_as_one(error: BaseException, is_one: bool) -> None:
    assert oom.is_out_of_memory(error) == is_one


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    ("error", "device"),
    [
        (RuntimeError("could not create a primitive"), "cpu"),
        (RuntimeError("std::bad_alloc"), "cpu"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "cuda"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "cuda"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), "cuda"),
    ],
    ids=repr,
)
def test_what_is_said_for_other_reasons_too_counts_only_where_memory_is_short(
    error: BaseException, device: str, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    monkeypatch.setattr(oom, f"{device}_is_short", lambda: short)
    monkeypatch.setattr(oom, f"{other}_is_short", lambda: not short)
    assert oom.is_out_of_memory(error) == short


@pytest.mark.parametrize(("used", "short"), [(100, False), (700, False), (800, True), (1100, True)])
def test_memory_is_short_near_the_tightest_limit(used: int, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [BudgetItem("data limit", 1000, ""), BudgetItem("available", 9000, "")]
    monkeypatch.setattr(budget, "_limits", lambda: limits)
    monkeypatch.setattr(oom, "committed_bytes", lambda: used)
    assert oom.cpu_is_short() == short


def test_dropping_frames_reaches_cause_and_context() -> None:
    def fail_with(name: str) -> None:
        big = Marker()
        alive.append(weakref.ref(big))
        raise RuntimeError(name)

    def saved() -> BaseException:
        try:
            fail_with("cause")
        except RuntimeError as error:
            return error
        raise AssertionError

    def fail() -> None:
        cause = saved()
        try:
            fail_with("context")
        except RuntimeError:
            raise MemoryError("first line\nsecond line") from cause

    alive = list[Any]()
    try:
        fail()
    except MemoryError as error:
        assert oom.drop_frames(error) == "MemoryError: first line"
        assert [ref() for ref in alive] == [None, None]  # even here, where the error itself is alive


# --- for real ----------------------------------------------------------------------------------------------------

MADE = """
import torch
from torch import nn

WIDTH, WINDOW, MICRO, STEPS = 1 << 17, 64, 32, 2
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
windows = [(torch.randn(WINDOW, 4).double(), torch.randint(2, (WINDOW,))) for _ in range(STEPS)]
sgd = lambda params: torch.optim.SGD(params, lr=0.05)
"""
LIMITED = (
    MADE
    + """
import json, logging, resource, sys
import helpers_train
from autoaccum import Plan, Runner, Workload
from autoaccum.devices.cpu.peak_sampler import PeakSampler

torch.set_num_threads(1)
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("autoaccum").addHandler(handler)
work = Workload(model, windows[0], optimizer=sgd)
base = Plan.load(sys.argv[2])
helpers_train.base_plan = lambda: base
runner = Runner(work, helpers_train.plan_for(work, WINDOW, MICRO))
first = {name: value.clone() for name, value in model.state_dict().items()}
runner.micro_batch = MICRO // 2
with PeakSampler() as warm_up:
    runner.step(windows[0])
model.load_state_dict(first)
runner.micro_batch = MICRO
half = (MICRO // 2) * WIDTH * 8  # one block of hidden values, for half the micro-batch
limit = warm_up.committed_peak_bytes + half // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
results = [runner.step(window) for window in windows]
found = {
    "retries": [result.retries for result in results],
    "splits": [result.split for result in results],
    "recoveries": [text for text in warnings if "ut of memory" in text],
    "block": half,
}
print(json.dumps(found))
torch.save(model.state_dict(), sys.argv[1])
"""
)


def limited(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a process with a limit found, and the parameters that it came to."""
    base_plan().save(folder / "plan.json")
    path = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    command = [sys.executable, "-c", LIMITED, folder / "limited.pt", folder / "plan.json"]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), torch.load(folder / "limited.pt")


def without_limit() -> dict[str, torch.Tensor]:
    """The parameters that a plain loop comes to."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(MADE, names)
    model = names["model"]
    optimizer = names["sgd"](model.parameters())
    for x, y in names["windows"]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
def test_a_real_out_of_memory_is_recovered_from_exactly(tmp_path: Path) -> None:
    (found, got), want = limited(tmp_path), without_limit()
    assert found["retries"][0] >= 1, found
    assert sum(found["retries"]) == len(found["recoveries"])
    assert all("allocate" in text or "MemoryError" in text for text in found["recoveries"]), found["recoveries"]
    assert [sum(split) for split in found["splits"]] == [64] * 2
    assert max(found["splits"][0]) <= 16
    for name, value in want.items():
        assert float((got[name] - value).norm() / value.norm()) <= FP64, name


def test_batch_statistics_are_never_taken_of_a_single_sample() -> None:
    seen: list[int] = []

    def short(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(len(batch[0]))
        raise torch.OutOfMemoryError("short")

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    work = Workload(model, vectors(4), loss=lambda m, b: default_loss(m, b))
    plan = fit_plan(work, target_batch=5, budget="4GiB", max_micro_batch=4, verify=False)
    assert plan.split == (3, 2) and plan.request.min_micro_batch == 2
    runner = Runner(work, plan)
    runner.context.loss = short
    runner.context.loss_is_pair = False
    with pytest.raises(OutOfMemory, match="micro-batch of 3"):  # 5 samples in micro-batches of two or more: 3 and 2
        runner.step(vectors(5))
    assert seen == [3, 3] or seen == [3]


def test_running_out_while_the_snapshot_is_taken_is_recovered_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken, take = mlp(), list[int](), snapshot.take
    runner = runner_for(Workload(model, vectors(4), optimizer=Capture), 8, 4)
    want = gradients(model, default_loss, vectors(8))

    def short(**how: Any) -> Any:
        taken.append(1)
        if len(taken) == 1:
            raise MemoryError
        return take(**how)

    monkeypatch.setattr(snapshot, "take", short)
    result = runner.step(vectors(8))
    assert result.retries == 1
    assert distance(seen(runner)[-1], want) <= FP64


def test_a_window_whose_loss_spoils_its_batch_is_not_repeated() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        batch[0].mul_(2)
        raise torch.OutOfMemoryError("short")

    runner = runner_for(Workload(mlp(), vectors(4)), 8, 4)
    runner.context.loss, runner.context.loss_is_pair = loss, False
    with pytest.raises(OutOfMemory, match="changes its batch in place"):
        runner.step(vectors(8))


def test_counting_does_not_spoil_a_batch_that_the_loss_writes_to() -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        losses = nn.functional.cross_entropy(model(batch[0].mul_(2)), batch[1], reduction="none")
        return losses.sum(), len(losses)

    runner = runner_for(Workload(mlp(), vectors(4), loss=loss, optimizer=Capture), 8, 4)
    doubled = vectors(8)[0] * 2, vectors(8)[1]
    want = gradients(runner.context.model, default_loss, doubled)
    runner.step(vectors(8))
    assert distance(seen(runner)[-1], want) < FP64
