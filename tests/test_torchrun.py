"""The examples on two ranks, one under torchrun; the command line on two ranks, then on three; Accelerate's model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked_ranks import run_scripts

ROOT = Path(__file__).parent.parent

WORKLOAD = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from autoaccum import Workload

def work():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(300, 64), torch.randint(5, (300,)))
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5))
    return Workload(model, data[:8], optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
                    loader=DataLoader(data, batch_size=10, shuffle=True))
"""

ACCELERATE = """
import torch
from accelerate import Accelerator
from torch import nn
from autoaccum import Runner, Workload, fit_plan

accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)
model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5)).double()
twin = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
twin.load_state_dict(model.module.state_dict())
g = torch.Generator().manual_seed(1)
x, y = torch.randn(64, 16, generator=g, dtype=torch.float64), torch.randint(5, (64,), generator=g)
work = Workload(model, (x[:8], y[:8]), optimizer=optimizer)
limits = {"budget": "4GiB", "verify": False, "check": False}
plan = fit_plan(work, target_batch=64, shares=(48, 16), max_micro_batch=20, **limits)
assert plan.parallel == "ddp" and plan.shares == (48, 16), plan
result, = Runner(work, plan).epoch([(x, y)])
nn.functional.cross_entropy(twin(x), y).backward()
with torch.no_grad():
    for p in twin.parameters():
        p -= 0.1 * p.grad
worst = max(float((a - b).norm() / b.norm()) for a, b in zip(model.module.parameters(), twin.parameters()))
print(f"rank {accelerator.process_index} {result.samples} samples in {result.split}, off by {worst:.1e}", flush=True)
assert worst < 1e-12
"""


def torchrun(ranks: int, *command: str, cwd: Path | None = None) -> str:
    """Run a command under torchrun; return what its ranks printed."""
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=300, env=env, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_trains_uneven_shares(tmp_path: Path) -> None:
    out = torchrun(2, str(ROOT / "examples" / "ddp" / "train.py"), cwd=tmp_path)
    steps = re.findall(r"step (\d): (\d+) samples, loss \d\.\d{3}, (\d) here", out)
    assert steps == [("1", "512", "4"), ("2", "512", "4"), ("3", "176", "2")]
    assert "shares (384, 128) micro-batches [4, 3]" in out


def test_the_page_shows_the_examples() -> None:
    page = (ROOT / "docs" / "ranks.md").read_text()
    for name in ("ddp", "ray"):
        assert f"```python\n{(ROOT / 'examples' / name / 'train.py').read_text()}```" in page, name


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the other examples print; torchrun itself is the first one's."""
    names = [name for name in ("accelerate", "fsdp") if name != "accelerate" or importlib.util.find_spec(name)]
    imports = ["accelerate"] * ("accelerate" in names) + ["torch.distributed.fsdp", "autoaccum.runner.runner"]
    scripts = [[str(ROOT / "examples" / name / "train.py")] for name in names]
    return dict(zip(names, run_scripts(2, scripts, tmp_path_factory.mktemp("ranks"), imports), strict=True))


def test_the_example_of_accelerate_trains_uneven_shares(printed: dict[str, str]) -> None:
    pytest.importorskip("accelerate")
    out = printed["accelerate"]
    assert re.findall(r"step (\d): (\d+) samples, loss \d\.\d{3}", out) == [("1", "512"), ("2", "512"), ("3", "176")]
    assert "shares (384, 128) micro-batches [4, 2]" in out


def test_the_example_of_fsdp_trains_equal_shares(printed: dict[str, str]) -> None:
    steps = re.findall(r"step (\d): (\d+) samples, loss \d\.\d{3}, (\(.*\)) here", printed["fsdp"])
    assert steps == [("1", "512", "(86, 85, 85)"), ("2", "512", "(86, 85, 85)"), ("3", "176", "(44, 44)")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_of_ray_trains_on_two_workers(tmp_path: Path) -> None:
    pytest.importorskip("ray.train.torch")
    # Ray's workers have a niceness of 15 else, and hardly run beside other tests.
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_DEDUP_LOGS": "0",
        "HOME": str(tmp_path),
    }
    env = {**os.environ, **settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "ray" / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=env, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for rank, split in enumerate(("(96, 96, 96, 96)", "(64, 64)")):
        assert f"worker {rank}: shares (384, 128), {split} here" in said, said
        assert re.search(
            r"'step': 3, 'samples': 176, 'loss': [\d.]+}, validation=False\) from rank " + str(rank), said
        ), said


@pytest.mark.slow
def test_the_command_line_plans_trains_and_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(WORKLOAD)
    source = ("--workload", "train.py:work")
    plan = ("-m", "autoaccum", "plan", *source, "--target-batch", "100", "-o", "plan.json", "--json")
    made = json.loads(torchrun(2, *plan, cwd=tmp_path))
    assert json.loads((tmp_path / "plan.json").read_text()) == made
    assert [entry["split"] for entry in made["distribution"]["ranks"]] == [[50], [50]]
    out = torchrun(2, "-m", "autoaccum", "check", *source, cwd=tmp_path)
    assert out.count("exact") == 1
    run = ("-m", "autoaccum", "run", "plan.json", "--checkpoint", "training.pt", "--json")
    half = json.loads(torchrun(2, *run, "--steps", "2", cwd=tmp_path))
    rest = json.loads(torchrun(3, *run, cwd=tmp_path))
    assert (half["steps"], half["samples"], rest["steps"], rest["samples"]) == (2, 200, 3, 300)


@pytest.mark.slow
def test_accelerates_model_and_optimizer_train_uneven_shares(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "script.py").write_text(ACCELERATE)
    out = torchrun(2, "script.py", cwd=tmp_path)
    assert "rank 0 64 samples in (16, 16, 16)" in out and "rank 1 64 samples in (16,)" in out
