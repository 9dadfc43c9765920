"""Numbers that nobody can mean are refused at once, on the command line and in Python."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from autoaccum import UsageError, Workload, fit_plan, tune
from autoaccum.cli import app
from autoaccum.units import MAX_COUNT, MAX_SAMPLES, check_count, check_memory, check_samples, check_seconds

DIGITS = "7" * 400
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from autoaccum.cli import main; main()"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "--target-batch", "1000000000000"], "at most 9,999,999"),
        (["plan", "--target-batch", DIGITS], "a number of about 400 digits: a number of samples, at most 9,999,999"),
        (["plan", "--target-batch", "-5"], "--target-batch is -5: a number of samples, at least 1"),
        (["plan", "--max-micro-batch", "0"], "--max-micro-batch is 0"),
        (["plan", "--timing", "nan"], "--timing is nan"),
        (["plan", "--timing", "-1"], "--timing is -1.0"),
        (["plan", "--headroom", "120%"], "leaves nothing"),
        (["plan", "--headroom", "some"], "'some' is not headroom"),
        (["plan", "--memory", "2GiB", "--headroom", "2GiB"], "Headroom of 2GiB leaves nothing of 2GiB"),
        (["run", "none.json", "--epochs", "-1"], "--epochs is -1: a whole number, at least 1"),
        (["run", "none.json", "--steps", "-3"], "--steps is -3"),
        (["run", "none.json", "--steps", DIGITS], "at most 1,000,000,000"),
        (["run", "none.json", "--checkpoint-seconds", "-1"], "--checkpoint-seconds is -1.0"),
        (["run", "none.json", "--checkpoint-seconds", "inf"], "--checkpoint-seconds is inf"),
        (["bench", "--target-batch", "1000000000000"], "at most 9,999,999"),
        (["bench", "--windows", "0"], "--windows is 0"),
        (["bench", "--tune-trials", "-1"], "--tune-trials is -1: a whole number, at least 0"),
        (["tune", "--target-batch", DIGITS], "target_batch is a number of about 400 digits"),
        (["tune", "--target-batch", "64", "--trials", "-1"], "trials is -1"),
        (["tune", "--target-batch", "64", "--timeout", "nan"], "timeout is nan"),
        (["tune", "--target-batch", "64", "--seed", "-1"], "seed is -1"),
        (["tune", "--target-batch", "64", "--vary", "micro_batch=0"], "micro_batch"),
        (["tune", "--target-batch", "64", "--memory", "0"], "more than 0 bytes"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_number_beyond_its_bounds_is_refused_before_anything_is_started(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: Any, **how: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("autoaccum.processes.child.call", started)
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, UsageError) and message in str(result.exception), result.output


def test_it_takes_no_torch_to_refuse_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "plan", "--target-batch", "1000000000000"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 2 and "at most 9,999,999" in out.stderr and "Traceback" not in out.stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target_batch": 10**12}, "target_batch is 1000000000000: a number of samples, at most"),
        ({"target_batch": int(DIGITS)}, "a number of about 400 digits"),
        ({"target_batch": 0.5}, "target_batch is 0.5"),
        ({"target_batch": True}, "target_batch is True"),
        ({"target_batch": 8, "max_micro_batch": 0}, "max_micro_batch is 0"),
        ({"target_batch": 8, "min_micro_batch": 10**9}, "min_micro_batch is 1000000000"),
        ({"target_batch": 8, "timing_seconds": math.nan}, "timing_seconds is nan"),
        ({"target_batch": 8, "timing_seconds": -1}, "timing_seconds is -1"),
        ({"target_batch": 8, "headroom": "100%"}, "leaves nothing"),
    ],
    ids=str,
)
def test_in_python_too(asked: dict[str, Any], message: str) -> None:
    work = Workload(torch.nn.Linear(4, 2), (torch.randn(4, 4), torch.randint(2, (4,))))
    with pytest.raises(UsageError, match=message):
        fit_plan(work, **asked)


def test_tune_is_asked_within_the_same_bounds() -> None:
    with pytest.raises(UsageError, match="target_batch is 1000000000000"):
        tune("digits", target_batch=10**12)


def test_bounds_are_inclusive() -> None:
    check_samples("target_batch", MAX_SAMPLES)
    check_samples("target_batch", None)
    check_count("steps", MAX_COUNT)
    check_seconds("timing_seconds", 0)
    check_memory("2GiB", "10%")
    for refused in (MAX_SAMPLES + 1, "8", 8.0, math.inf):
        with pytest.raises(UsageError):
            check_samples("target_batch", refused)
    with pytest.raises(UsageError):
        check_seconds("timeout", 0, zero=False)
