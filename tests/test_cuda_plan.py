"""Plans for CUDA, held against the real allocator on a virtual GPU: the peak to the byte, and the border both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from autoaccum.virtual import VirtualGpu, available, launch

REASON = available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
CASE = Path(__file__).parent / "cuda_plan_case.py"
GIB = 2**30
CASES = [
    ("mlp", "sgd", "fp32", 50_000),
    ("resnet18", "adamw foreach", "fp32", 2_000),
    ("vit", "adamw fused", "bf16", 5_000),
]


@cache
def outcome(model: str, optimizer: str, precision: str, target: int) -> dict[str, Any]:
    """Plans in one process; then tries the plan's window, and that of a step fewer, in fresh ones."""
    found = run("plan", model, optimizer, precision, str(target))
    split = found["split"]
    steps = len(split)
    found["fits"] = run("try", model, optimizer, precision, json.dumps(split), str(found["budget_bytes"]))
    fewer = [target // (steps - 1) + (i < target % (steps - 1)) for i in range(steps - 1)]
    found["fewer"] = run("try", model, optimizer, precision, json.dumps(fewer), str(found["budget_bytes"]))
    found["fewer_tight"] = run(
        "try", model, optimizer, precision, json.dumps(fewer), str(int(0.98 * found["budget_bytes"]))
    )
    return found


def run(*arguments: str) -> dict[str, Any]:
    process = launch(
        [sys.executable, str(CASE), *arguments],
        VirtualGpu(memory_bytes=2 * GIB),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode()[-3000:]
    found: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return found


each_case = pytest.mark.parametrize(("model", "optimizer", "precision", "target"), CASES)


@each_case
def test_the_verified_peak_was_predicted_to_the_byte(model: str, optimizer: str, precision: str, target: int) -> None:
    found = outcome(model, optimizer, precision, target)
    assert sum(found["split"]) == target
    assert found["measured"] == found["predicted"], "the process that planned, against a fresh one's prediction"
    assert found["out_of_memory"] == 0


@each_case
def test_the_window_trains_in_a_fresh_process_and_a_step_fewer_does_not(
    model: str, optimizer: str, precision: str, target: int
) -> None:
    found = outcome(model, optimizer, precision, target)
    assert found["fits"] == {"fits": True, "peak": found["predicted"], "retries": found["retries"]}
    assert not (found["fewer"]["fits"] and found["fewer_tight"]["fits"])


@each_case
def test_recording_is_cheap_and_leaves_no_trace(model: str, optimizer: str, precision: str, target: int) -> None:
    found = outcome(model, optimizer, precision, target)
    assert found["passes"] <= 10
    assert found["samples"] <= 3 * found["split"][0]
    assert found["differences"] == []


def test_a_gpu_that_is_not_here_gets_a_plan_and_a_model_too_large_an_answer(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(
        "import torch\nfrom torch import nn\nfrom autoaccum import Workload\n"
        "def workload():\n"
        "    model = nn.Sequential(*[nn.Linear(16384, 16384) for _ in range(8)])\n"
        "    return Workload(model, (torch.zeros(2, 16384), torch.zeros(2, dtype=torch.long)))\n"
    )
    command = [sys.executable, "-m", "autoaccum", "plan", "--target-batch", "512", "--workload", "large.py:workload"]

    def plan(gpu: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "--gpu", gpu], cwd=tmp_path, capture_output=True, text=True, timeout=240)

    roomy = plan("a100-80gb")  # 8 GiB of parameters, and four times that in training
    assert roomy.returncode == 0, roomy.stderr
    assert "real allocator on a virtual GPU" in roomy.stdout
    assert "exactness   unknown" in roomy.stdout
    tight = plan("t4")
    assert tight.returncode == 3, tight.stderr
    assert "Not even a micro-batch of 1 fits" in tight.stderr and "sharded over" in tight.stderr
