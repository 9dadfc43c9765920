"""`autoaccum plan --gpu NAME`, by the real allocator on a virtual GPU; and a GPU that isn't what it was any more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_process import run_forked

from autoaccum import Plan
from autoaccum.devices.virtual import VirtualGpu, available, launch

REASON = available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def test_a_gpu_that_is_not_here_gets_a_plan_and_a_model_too_large_an_answer(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(
        "import torch\nfrom torch import nn\nfrom autoaccum import Workload\n"
        "def workload():\n"
        "    model = nn.Sequential(*[nn.Linear(16384, 16384) for _ in range(8)])\n"
        "    return Workload(model, (torch.zeros(2, 16384), torch.zeros(2, dtype=torch.long)))\n"
    )
    command = [sys.executable, "-m", "autoaccum", "plan", "--target-batch", "512", "--workload", "large.py:workload"]

    def plan(gpu: str) -> subprocess.CompletedProcess[str]:
        named = ["--gpu", gpu, "-o", f"{gpu}.json"]
        return subprocess.run([*command, *named], cwd=tmp_path, capture_output=True, text=True, timeout=240)

    roomy = plan("a100-80gb")  # 8 GiB of parameters, and four times that in training
    assert roomy.returncode == 0, roomy.stderr
    assert "real allocator on a virtual GPU" in roomy.stdout
    assert Plan.load(tmp_path / "a100-80gb.json").provenance.planning_seconds > 0.1
    assert "exactness   unknown" in roomy.stdout
    tight = plan("t4")
    assert tight.returncode == 3, tight.stderr
    assert "Not even a micro-batch of 1 fits" in tight.stderr and "sharding over" in tight.stderr


FULLER = """
import logging, sys
import torch
from torch import nn
from autoaccum import Runner, Workload, fit_plan
from autoaccum.devices.virtual import control

logging.basicConfig(stream=sys.stdout)
sample = torch.zeros(4, 512), torch.zeros(4, dtype=torch.long)
work = Workload(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 8)).cuda(), sample)
plan = fit_plan(work, target_batch=64)
Runner(work, plan)
print("then", flush=True)
control.set_other(0, 2**30)
Runner(work, plan)
"""


@pytest.mark.slow
def test_memory_that_is_gone_since_the_plan_is_reported_before_training() -> None:
    process = launch([sys.executable, "-c", FULLER], VirtualGpu(memory_bytes=2 * 2**30), stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=240)
    before, _, after = out.decode().partition("then")
    assert process.returncode == 0
    assert "is available now" not in before
    assert "The plan is for 1.50 GiB, and only 512.0 MiB is available now" in after


MADE_AND_MOVED = """
import json, sys, torch
from pathlib import Path
from autoaccum.devices.registry import get_device
from autoaccum.planning.new_process import build_on
Path("half.py").write_text('''import torch
from torch import nn
from autoaccum import Workload
def workload():
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 1024)).to(torch.bfloat16)
    return Workload(model, (torch.zeros(2, 256), torch.zeros(2, dtype=torch.long)))
def there(device):
    made = workload()
    made.model.to(device)
    return made
''')
device = get_device(torch.device("cuda", 0))
sizes = {}
for name in ("workload", "there"):
    work, build = build_on(f"half.py:{name}", device, virtual=True)
    sizes[name] = [event.bytes for event in build]
print(json.dumps([sizes, [p.nbytes for p in work.model.parameters()]]))
"""


def test_a_model_that_training_makes_on_the_host_lies_there_as_moving_it_leaves_it(tmp_path: Path) -> None:
    done = run_forked(MADE_AND_MOVED, gpu=VirtualGpu(memory_bytes=2 * 2**30), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes, parameters = json.loads(done.stdout.splitlines()[-1])
    assert sizes["workload"] == parameters  # not as fp32, which is made on the virtual GPU first
    assert [size for size in sizes["there"] if size > 0] == parameters
