"""One loader of workloads for all commands, which hands `device` to whoever asks; and `run`'s limit on CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prepared_process import run_forked

from autoaccum import UsageError
from autoaccum.cli import tasks
from autoaccum.devices.virtual import VirtualGpu, available, environment
from autoaccum.processes.workload_source import load_workload, takes_device

REASON = available()
MIB = 2**20
ASKS = """
import torch
from autoaccum import Workload

def workload(device):
    print("made for", device, flush=True)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 4)).to(device)
    data = torch.utils.data.TensorDataset(torch.randn(768, 512), torch.randint(4, (768,)))
    return Workload(model, data[:4], loader=lambda: torch.utils.data.DataLoader(data, batch_size=16))

def by_default(device="cpu"):
    return workload(device)

def hungry(device):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(512, 4)
        def forward(self, x):
            return self.layer(x.repeat_interleave(1024, 0)).unflatten(0, (len(x), 1024)).mean(1)
    made = workload(device)
    import dataclasses
    return dataclasses.replace(made, model=Wide().to(device))

def asks_for_more(device, layers, *rest, width=3):
    return workload(device)

def asks_for_nothing():
    return workload("cpu")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asks")
    (folder / "asks.py").write_text(ASKS)
    return folder


def run(*args: str, cwd: Path, code: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autoaccum", *args]
    out = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env or dict(os.environ), timeout=240)
    assert out.returncode == code, out.stdout + out.stderr
    return out


def test_a_command_makes_the_workload_for_its_device(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks.check(say=lambda message: None, workload=f"{folder / 'asks.py'}:workload")["exact"]
    assert capsys.readouterr().out.count("made for cpu\n") == 1


@pytest.mark.slow
def test_so_do_plan_and_run(folder: Path) -> None:
    plan = ("plan", "--target-batch", "64", "--no-verify", "--workload", "asks.py:workload", "-o", "cpu.json")
    for args in (plan, ("run", "cpu.json", "--steps", "1")):
        assert run(*args, cwd=folder).stderr.count("made for cpu\n") == 1, args


@pytest.mark.slow
@pytest.mark.parametrize("name", ["workload", "by_default"])
def test_so_do_bench_and_tune(name: str, folder: Path) -> None:
    source = f"asks.py:{name}"
    run("bench", "--target-batch", "64", "--windows", "1", "--tune-trials", "2", "--workload", source, cwd=folder)
    few = ("--trials", "2", "--vary", "precision=fp32", "--vary", "optimizer=as it is")
    run("tune", "--target-batch", "64", *few, "--workload", source, cwd=folder)


def test_what_a_function_may_ask_for(folder: Path) -> None:
    file = folder / "asks.py"
    assert load_workload(f"{file}:by_default").name == f"{file}:by_default"
    assert load_workload(f"{file}:asks_for_nothing").sample is not None
    with pytest.raises(UsageError, match="asks for layers, and is called without"):
        load_workload(f"{file}:asks_for_more")
    assert takes_device(lambda device=None, **rest: None, "it") and not takes_device(lambda x=1: None, "it")

    def positional(device: Any, /) -> None: ...

    with pytest.raises(UsageError, match="asks for device"):
        takes_device(positional, "it")


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if REASON is not None:
        pytest.skip(REASON)
    return dict(environment(VirtualGpu(memory_bytes=4 * 2**30)))


@pytest.mark.slow
def test_run_on_cuda_holds_the_plans_limit_and_recovers_beyond_it(folder: Path, gpu: dict[str, str]) -> None:
    plan = ["plan", "--device", "cuda", "--target-batch", "256", "--memory", "1GiB", "--no-verify", "--timing", "0"]
    made = run(*plan, "--workload", "asks.py:hungry", "-o", "cuda.json", cwd=folder, env=gpu)
    assert "made for cuda:0" in made.stderr
    planned = json.loads((folder / "cuda.json").read_text())
    assert planned["schedule"]["accumulation_steps"] > 1
    fits = json.loads(run("run", "cuda.json", "--json", cwd=folder, env=gpu).stdout)
    assert fits["retries"] == 0 and fits["micro_batch"] == planned["schedule"]["micro_batch"]
    assert 0 < fits["held_bytes"] <= planned["memory"]["budget"]["bytes"]
    planned["schedule"] |= {"split": [256], "micro_batch": 256, "accumulation_steps": 1}  # beyond the limit
    (folder / "beyond.json").write_text(json.dumps(planned))
    beyond = run("run", "beyond.json", "--json", cwd=folder, env=gpu)
    found = json.loads(beyond.stdout)
    assert found["steps"] == 3 and found["samples"] == 768 and found["micro_batch"] < 256
    assert found["held_bytes"] <= planned["memory"]["budget"]["bytes"]
    assert "out of memory" in beyond.stderr.lower()


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_a_lower_limit_of_the_users_stays_and_the_bytes_are_exact() -> None:
    source = (
        "import torch\nfrom autoaccum.devices.registry import get_device\n"
        "limit = get_device(torch.device('cuda')).limit_memory\n"
        "whole = torch.cuda.get_device_properties(0).total_memory\n"
        "def allowed(): return round(torch.cuda.get_per_process_memory_fraction() * whole)\n"
        "limit(2 * whole)\nprint(allowed() == whole)\n"
        "limit(123_456_789)\nprint(allowed())\n"
        "limit(whole // 2)\nprint(allowed())\n"
    )
    out = run_forked(source, gpu=VirtualGpu(memory_bytes=4 * 2**30))
    assert out.stdout.split() == ["True", "123456789", "123456789"]


SPAWNED = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from autoaccum import Workload

def make():
    rows = TensorDataset(torch.zeros(64, 8), torch.zeros(64, dtype=torch.long))
    loader = DataLoader(rows, batch_size=8, num_workers=1, multiprocessing_context="{context}")
    batch = torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)
    return Workload(nn.Linear(8, 4), batch, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loader=loader)
"""


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])  # the latter is Python 3.14's default
def test_workers_that_are_not_forked_end_with_the_run_and_leave_nothing(tmp_path: Path, context: str) -> None:
    (tmp_path / "mine.py").write_text(SPAWNED.format(context=context))
    command = [sys.executable, "-m", "autoaccum"]
    for arguments in (["plan", "--workload", "mine.py:make", "--target-batch", "16"], ["run", "plan.json"]):
        more = ["-o", "plan.json"] if arguments[0] == "plan" else ["--steps", "2"]  # windows are left in the loader
        done = subprocess.run([*command, *arguments, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "2 optimizer steps" in done.stdout and "resource_tracker" not in done.stderr
