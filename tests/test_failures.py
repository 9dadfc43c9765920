"""The failures that docs/exactness.md lists: that each has its tests, and those tests that belong to no other file."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP64,
    Capture,
    cut,
    distance,
    gradients,
    mean_of,
    mlp,
    one_thread,  # noqa: F401
    pad,
    runner_for,
    seen,
    sequence,
    tagger,
    token_sum,
    vectors,
)
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from autoaccum import UsageError, Workload
from autoaccum.devices.cpu.recorder import record
from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.simulation.program import lift, plain_window
from autoaccum.simulation.recording import Recording, live_peak
from autoaccum.simulation.solver import rank_share, split_within
from autoaccum.window.step import TrainingContext, open_context, run_between, train_window
from autoaccum.workload import default_loss

OVER_RANKS = {15, 16, 17, 18, 21, 22}
DOCS = Path(__file__).parent.parent / "docs" / "exactness.md"


def rows_of_the_table() -> dict[int, list[tuple[str, str]]]:
    """By the number of a failure, the file and the name of each of its tests."""
    found = {}
    for line in DOCS.read_text().splitlines():
        row = re.match(r"\| (\d+) \|", line)
        if row:
            found[int(row[1])] = re.findall(r"`(test_\w+)::(test_\w+)`", line)
    return found


def names_in(file: str) -> set[str]:
    parsed = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
    return {node.name for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)}


def test_every_failure_of_the_table_has_its_tests() -> None:
    rows = rows_of_the_table()
    assert sorted(rows) == list(range(1, 35))
    assert {row for row, tests in rows.items() if not tests} <= OVER_RANKS
    missing = [f"{file}::{name}" for row in rows.values() for file, name in row if name not in names_in(file)]
    assert not missing


# --- denominators --------------------------------------------------------------------------------------------------


def test_ragged_tokens_are_no_mean_of_means() -> None:
    """Lengths 8, 8, 8, 4, 2, 1, 1, 1: the plain mean of the micro-batches is off by more than half."""
    batch = pad([sequence(length, seed=i) for i, length in enumerate([8, 8, 8, 4, 2, 1, 1, 1])])
    model = tagger()
    want = gradients(model, token_sum, batch)
    runner = runner_for(Workload(model, batch, loss=token_sum, optimizer=Capture), 8, 1)
    assert runner.step(batch).split == (1,) * 8
    assert distance(seen(runner)[-1], want) <= FP64
    assert distance(mean_of([gradients(model, token_sum, piece) for piece in cut(batch, (1,) * 8)]), want) > 0.5


@pytest.mark.parametrize("rest", range(1, 9))
def test_a_tail_window_is_not_divided_by_the_configured_steps(rest: int) -> None:
    """Divided by k in place of the r micro-batches there are, a tail's gradient is r / k of the right one."""
    model, batch, k = mlp(), vectors(4 * rest), 8
    want = gradients(model, default_loss, batch)
    runner = runner_for(Workload(model, vectors(2), optimizer=Capture), 4 * k, 4)
    assert runner.step(batch).split == (4,) * rest
    got = seen(runner)[-1]
    assert distance(got, want) <= FP64
    norms = [torch.cat([g.flatten() for g in side]).norm() for side in (got, want)]
    assert float(norms[0] / norms[1]) == pytest.approx(1, abs=1e-12)


def test_one_sample_left_over_weighs_one_sample() -> None:
    model, batch = mlp(), vectors(65)
    context = open_context(Workload(model, batch, optimizer=Capture))
    train_window(context, list(cut(batch, (64, 1))), (64, 1))
    want = gradients(model, default_loss, batch)
    assert distance(context.optimizer.seen[-1], want) <= FP64  # type: ignore[attr-defined]
    assert distance(mean_of([gradients(model, default_loss, piece) for piece in cut(batch, (64, 1))]), want) > 0.5


def test_the_effective_batch_is_kept_whatever_the_ranks_and_the_memory() -> None:
    drawn = random.Random(0)
    for _ in range(10_000):
        ranks = drawn.randint(1, 64)
        target, micro_batch = drawn.randint(ranks, 4096), drawn.randint(1, 300)
        splits = [split_within(rank_share(target, ranks, rank), micro_batch) for rank in range(ranks)]
        assert sum(map(sum, splits)) == target
        assert all(min(split) > 0 and max(split) <= micro_batch and max(split) - min(split) <= 1 for split in splits)


# --- precision -----------------------------------------------------------------------------------------------------


def test_bf16_gradients_of_64_micro_batches_are_their_fp32_sum() -> None:
    model, batch, sizes = mlp(torch.bfloat16), vectors(64, torch.bfloat16), (1,) * 64
    context = open_context(Workload(model, batch, optimizer=Capture))
    pieces, added = list(cut(batch, sizes)), list[list[torch.Tensor]]()

    def before_the_step(name: str) -> Any:
        if name == OPTIMIZER:
            added.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return torch.autograd.profiler.record_function(name)

    train_window(context, pieces, sizes, on_phase=before_the_step)
    micro = [[g.float() for g in gradients(model, lambda m, b: default_loss(m, b) / 64, piece)] for piece in pieces]
    want = [sum(column) for column in zip(*micro, strict=True)]
    assert all(g.dtype is torch.float32 for g in added[-1])
    assert distance(added[-1], want) <= 1e-6
    for p in model.parameters():
        p.grad = None
    for piece in pieces:  # the usual mistake
        (default_loss(model, piece) / 64).backward()
    assert distance([p.grad for p in model.parameters() if p.grad is not None], want) > 1e-3


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_window_of_256_micro_batches_grows_by_nothing() -> None:
    """A loss that is added up with its graph keeps every micro-batch's activations."""
    context = open_context(Workload(mlp(), vectors(2), optimizer=torch.optim.AdamW))
    pieces = [vectors(2)] * 256
    train_window(context, pieces[:2], (2, 2))
    phases = record(lambda on: train_window(context, pieces, (2,) * 256, on_phase=on), micro_batch=2).phases
    left = [sum(event.bytes for event in phase.events) for phase in phases if phase.name == LATER]
    assert len(left) == 255 and not any(left)


class Body(nn.Module):
    """Layers of one width, and a head."""

    def __init__(self, width: int, depth: int, out: int, *, checkpointed: bool = False) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
        self.layers, self.head, self.checkpointed = nn.Sequential(*layers), nn.Linear(width, out), checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return self.head(checkpoint_sequential(self.layers, 4, x, use_reentrant=False))
        return self.head(self.layers(x))


def averaging(model: nn.Module) -> Any:
    average = torch.optim.swa_utils.AveragedModel(model)
    return lambda trained: average.update_parameters(trained)


ADAM = torch.optim.AdamW
CONFIGURATIONS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "SGD": ({}, lambda p: torch.optim.SGD(p, lr=0.1), {}),
    "SGD with momentum": ({}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {}),
    "AdamW, foreach": ({}, lambda p: ADAM(p, foreach=True), {}),
    "AdamW, loop": ({}, lambda p: ADAM(p, foreach=False), {}),
    "AdamW, fused": ({}, lambda p: ADAM(p, fused=True), {}),
    "mostly parameters": ({"width": 256}, lambda p: ADAM(p, foreach=True), {}),
    "mostly activations": ({"width": 32, "depth": 16}, lambda p: ADAM(p, foreach=True), {}),
    "clipping and an average": (
        {},
        lambda p: ADAM(p, foreach=True),
        {"clip_grad_norm": 1.0, "between_steps": averaging},
    ),
    "autocast": ({}, ADAM, {"precision": "bf16"}),
    "checkpointed": ({"depth": 8, "checkpointed": True}, ADAM, {}),
    "a large head": ({"out": 2048}, ADAM, {}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_peak_is_not_that_of_the_first_micro_batch(name: str) -> None:
    """Predicted from small windows, against the third window of a larger one; bytes alive, above the parameters."""
    shape, optimizer, more = CONFIGURATIONS[name]
    width, n, out = shape.get("width", 64), 61, shape.get("out", 10)

    def context_of() -> TrainingContext:
        torch.manual_seed(0)
        model = Body(**{"width": width, "depth": 4, "out": out, **shape})
        how = {key: value(model) if key == "between_steps" else value for key, value in more.items()}
        return open_context(Workload(model, None, loss=default_loss, optimizer=optimizer, **how))

    def recorded(context: TrainingContext, size: int, steps: int) -> Recording:
        pieces = [(torch.randn(size, width), torch.arange(size) % out)] * steps

        def run(on_phase: Any) -> None:
            train_window(context, pieces, (size,) * steps, on_phase=on_phase)
            run_between(context, on_phase=on_phase)

        return record(run, micro_batch=size)

    real, small = context_of(), context_of()
    first, _, third = (recorded(real, n, 3) for _ in range(3))
    truth = live_peak(third.phases)
    first_step_events = [event for phase in recorded(small, 2, 1).phases for event in phase.events]
    program = lift([recorded(small, size, 2) for size in (31, 47)], tuple(first_step_events))
    assert truth <= live_peak(plain_window(program, (n,) * 3)) <= 1.05 * truth
    state = sum(event.bytes for phase in first.phases for event in phase.events)  # what the first window leaves
    seen_first = live_peak(phase for phase in first.phases if phase.name == FIRST)
    assert seen_first < 0.9 * (truth + state)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_the_middle_of_a_window_is_refused() -> None:
    """Its gradients would be lost: the window's samples count for nothing when it is resumed."""
    taken = list[Any]()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            taken.append(runner.state_dict())
        return F.cross_entropy(model(batch[0]), batch[1])

    runner = runner_for(Workload(mlp(), vectors(2), loss=loss, optimizer=Capture), 16, 4)
    with pytest.raises(UsageError, match="middle of a window"):
        runner.step(vectors(16))
    assert not taken
    runner.context.loss = default_loss
    runner.step(vectors(16))
    assert runner.state_dict()["number"] == 1


def test_every_mutation_still_applies_to_the_source() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, root / "scripts" / "mutate", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
