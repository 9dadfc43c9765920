"""`autoaccum tune` and `autoaccum.tune`, whole: child processes, real recordings, real times."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoaccum import DoesNotFit, Plan, Runner, SearchSpace, UsageError, configure, tune
from autoaccum.devices.virtual import available

MIB = 1 << 20
MINE = """
import torch
from torch import nn
from autoaccum import Workload

print("a workload may print what it likes")

class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.two(torch.relu(self.one(x))))

def workload():
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(256, 64), torch.randint(4, (256,)))
    model = nn.Sequential(*[Block() for _ in range(4)], nn.Linear(64, 4))
    return Workload(model, data[:4], loader=lambda: torch.utils.data.DataLoader(data, batch_size=16, shuffle=True))

def hungry():
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(6)], nn.Linear(64, 4))
    return Workload(model, (torch.randn(4, 256, 64), torch.randint(4, (4, 256))))

def deeper(times):
    import dataclasses
    return dataclasses.replace(workload(), loss=lambda model, batch: nn.functional.cross_entropy(
        model(batch[0]) * times, batch[1]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    (folder / "mine.py").write_text(MINE)
    return folder


def run(*args: str, cwd: Path, code: int = 0, first: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{first}from autoaccum.cli import main; main()", *args]
    out = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert out.returncode == code, out.stdout + out.stderr
    return out


@pytest.mark.slow
def test_tune_finds_a_plan_that_run_trains_with(folder: Path) -> None:
    """And JSON is alone on stdout, and a line for each trial on stderr."""
    few = [
        "--vary",
        "precision=fp32",
        "--vary",
        "optimizer=fused",
        "--vary",
        "micro_batch=16",
        "--vary",
        "checkpointing=1",
    ]
    out = run(
        "tune",
        "--target-batch",
        "64",
        "--workload",
        "mine.py:workload",
        *few,
        "--json",
        "--study",
        "p.db",
        "-o",
        "p.json",
        "--study",
        "p.db",
        cwd=folder,
    )
    found = json.loads(out.stdout)
    assert found["ranking"] == "seconds" and found["space"] == 1 and len(found["trials"]) == 1
    trial = found["trials"][0]
    assert trial["state"] == "measured" and trial["step_seconds"] > 0 and trial["windows"] >= 3
    assert set(trial["numerics"]) == set() and trial["peak_bytes"] > 0  # fused is the plain choice of this space
    assert "trial 0 (1 of 40)" in out.stderr and "a workload may print" in out.stderr
    plan = Plan.load(folder / "p.json")
    assert plan.verified and plan.split == (16,) * 4 and plan.request.workload == "mine.py:workload"
    assert (
        plan.schedule.configuration["checkpointing"] == 1 and plan.provenance.fingerprint["optimizer"] == "AdamW fused"
    )
    assert (
        "checkpointing every block" in plan.provenance.fingerprint["configuration"]
        and "configuration" in plan.provenance.reasons
    )
    result = json.loads(run("run", "p.json", "--steps", "2", "--json", cwd=folder).stdout)
    assert result["steps"] == 2 and result["accumulation_steps"] == 4
    assert "checkpointing every block" in run("explain", "p.json", cwd=folder).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--target-batch is missing"),
        (["--target-batch", "0"], "target_batch is 0"),
        (["--target-batch", "8", "--vary", "precision="], "search space is empty"),
        (["--target-batch", "8", "--vary", "precision=fp8"], "Use one of: fp32, bf16, fp16"),
        (["--target-batch", "8", "--trials", "0"], "trials is 0"),
        (["--target-batch", "8", "--timeout", "0"], "timeout is 0.0"),
        (["--target-batch", "8", "--sampler", "best"], "tpe, random, grid"),
        (["--target-batch", "8", "--device", "tpu"], "device 'tpu'"),
        (["--target-batch", "8", "--study", "none/x.db"], "no folder none"),
        (["--target-batch", "8", "--study", "9" * 400], "can't be written"),
        (["--target-batch", "8", "-o", "mine.py"], "exists already"),
        (["--target-batch", "8", "--workload", "mine.py:none"], "has no function 'none'"),
    ],
)
def test_mistakes_get_a_sentence_before_anything_is_loaded(folder: Path, args: list[str], message: str) -> None:
    out = run("tune", *args, cwd=folder, code=2, first="import sys; sys.modules['torch'] = None; ")
    assert message in out.stderr and "Traceback" not in out.stderr and out.stdout == ""


def test_a_function_that_no_other_process_finds_is_refused() -> None:
    with pytest.raises(UsageError, match="can't be given to another process"):
        tune(lambda: None, target_batch=8)  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match=r"neither FILE\.py:FUNCTION nor a function"):
        tune(3, target_batch=8)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_function_with_an_argument_and_loader_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    import mine  # type: ignore[import-not-found]

    before = torch.get_rng_state()
    space = SearchSpace(
        precision=("fp32",), checkpointing=(0,), optimizer=("loop",), micro_batch=(16, 64), loader_workers=(0, 1),
    )  # fmt: skip
    found = tune(functools.partial(mine.deeper, 2), target_batch=64, space=space, sampler="grid")
    assert torch.equal(before, torch.get_rng_state())
    assert len(found.trials) == found.space == 4 and {trial.state for trial in found.trials} == {"measured"}
    assert found.best.turns and found.trials[found.plain or 0].turns == found.best.turns  # loader workers and all
    assert found.plan.request.workload is None
    work = configure(mine.deeper(2), found.plan)
    assert Runner(work, found.plan).step(tuple(torch.cat([leaf] * 16) for leaf in work.sample)).samples == 64


@pytest.mark.slow
def test_what_can_not_fit_is_pruned_unrun_and_where_nothing_fits_it_is_said(folder: Path) -> None:
    source = f"{folder / 'mine.py'}:hungry"
    space = SearchSpace(("fp32",), (0, 1), optimizer=("loop",), micro_batch=("largest", 8, 64))
    base = tune(
        source, target_batch=64, space=replace(space, micro_batch=(8,), checkpointing=(0,))
    ).plan.memory.baseline_bytes
    found = tune(source, target_batch=64, space=space, sampler="grid", memory=base + 150 * MIB)
    states = {(t.configuration["checkpointing"], t.configuration["micro_batch"]): t for t in found.trials}
    pruned = states[0, 64]
    assert pruned.state == "pruned" and pruned.step_seconds is None and "micro-batches of 64 need" in pruned.why
    assert states[1, 64].micro_batch == 64 and states[1, 64].step_seconds  # checkpointing makes room for it
    assert (states[0, "largest"].micro_batch or 99) < 64
    assert found.plan.measured_peak_bytes is not None and found.plan.measured_peak_bytes <= base + 150 * MIB
    with pytest.raises(DoesNotFit, match="None of"):
        tune(source, target_batch=64, space=space, memory=base - 100 * MIB)


@pytest.mark.slow
def test_a_killed_tuning_goes_on_and_an_interrupted_one_says_how(folder: Path) -> None:
    args = ["tune", "--target-batch", "64", "--workload", "mine.py:workload", "--study", "s.db", "--sampler", "grid"]
    args += ["--vary", "precision=fp32", "--vary", "checkpointing=0", "--vary", "micro_batch=8,16,32,64"]
    args += ["--vary", "optimizer=loop"]
    command = [sys.executable, "-c", "from autoaccum.cli import main; main()", *args]
    for number, message in ((signal.SIGKILL, ""), (signal.SIGINT, "the same command continues with them")):
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("trial "):
                break
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 130) and message in rest
        time.sleep(1)
    found = json.loads(run(*args, "--json", cwd=folder).stdout)
    measured = [trial["micro_batch"] for trial in found["trials"] if trial["state"] == "measured"]
    assert sorted(measured) == [8, 16, 32, 64]
    out = run(*[a if a != "64" else "32" for a in args], cwd=folder, code=2)
    assert "was made for something else" in out.stderr and "target_batch: 64 there, 32 here" in out.stderr


@pytest.mark.slow
def test_a_compiled_model_is_timed_and_planned(folder: Path) -> None:
    space = SearchSpace(("fp32",), (0,), optimizer=("loop",), micro_batch=(16,), compile=(True,))
    found = tune(f"{folder / 'mine.py'}:workload", target_batch=64, space=space)
    assert found.best.configuration["compile"] and found.plan.verified and found.plan.split == (16,) * 4


@pytest.mark.slow
@pytest.mark.skipif(available() is not None, reason=available() or "")
def test_on_a_virtual_gpu_memory_alone_is_ranked_and_said(folder: Path) -> None:
    args = ["tune", "--target-batch", "64", "--workload", "mine.py:hungry", "--gpu", "t4", "--memory", "1100MiB"]
    args += ["--vary", "optimizer=foreach", "--vary", "precision=fp32", "--vary", "checkpointing=0,1"]
    out = run(*args, "--sampler", "grid", "-o", "gpu.json", cwd=folder)
    assert "a virtual GPU computes nothing, so there is no time" in out.stdout
    plan: Any = Plan.load(folder / "gpu.json")
    assert plan.device.is_virtual and "expandable_segments" in plan.schedule.configuration
    assert (
        "the test that checkpointing keeps the gradient" in out.stdout
        or not plan.schedule.configuration["checkpointing"]
    )
