"""`autoaccum.windows(..., accelerator=)`, with the real library: one process, and two ranks over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_scripts
from helpers_train import (
    FP64,
    NAIVE,
    Capture,
    Rows,
    distance,
    gradients,
    mlp,
    one_thread,  # noqa: F401
    pad,
    sequence,
    tagger,
    token_count,
    vectors,
)
from plan_fields import changed_plan
from test_plain_loop import mean, plan, token_mean, token_plan
from torch.utils.data import DataLoader

from autoaccum import UsageError, windows

accelerate = pytest.importorskip("accelerate")
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """An Accelerator's state is global: each test begins without."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("configured", [1, 4])
def test_a_window_has_the_whole_batch_s_gradient_whatever_was_configured(configured: int) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=configured)
    model, batch = mlp(), vectors(50)
    optimizer = Capture(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader: Any = DataLoader(Rows(list(zip(*batch, strict=True))), batch_size=8)
    model, prepared, loader, wrapped = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(2):
        for window in windows(loader, plan(20, 7), accelerator=accelerator):
            for micro in window:
                with accelerator.accumulate(model):  # left in from the loop before: it decides nothing any more
                    window.backward(mean(model, micro.batch))
            window.step(prepared, scheduler=wrapped)
    assert scheduler.last_epoch == 6
    for got, start in zip(optimizer.seen, [0, 20, 40] * 2, strict=True):
        assert distance(got, gradients(model, mean, tuple(v[start : start + 20] for v in batch))) <= FP64


def test_accelerate_s_own_accumulation_is_off_at_the_tail_and_with_ragged_labels() -> None:
    """What the page says, and what the weights repair."""
    samples = [sequence(length, seed=i) for i, length in enumerate((50, 50, 48, 41, 50, 3, 2, 1, 50, 7))]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tagger()
    optimizer = Capture(model.parameters())
    loader: Any = DataLoader(Rows(samples), batch_size=2, collate_fn=pad)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(token_mean(model, batch))
            prepared.step()
            prepared.zero_grad()
    own, optimizer.seen = optimizer.seen, []
    for window in windows(loader, token_plan(4, 2, "samples"), accelerator=accelerator, count=token_count):
        for micro in window:
            window.backward(token_mean(model, micro.batch))
        window.step(prepared)
    for got, theirs, start in zip(optimizer.seen, own, (0, 4, 8), strict=True):
        want = gradients(model, token_mean, pad(samples[start : start + 4]))
        assert distance(got, want) <= FP64
        assert start == 0 or distance(theirs, want) > NAIVE


def test_clipping_and_a_plateau_go_by_the_accelerator() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, batch = mlp(), vectors(20)
    optimizer = Capture(model.parameters())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    model, prepared, wrapped = accelerator.prepare(model, optimizer, plateau)
    want = gradients(model, mean, batch)
    for window in windows([batch], plan(20, 7), accelerator=accelerator):
        for micro in window:
            window.backward(mean(model, micro.batch))
        result = window.step(prepared, scheduler=wrapped, max_grad_norm=0.01)
    norm = torch.cat([g.flatten() for g in want]).norm()
    assert result.grad_norm is not None and torch.allclose(result.grad_norm, norm, rtol=1e-12)
    assert distance(optimizer.seen[0], [g * 0.01 / (norm + 1e-6) for g in want]) <= FP64
    assert plateau.best == pytest.approx(float(result.loss))


def test_a_second_scaler_and_other_ranks_are_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(UsageError, match="scaler= and accelerator="):
        windows([vectors(4)], plan(20, 7), accelerator=accelerator, scaler=torch.amp.GradScaler("cpu"))
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    with pytest.raises(UsageError, match="distributed type is FSDP"):
        windows([vectors(4)], plan(20, 7), accelerator=accelerator)


def test_two_ranks_have_the_whole_batch_s_gradient_tail_and_empty_ranks_included(tmp_path: Path) -> None:
    numbered = (*vectors(4), torch.arange(4))
    changed_plan(plan(10, 3, sample=numbered)).save(tmp_path / "mean.json")
    token_plan(4, 1, "count=").save(tmp_path / "tokens.json")
    loops = [str(HERE / "rank_loops.py"), "mean.json", "tokens.json"]
    (out,) = run_scripts(2, [loops], tmp_path, ["rank_loops"])
    # gloo greets on stdout before torch 2.11
    assert [line for line in out.splitlines() if "done" in line] == ["rank 0 done", "rank 1 done"]
