"""autoaccum bench: candidates, what becomes of them under a real limit, and how it is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from plan_fields import changed_plan
from strategies import made_up_plan
from test_report import NASTY
from typer.testing import CliRunner

from autoaccum import Plan
from autoaccum.cli import app
from autoaccum.processes.child import call
from autoaccum.tuning.compare import comparison, results
from autoaccum.tuning.compare.candidates import (
    HALVING,
    PLAN,
    TUNED,
    Candidate,
    Comparison,
    Trained,
    candidates_for,
    hand_picked,
)
from autoaccum.units import parse_bytes

MIB = 2**20
TARGET = 100
WIDE = """
import torch
from autoaccum import Workload

class Wide(torch.nn.Module):
    '''2 MiB of activations a sample, and hardly any work.'''

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(131072))
        self.head = torch.nn.Linear(4, 4)

    def forward(self, x):
        y = self.head(x).mean(1, keepdim=True) * self.scale
        for _ in range(4):
            y = y.tanh()
        return torch.stack([y.mean(1), y.amax(1), y.amin(1), y[:, 0]], 1)

def workload():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return Workload(Wide(), (torch.randn(4, 4), torch.randint(4, (4,))))
"""


# What is compared.


@pytest.mark.parametrize(("target", "near", "sizes"), [
    (512, 61, [(16, 32), (32, 16), (64, 8), (128, 4)]),
    (500, 64, [(32, 15), (64, 7), (128, 3), (256, 1)]),
    (48, 40, [(16, 3), (32, 1)]),
    (8, 1, [(1, 8), (2, 4), (4, 2)]),
])  # fmt: skip
def test_powers_of_two_around_what_fits(target: int, near: int, sizes: list[tuple[int, int]]) -> None:
    found = hand_picked(target, near)
    assert [(each.micro_batch, each.steps) for each in found] == sizes
    assert all(each.micro_batch * each.steps <= target for each in found)


def test_the_tuned_plan_is_compared_where_there_is_one() -> None:
    plan = made_up_plan()
    names = [each.name for each in candidates_for(plan)]
    assert names[-2:] == [HALVING, PLAN]
    tuned = changed_plan(plan, micro_batch=40)
    assert [each.name for each in candidates_for(plan, tuned)] == [*names, TUNED]
    assert candidates_for(plan, tuned)[-1].plan is tuned


# What becomes of them.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("bench") / "wide.py"
    file.write_text(WIDE)
    return f"{file}:workload"


@pytest.fixture(scope="module")
def memory(wide: str) -> str:
    """What the process takes anyway, and room for some 50 samples."""
    asked: dict[str, Any] = {"workload": wide, "memory": None, "headroom": None, "malloc": "cached"}
    asked |= {"target_batch": TARGET, "max_micro_batch": 8, "verify": False}
    return f"{(Plan.from_json(call('plan', asked)['plan']).memory.baseline_bytes + 250 * MIB) // MIB}MiB"


@pytest.mark.slow
def test_each_trains_under_a_real_limit_and_says_what_it_really_trained(wide: str, memory: str) -> None:
    plan = made_up_plan(target_batch=TARGET)
    plan = changed_plan(plan, budget=replace(plan.memory.budget, bytes=parse_bytes(memory)))
    asked = {"workload": wide, "device": "cpu"}

    def train(candidate: Candidate) -> Trained:
        return comparison._train(candidate, plan, asked, 2, lambda message: None)

    small = train(Candidate("small", 16, 6))
    assert small.trains and small.effective_batch == 96 and small.ooms == 0 and len(small.window_seconds) == 2
    assert small.malloc == "default" and 0 < small.peak_bytes <= plan.memory.budget.bytes
    large = train(Candidate("large", 100, 1))
    assert not large.trains and large.ooms == 1 and "out of memory" in large.why and large.window_seconds == ()
    halved = train(Candidate("halved", 100, 1, halves=True))
    assert halved.ooms >= 1 and halved.micro_batch in (50, 25, 12, 6)
    assert halved.effective_batch == TARGET // halved.micro_batch * halved.micro_batch
    assert halved.search_seconds > small.search_seconds


@pytest.mark.slow
def test_the_command_compares_under_a_real_limit(wide: str, memory: str) -> None:
    out = run("--workload", wide, "--target-batch", str(TARGET), "--memory", memory, "--windows", "2", "--tune-trials",
              "0", "--json")  # fmt: skip
    shown = json.loads(out.stdout)
    rows = {row["name"]: row for row in shown["candidates"]}
    assert rows[PLAN]["effective_batch"] == TARGET and rows[PLAN]["ooms"] == 0 and rows[PLAN]["malloc"] == "cached"
    assert rows[PLAN]["micro_batch"] * rows[PLAN]["steps"] >= TARGET
    assert any(row["ooms"] and not row["effective_batch"] for row in shown["candidates"])
    assert shown["left_out"] == [f"{TUNED}: not requested (--tune-trials 0)"]


def run(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from autoaccum.cli import main; main()", "bench", *args]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == code, out.stdout + out.stderr
    return out


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--target-batch", "0"], "--target-batch is 0"),
        (["--device", "tpu"], "--device tpu"),
        (["--tuned", "none.json"], "cannot be read"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(args: list[str], shown: str) -> None:
    error = CliRunner().invoke(app, ["bench", *args]).exception
    assert isinstance(error, comparison.UsageError) and shown in str(error)


def test_a_tuned_plan_for_another_target_is_refused() -> None:
    plan = made_up_plan()
    with pytest.raises(comparison.UsageError, match="not for"):
        comparison._check_tuned(changed_plan(plan, target_batch=100), plan)
    comparison._check_tuned(plan, plan)


# How it is reported.


def made_up(**changes: Any) -> Comparison:
    plan = made_up_plan(is_virtual=False, target_batch=500, **changes)
    rows = (
        Trained("hand-picked: 32", 32, 15, 480, (2.0, 2.5, 2.1), 900 * MIB, 0, 0.0, "default"),
        Trained("hand-picked: 64", 64, 7, 0, (), 990 * MIB, 1, 3.0, "default", "ran out of memory (refused)"),
        Trained(HALVING, 31, 16, 496, (2.0, 2.01, 2.0), 930 * MIB, 4, 9.5, "default"),
        Trained(PLAN, 50, 10, 500, (1.9, 2.0, 1.95), 990 * MIB, 0, 20.0, "fixed"),
    )
    return Comparison("mine.py:workload", 500, plan, rows, ("the tuned plan: not asked for",), 3, {"torch": "2.14.1"})


def test_the_table_says_what_was_really_trained_and_what_is_unstable() -> None:
    text = results.as_text(made_up())
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "480, not 500" in lines["hand-picked: 32"] and "228.6" in lines["hand-picked: 32"]
    assert "(unstable)" in lines["hand-picked: 32"] and "(unstable)" not in lines[PLAN]
    assert "none: OOM" in lines["hand-picked: 64"] and "496, not 500" in lines[HALVING]
    assert "256.4" in lines[PLAN] and "20.0 s" in lines[PLAN]
    assert "trains exactly 500 samples" in text.splitlines()[0] and "1 ran out of memory" in text.splitlines()[0]
    assert "2 trained another batch than 500" in text.splitlines()[0] and "not asked for" in text
    failed = made_up()
    failed = replace(failed, rows=(replace(failed.rows[3], effective_batch=0, why="it broke", window_seconds=()),))
    assert "did not train: it broke" in results.as_text(failed)


def test_the_users_words_are_escaped_and_json_says_what_is_unstable() -> None:
    nasty = results.as_text(replace(made_up(), workload=NASTY, left_out=(NASTY,)))
    assert len(nasty.splitlines()) == len(results.as_text(made_up()).splitlines())
    assert json.loads(results.as_json(made_up()))["candidates"][0]["unstable"] is True


def test_without_times_none_are_reported() -> None:
    found = made_up()
    rows = tuple(replace(row, window_seconds=()) for row in found.rows)
    virtual = replace(found, rows=rows, plan=changed_plan(found.plan, is_virtual=True, device_name="Virtual GPU"))
    text = results.as_text(virtual)
    assert "computes nothing" in text and "real allocator on a virtual GPU" in text
