"""A loss that isn't finite is said once by `autoaccum run`, in its summary, and by its exit code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import plan_for
from plan_fields import changed_plan
from torch import nn
from typer.testing import CliRunner

from autoaccum import AutoaccumError, Plan, Workload
from autoaccum.cli import app
from autoaccum.runner.loop import train

WINDOWS = 4


def odd_in(*windows: int) -> Workload:
    """A workload of four windows of 8 samples whose loss is infinite or not a number in those."""
    inputs = torch.randn(8 * WINDOWS, 3)
    for number, window in enumerate(windows):
        inputs[8 * window] = (math.nan, math.inf)[number % 2]
    data = torch.utils.data.TensorDataset(inputs, torch.randint(2, (len(inputs),)))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    return Workload(nn.Linear(3, 2), (torch.randn(4, 3), torch.randint(2, (4,))), loader=loader, on_nonfinite="skip")


def run(work: Workload, folder: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    """What `run` prints and how it ends, with the child's task in this process."""
    plan = changed_plan(plan_for(work, 8, 4), workload=f"{__file__}:odd_in")
    plan.save(folder / "plan.json")

    def call(task: str, asked: dict[str, Any], *, on_message: Any, env: Any = None) -> dict[str, Any]:
        return train(work, Plan.from_json(asked["plan"]), progress=on_message)

    monkeypatch.setattr("autoaccum.processes.child.call", call)
    return CliRunner().invoke(app, ["run", str(folder / "plan.json"), *args])


@pytest.mark.parametrize("windows", [(3,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_a_last_loss_that_is_not_finite_is_a_failure(
    windows: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(odd_in(*windows), tmp_path, monkeypatch)
    assert isinstance(result.exception, AutoaccumError) and result.exception.exit_code == 1
    assert f"first in epoch 1, window {windows[0] + 1}." in str(result.exception)
    assert result.stderr.count("warning:") == 1
    assert f"warning: epoch 1, window {windows[0] + 1}: the loss is nan" in result.stderr
    assert f"not finite in {len(windows)} window" in result.stdout and "on_nonfinite" in str(result.exception)


def test_one_on_the_way_is_said_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(odd_in(1), tmp_path, monkeypatch)
    assert result.exit_code == 0 and ", not finite in 1 window, first in epoch 1, window 2, " in result.stdout
    assert run(odd_in(), tmp_path, monkeypatch).stdout.count("finite") == 0


def test_json_has_no_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    result = run(odd_in(2, 3), tmp_path, monkeypatch, "--json")
    found = json.loads(result.stdout.splitlines()[-1], parse_constant=refuse)
    assert (found["loss"], found["nonfinite_windows"], found["first_nonfinite"]) == (None, 2, {"epoch": 1, "window": 3})
    assert result.stderr.count("warning") == 1
