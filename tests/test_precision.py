"""Gradients of half-precision parameters add up in fp32, and their memory is in the recorded window."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import Capture, cut, distance, gradients, mlp, one_thread, runner_for, vectors  # noqa: F401
from torch import nn

from autoaccum import NotFinite, UsageError, Workload, fit_plan
from autoaccum.devices.cpu.recorder import record
from autoaccum.phases import LATER, OPTIMIZER
from autoaccum.simulation.recording import live_peak
from autoaccum.window import fp32_accumulation
from autoaccum.window.fingerprint import fingerprint
from autoaccum.window.fp32_accumulation import half_parameters, narrow, wide_gradients, wide_parameters, widening_bytes
from autoaccum.window.step import open_context, train_window
from autoaccum.workload import default_loss

LACKS_GRAD_DTYPE = None if hasattr(torch.Tensor, "grad_dtype") else f"torch {torch.__version__} lacks Tensor.grad_dtype"


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum in fp32 by torch's own way, or by that for versions without it."""
    if request.param == "hook":
        monkeypatch.setattr(fp32_accumulation, "HAS_GRAD_DTYPE", False)
    elif LACKS_GRAD_DTYPE:
        pytest.skip(LACKS_GRAD_DTYPE)


def as_before(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the parameters have no gradient, and the next one will have this dtype."""
    parameters = list(model.parameters())
    left = any(p.grad is not None for p in parameters)
    for p in parameters:
        (p * torch.ones_like(p)).sum().backward()
    found = {p.grad.dtype for p in parameters if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return not left and found == {dtype}


def both_ways(test: Any) -> Any:
    """Run a test with both ways to fp32 sums."""
    return pytest.mark.parametrize("way", ["grad_dtype", "hook"], indirect=True)(pytest.mark.usefixtures("way")(test))


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


class Ones(nn.Module):
    """A gradient of one from each sample."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def total(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    return model(batch["x"]), 1


class Dtypes(Capture):
    """Also keeps what dtype it was given."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.dtypes = {p.grad.dtype for group in self.param_groups for p in group["params"]}
        super().step()


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_thousand_ones_come_to_a_thousand(dtype: torch.dtype) -> None:
    model = Ones(dtype)
    batch = {"x": torch.ones(1000, 1, dtype=dtype)}
    context = open_context(Workload(model, batch, loss=total, count=lambda b: 0.001, optimizer=Dtypes))
    train_window(context, list(cut(batch, (1,) * 1000)), (1,) * 1000)
    assert context.optimizer.seen[-1][0].tolist() == [1000.0] * 3  # type: ignore[attr-defined]
    assert context.optimizer.dtypes == {dtype}  # type: ignore[attr-defined]
    if dtype is torch.bfloat16:  # the usual mistake
        for _ in range(1000):
            model(batch["x"][:1]).backward()
        assert model.weight.grad is not None and model.weight.grad.tolist() == [256.0] * 3


@both_ways
@HALVES
def test_the_sum_is_that_of_the_micro_batches_in_fp32(dtype: torch.dtype) -> None:
    model, batch = mlp(dtype), vectors(64, dtype)
    context = open_context(Workload(model, batch, optimizer=Capture))
    pieces = list(cut(batch, (1,) * 64))

    def micro(piece: Any) -> list[torch.Tensor]:
        return [g.float() for g in gradients(model, lambda m, b: default_loss(m, b) * 1 / 64, piece)]

    want = [sum(column) for column in zip(*map(micro, pieces), strict=True)]
    norms = []
    context.optimizer.register_step_pre_hook(lambda *_: norms.append(1))
    train_window(context, pieces, (1,) * 64)
    got = context.optimizer.seen[-1]  # type: ignore[attr-defined]
    exact = [w.to(dtype) for w in want]
    assert all(g.dtype == dtype for g in got)
    assert distance(got, exact) <= 2e-3  # one rounding of a sum, which may fall to either side


@HALVES
def test_sums_in_the_parameters_own_precision_are_a_plain_loops(dtype: torch.dtype) -> None:
    model, batch = mlp(dtype), vectors(64, dtype)
    pieces = list(cut(batch, (4,) * 16))
    found = {}
    for accumulate in ("fp32", "as_parameters"):
        context = open_context(Workload(model, batch, optimizer=Capture, accumulate=accumulate))
        train_window(context, pieces, (4,) * 16)
        found[accumulate] = context.optimizer.seen[-1]  # type: ignore[attr-defined]
    for piece in pieces:
        (default_loss(model, piece) / 16).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found["as_parameters"], model.parameters(), strict=True))
    assert distance(found["as_parameters"], found["fp32"]) > 0


def test_how_sums_are_kept_is_checked_and_part_of_the_fingerprint() -> None:
    model, batch = mlp(torch.bfloat16), vectors(8, torch.bfloat16)
    with pytest.raises(UsageError, match="accumulate 'bf16' is not known"):
        Workload(model, batch, accumulate="bf16")
    plain, wide = (open_context(Workload(model, batch, accumulate=each)) for each in ("as_parameters", "fp32"))
    assert fingerprint(plain)["window"] == "adds up as parameters"
    assert fingerprint(wide)["window"] == "plain"


def test_what_they_take_beyond_a_plain_loops_is_counted() -> None:
    halves = mlp(torch.bfloat16)
    numel = sum(p.numel() for p in halves.parameters())
    assert widening_bytes(halves.parameters()) == 2 * numel
    assert widening_bytes(mlp(torch.float32).parameters()) == 0
    assert wide_parameters(halves.parameters(), "fp32", 1) == []  # one micro-batch has nothing to add up
    assert len(wide_parameters(halves.parameters(), "fp32", 2)) == len(list(halves.parameters()))
    assert wide_parameters(halves.parameters(), "as_parameters", 2) == []


@both_ways
@HALVES
def test_clipping_is_done_in_fp32_before_the_cast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    clip = nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grads_with_norm_", lambda ps, *a: (seen.extend(p.grad.dtype for p in ps), clip(ps, *a))[1]
    )
    context = open_context(Workload(mlp(dtype), vectors(8, dtype), clip_grad_norm=1e-3, optimizer=Dtypes))
    train_window(context, list(cut(vectors(8, dtype), (4, 4))), (4, 4))
    assert set(seen) == {torch.float32}
    assert context.optimizer.dtypes == {dtype}  # type: ignore[attr-defined]


@both_ways
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_optimizers_take_them_and_the_parameters_are_as_before(make: Any) -> None:
    model = mlp(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    context = open_context(Workload(model, vectors(8, torch.bfloat16), optimizer=lambda p: make(p, lr=0.1)))
    for sizes in ((4, 4), (8,), (3, 3, 2)):
        train_window(context, list(cut(vectors(8, torch.bfloat16), sizes)), sizes)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and as_before(model, torch.bfloat16)
    assert not any(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@both_ways
@pytest.mark.parametrize("where", ["forward", "optimizer"])
def test_an_error_leaves_parameters_with_gradients_of_their_own_dtype(where: str) -> None:
    class Failing(Capture):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise KeyError("optimizer")

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        if where == "forward" and torch.is_grad_enabled() and len(calls) == 2:
            raise KeyError("forward")
        calls.append(1)
        return default_loss(m, b)

    calls: list[int] = []
    model = mlp(torch.bfloat16)
    batch = vectors(8, torch.bfloat16)
    context = open_context(Workload(model, batch, loss=loss, optimizer=Failing if where == "optimizer" else Capture))
    with pytest.raises(KeyError):
        train_window(context, list(cut(batch, (3, 3, 2))), (3, 3, 2))
    model.zero_grad(set_to_none=True)
    assert as_before(model, torch.bfloat16)


def test_full_precision_is_left_alone() -> None:
    model = mlp(torch.bfloat16)
    first, *rest = model.parameters()
    assert len(half_parameters(model.parameters())) == 1 + len(rest)
    assert half_parameters(mlp(torch.float32).parameters()) == []
    first.requires_grad_(False)
    rest[0].requires_grad_(False)
    assert [id(p) for p in half_parameters(model.parameters())] == [id(p) for p in rest[1:]]


@pytest.mark.skipif(LACKS_GRAD_DTYPE is not None, reason=str(LACKS_GRAD_DTYPE))
def test_a_users_own_choice_of_the_gradients_dtype_is_left_alone() -> None:
    model = mlp(torch.bfloat16)
    first, *rest = model.parameters()
    first.grad_dtype = torch.float32
    assert [id(p) for p in half_parameters(model.parameters())] == [id(p) for p in rest]


@both_ways
def test_gradients_of_a_sparse_embedding_add_up_in_fp32() -> None:
    embedding = nn.Embedding(4, 2, sparse=True, dtype=torch.bfloat16)
    with wide_gradients([embedding.weight]):
        for _ in range(1000):
            embedding(torch.tensor([1, 2])).sum().backward()
        assert embedding.weight.grad is not None
        total = embedding.weight.grad.to_dense()
    assert total.dtype is torch.float32 and total.tolist() == [[0.0] * 2, [1000.0] * 2, [1000.0] * 2, [0.0] * 2]
    assert as_before(embedding, torch.bfloat16)


@both_ways
def test_what_was_not_cast_is_dropped() -> None:
    one, other = (nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(2))
    with wide_gradients([one, other]):
        (one.sum() + other.sum()).backward()
        narrow([one])
    assert one.grad is not None and one.grad.dtype is torch.bfloat16
    assert other.grad is None
    other.sum().backward()
    assert other.grad is not None and other.grad.dtype is torch.bfloat16


def test_autocast_leaves_fp32_parameters_as_they_are() -> None:
    context = open_context(Workload(mlp(torch.float32), vectors(8, torch.float32), precision="bf16", optimizer=Dtypes))
    train_window(context, list(cut(vectors(8, torch.float32), (4, 4))), (4, 4))
    assert context.optimizer.dtypes == {torch.float32}  # type: ignore[attr-defined]


@both_ways
def test_the_memory_of_fp32_gradients_is_in_the_recorded_window() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).float().pow(2).mean()

    parameters = 512 * 512
    context = open_context(Workload(Wide(), None, loss=lambda m, b: m(b["x"]), optimizer=Capture))
    batch = {"x": torch.ones(3, 512, dtype=torch.bfloat16)}

    def run(on_phase: Any) -> None:
        train_window(context, [batch, batch], (3, 3), on_phase=on_phase)

    run(None)
    context.optimizer.seen.clear()  # type: ignore[attr-defined]
    recorded = record(run, micro_batch=3)
    peaks = {phase.name: live_peak(recorded.phases[: i + 1]) for i, phase in enumerate(recorded.phases)}
    later = peaks[LATER]
    assert later >= parameters * (4 + 2)  # what has added up, and the micro-batch's own
    casts = [e.bytes for p in recorded.phases if p.name == OPTIMIZER for e in p.events]
    assert parameters * 2 in casts and -parameters * 4 in casts  # cast to bf16, and the fp32 one freed


@both_ways
@HALVES
def test_a_scaler_with_half_precision_parameters(dtype: torch.dtype) -> None:
    model, batch = mlp(dtype), vectors(16, dtype)
    plain = open_context(Workload(copy.deepcopy(model), batch, optimizer=Capture))
    train_window(plain, list(cut(batch, (4,) * 4)), (4,) * 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    scaled = open_context(Workload(model, batch, optimizer=Capture, scaler=scaler))
    train_window(scaled, list(cut(batch, (4,) * 4)), (4,) * 4)
    assert distance(scaled.optimizer.seen[-1], plain.optimizer.seen[-1]) <= 2e-2  # type: ignore[attr-defined]


@both_ways
@HALVES
@pytest.mark.parametrize("choice", ["skip", "raise"])
def test_a_gradient_that_is_not_finite_leaves_half_precision_parameters_alone(dtype: torch.dtype, choice: str) -> None:
    model, batch = mlp(dtype), vectors(16, dtype)
    batch[0][5] = float("inf")
    before = copy.deepcopy(model.state_dict())
    runner = runner_for(Workload(model, batch, on_nonfinite=choice), 16, 4)
    if choice == "raise":
        with pytest.raises(NotFinite):
            runner.step(batch)
    else:
        assert not runner.step(batch).stepped
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert as_before(model, dtype)


def plan_of_half_precision() -> dict[str, int | None]:
    """Four layers in bf16, planned: what of the peak lies above the base."""
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(4)])

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return m(b).float().square().mean()

    sample = torch.ones(2, 2048, dtype=torch.bfloat16)
    work = Workload(model, sample, loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    plan = fit_plan(work, target_batch=9, max_micro_batch=3, check=False, train_in_new_process=True)
    assert plan.measured_peak_bytes is not None
    return {
        "gradients in fp32": 4 * sum(p.numel() for p in model.parameters()),
        "predicted": plan.predicted_peak_bytes - plan.memory.baseline_bytes,
        "measured": plan.measured_peak_bytes - plan.memory.baseline_bytes,
        "later": plan.memory.phases[LATER] - plan.memory.baseline_bytes,
    }


@pytest.mark.slow
def test_the_memory_of_fp32_gradients_is_in_the_plans_prediction() -> None:
    # A process of its own: in one that ran hundreds of tests, small blocks find holes in the heap.
    code = "import json, test_precision as t; print(json.dumps(t.plan_of_half_precision()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert abs(found["predicted"] / found["measured"] - 1) < 0.05
    assert found["later"] > found["gradients in fp32"]  # in half precision it would be half of that
