"""The command line, as a user's shell sees it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import split_otherwise
from typer.testing import CliRunner

from autoaccum import Plan
from autoaccum.cli import app
from autoaccum.errors import PlanMismatch, UsageError
from autoaccum.planning.new_process import plan_on_gpu
from autoaccum.planning.request import PlanRequest
from autoaccum.processes.workload_source import load_workload
from autoaccum.runner.loop import train

TINY = """
import os, time
import torch
from autoaccum import Workload

print("a workload may print what it likes")

def workload():
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(200, 64), torch.randint(4, (200,)))
    layers = torch.nn.Linear(64, 128), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(128, 4)
    model = torch.nn.Sequential(*layers)
    loader = lambda: torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
    return Workload(model, data[:4], loader=loader, loss=loss)

def loss(model, batch):
    if "SLOW" in os.environ:
        print("a micro-batch", flush=True)
        time.sleep(0.02)
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

def broken():
    raise ValueError("a mistake of the user's")

def other():
    return 3
"""


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from autoaccum.cli import main; main()"


def run(*args: str, cwd: Path, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from autoaccum.cli import main; main()", *args]
    out = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    assert code is None or out.returncode == code, out.stdout + out.stderr
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a workload and a plan of it: 64 in four micro-batches."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.py").write_text(TINY)
    plan = ["plan", "--target-batch", "64", "--max-micro-batch", "16", "--workload", "tiny.py:workload"]
    first = run(*plan, "-o", "plan.json", cwd=folder)
    assert "4 accumulation steps: 4 of 16 samples = 64" in first.stdout
    assert "a workload may print" in first.stderr and "a workload may print" not in first.stdout
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """What two whole epochs of the plan print as JSON; whole.pt is their checkpoint."""
    out = run("run", "plan.json", "--epochs", "2", "--checkpoint", "whole.pt", "--json", cwd=folder)
    assert "\r" not in out.stderr  # no progress bar where stderr is no terminal
    result: dict[str, Any] = json.loads(out.stdout)
    return result


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """A checkpoint after three steps."""
    out = run("run", "plan.json", "--epochs", "2", "--steps", "3", "--checkpoint", "three.pt", cwd=folder)
    *_, ended, kept = out.stdout.splitlines()
    assert ended.startswith("done: 3 optimizer steps") and kept == "checkpoint: three.pt"
    return folder / "three.pt"


def trained_here(folder: Path, plan: str, **how: Any) -> dict[str, Any]:
    """What `autoaccum run` does in its child process once the workload is loaded."""
    workload = load_workload(f"{folder / 'tiny.py'}:workload")
    return train(workload, Plan.load(folder / plan), progress=lambda message: None, **how)


def test_json_is_alone_on_stdout_and_with_the_default_malloc_a_quarter_is_added(folder: Path) -> None:
    out = run(
        "plan", "--target-batch", "64", "--workload", "tiny.py:workload", "--malloc", "default", "--json", cwd=folder
    )
    plan = Plan.from_json(out.stdout)
    assert plan.split == (64,) and plan.request.workload == "tiny.py:workload"
    assert json.loads(out.stdout)["schema_version"] == plan.schema_version
    assert (
        plan.device.mmap_threshold_bytes is None
        and plan.memory.malloc_overhead == 0.25
        and "25% of training" in plan.explain()
    )
    taken = max(plan.memory.phases.values()) + plan.memory.history_bytes - plan.memory.baseline_bytes
    assert plan.predicted_peak_bytes == plan.memory.baseline_bytes + taken + int(0.25 * taken)


def test_a_plan_file_is_not_overwritten_unless_forced(folder: Path) -> None:
    out = run("plan", "--target-batch", "8", "-o", "plan.json", cwd=folder, code=2)
    assert "plan.json exists already" in out.stderr and "--force" in out.stderr


def test_explain_needs_no_model_and_no_torch(folder: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "explain", str(folder / "plan.json")],
        capture_output=True, text=True, cwd=folder.parent,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    for message in ("later micro-batch", "optimizer step", "3 would need", "fewer steps", "MemAvailable", "Sequential"):
        assert message in out.stdout


def test_does_not_fit_is_exit_code_3_with_the_missing_bytes(folder: Path) -> None:
    out = run(
        "plan", "--target-batch", "64", "--memory", "220MiB", "--workload", "tiny.py:workload", cwd=folder, code=3
    )
    assert out.stdout == "" and out.stderr.count("\n") <= 5
    assert "bytes) are missing" in out.stderr and "What would help: a budget of" in out.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "--target-batch", "0"], "--target-batch is 0"),
        (["plan", "--target-batch", "many"], "neither samples nor tokens"),
        (["plan", "--memory", "lots"], "'lots' is not"),
        (["plan", "--workload", "chatgpt"], "Did you mean --workload chargpt"),
        (["plan", "--workload", "none.py:workload"], "no file 'none.py'"),
        (["plan", "--device", "tpu"], "--device cpu"),
        (["run", "none.json"], "cannot be read"),
        (["run", "half.json"], "half.json"),
    ],
)
def test_mistakes_are_refused_before_anything_is_started(
    folder: Path, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: Any, **how: Any) -> None:
        raise AssertionError("a process was started")

    text = (folder / "plan.json").read_text()
    (folder / "half.json").write_text(text[: len(text) // 2])
    monkeypatch.chdir(folder)
    monkeypatch.setattr("autoaccum.processes.child.call", started)
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, UsageError) and result.stdout == ""
    assert message in f"{result.exception} {result.exception.hint}" and result.exception.exit_code == 2


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["plan", "--workload", "tiny.py:broken"], 1, "ValueError: a mistake of the user's"),
        (["explain", "none.json"], 2, "cannot be read"),
        (["plna"], 2, "plna"),
    ],
)
def test_mistakes_get_a_sentence_and_no_traceback(folder: Path, args: list[str], code: int, message: str) -> None:
    out = run(*args, cwd=folder, code=code)
    assert message in out.stderr and "Traceback" not in out.stderr and out.stdout == ""


@pytest.mark.parametrize(
    ("function", "message"), [("worklod", "Did you mean .*tiny.py:workload"), ("other", "returned int")]
)
def test_a_function_that_makes_no_workload_is_a_mistake_of_usage(folder: Path, function: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_workload(f"{folder / 'tiny.py'}:{function}")
    assert caught.value.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_to_plan_for_one_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        plan_on_gpu("chargpt", PlanRequest(8), gpu=None, progress=lambda text: None)
    assert "--gpu a100-40gb" in caught.value.hint


def test_traceback_shows_the_users_own_line(folder: Path) -> None:
    out = run("plan", "--workload", "tiny.py:broken", "--traceback", cwd=folder, code=1)
    assert "Traceback" in out.stderr and "tiny.py" in out.stderr and "raise ValueError" in out.stderr


def test_run_trains_every_sample_and_says_so(trained: dict[str, Any]) -> None:
    assert trained["steps"] == 8 and trained["samples"] == 400 and trained["accumulation_steps"] == 1
    assert trained["checkpoint"] == "whole.pt"


def test_run_without_a_terminal_prints_a_line_per_epoch_and_says_what_was_kept(folder: Path) -> None:
    out = run("run", "plan.json", "--epochs", "2", cwd=folder).stdout.splitlines()
    assert [line.split(":")[0] for line in out[:2]] == ["epoch 1, window 4 of 4", "epoch 2, window 4 of 4"]
    assert out[2].startswith("done: 8 optimizer steps, 400 samples") and out[3].startswith("no checkpoint was written")


def test_speed_is_of_all_windows_after_the_first_whatever_their_sizes() -> None:
    from autoaccum.cli.run import Speed

    moments = iter([10.0, 12.0, 13.0])
    speed = Speed(lambda: next(moments))
    speed.add(1000)
    assert speed.text == "- samples/s"
    for samples in (64, 8):
        speed.add(samples)
    assert speed.text == "24 samples/s"


def test_run_refuses_a_plan_for_another_model(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["provenance"]["fingerprint"]["model"] = "Another 0123"
    (folder / "other.json").write_text(json.dumps(plan))
    with pytest.raises(PlanMismatch, match=r"(?s)Another 0123.*Plan again") as caught:
        trained_here(folder, "other.json")
    assert caught.value.exit_code == 1


def parameters(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = torch.load(path, weights_only=False)
    return state["runner"]["model"]


def test_a_stopped_and_resumed_run_ends_bitwise_like_one_that_was_not(
    folder: Path, trained: dict[str, Any], stopped: Path
) -> None:
    shutil.copy(stopped, folder / "parts.pt")
    out = run("run", "plan.json", "--epochs", "2", "--checkpoint", "parts.pt", "--json", cwd=folder)
    assert json.loads(out.stdout)["steps"] == 8
    whole, parts = parameters(folder / "whole.pt"), parameters(folder / "parts.pt")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        (signal.SIGINT, True),
        (signal.SIGTERM, False),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_stops_at_a_windows_end_with_a_checkpoint(
    folder: Path, number: signal.Signals, whole_group: bool
) -> None:
    """As a terminal sends it, to the whole group; as `kill` and a job's manager do, to the one process."""
    path = folder / f"stopped-{number.name}-{whole_group}.pt"
    command = [sys.executable, "-c", "from autoaccum.cli import main; main()", "run", "plan.json", "--epochs", "500"]
    process = subprocess.Popen(
        [*command, "--checkpoint", path.name, "--checkpoint-seconds", "10000"], env=os.environ | {"SLOW": "1"},
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    seen = 0
    while seen < 10:
        line = process.stderr.readline()
        assert line, "it ended before it was interrupted"
        seen += "a micro-batch" in line
    (os.killpg if whole_group else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and out.startswith("interrupted at a window's end")
    assert torch.load(path, weights_only=False)["runner"]["number"] >= 2


def test_a_killed_run_leaves_a_whole_checkpoint(folder: Path) -> None:
    command = [sys.executable, "-c", "from autoaccum.cli import main; main()", "run", "plan.json", "--epochs", "50"]
    process = subprocess.Popen(
        [*command, "--checkpoint", "killed.pt", "--checkpoint-seconds", "0"],
        cwd=folder, start_new_session=True, env=os.environ | {"SLOW": "1"},
    )  # fmt: skip
    _wait_for(folder / "killed.pt")
    time.sleep(0.37)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    state = torch.load(folder / "killed.pt", weights_only=False)
    assert state["runner"]["number"] >= 1
    (folder / ".killed.pt.killed.part").touch()
    for part in folder.glob(".killed.pt.*"):  # one more if it was killed while it wrote
        os.utime(part, (0, 0))  # only old ones are removed: another process may be writing
    trained_here(folder, "plan.json", steps=1, checkpoint=str(folder / "killed.pt"))
    assert not list(folder.glob(".killed.pt.*"))


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, "no checkpoint was written"
        time.sleep(0.05)


def test_steps_that_were_done_before_a_resume_count(folder: Path, stopped: Path) -> None:
    shutil.copy(stopped, folder / "done.pt")
    found = trained_here(folder, "plan.json", epochs=2, steps=3, checkpoint=str(folder / "done.pt"))
    assert found["steps"] == 3 and found["loss"] is None


def test_a_checkpoint_goes_on_with_a_smaller_micro_batch_but_not_with_another_target(
    folder: Path, stopped: Path
) -> None:
    shutil.copy(stopped, folder / "moved.pt")
    plan = Plan.load(folder / "plan.json")
    split_otherwise(plan, 64, 8).save(folder / "smaller.json")
    moved = str(folder / "moved.pt")
    found = trained_here(folder, "smaller.json", steps=4, checkpoint=moved)
    assert found["steps"] == 4 and found["micro_batch"] == 8
    split_otherwise(plan, 32, 16).save(folder / "other-target.json")
    with pytest.raises(UsageError, match="target batch: 64 there, 32 here"):
        trained_here(folder, "other-target.json", checkpoint=moved)


def test_where_a_cap_decided_the_plan_says_so(folder: Path) -> None:
    out = run("explain", "plan.json", cwd=folder)
    assert "micro-batches of at most 16 allow" in out.stdout and "does not allow this size" in out.stdout
    assert "keeps 2 % free" not in out.stdout


def test_a_broken_checkpoint_is_refused_in_words(folder: Path) -> None:
    (folder / "broken.pt").write_bytes(b"PK\x03\x04 half of a checkpoint")
    out = run("run", "plan.json", "--checkpoint", "broken.pt", cwd=folder, code=2)
    assert "can't be read" in out.stderr and "remove it" in out.stderr


def test_doctor_prints_versions_limits_and_devices(folder: Path) -> None:
    out = run("doctor", "--json", cwd=folder)
    facts = json.loads(out.stdout)
    assert facts["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(facts["torch"])
    for name in ("python", "system", "processors", "available", "data limit", "torch threads", "cuda devices"):
        assert name in facts
    assert facts["fixed mmap threshold"] == "available"


def test_importing_and_help_are_quick_and_load_nothing_heavy() -> None:
    heavy = "['torch', 'pandas', 'optuna', 'numpy', 'pydantic', 'rich', 'transformers']"
    for code in ("import autoaccum", "from autoaccum import cli"):
        check = f"{code}; import sys; print([name for name in {heavy} if name in sys.modules])"
        out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]"
    seconds = []
    for _ in range(5):  # processor time: other processes' own work is not counted, and it waits for nothing
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "autoaccum", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


def test_the_options_of_the_command_line_are_frozen() -> None:
    from typer.main import get_command

    group: Any = get_command(app)
    found = {
        name: sorted(option for parameter in command.params for option in parameter.opts if option.startswith("--"))
        for name, command in group.commands.items()
    }
    assert found == {
        "bench": [
            "--device", "--headroom", "--json", "--malloc", "--memory", "--target-batch", "--tune-trials", "--tuned",
            "--windows", "--workload",
        ],
        "check": ["--json", "--workload"],
        "doctor": ["--gpus", "--json"],
        "explain": ["--json"],
        "fits": [
            "--checkpointing", "--config", "--dtype", "--gpu", "--gpus", "--image-size", "--json", "--length", "--lora",
            "--memory", "--packed", "--parallel", "--precision", "--refresh", "--target-batch", "--timm",
            "--torchvision",
        ],
        "export": ["--force", "--merge", "--output", "--to"],
        "plan": [
            "--device", "--force", "--gpu", "--gpus", "--headroom", "--host-memory", "--json", "--malloc",
            "--max-micro-batch", "--memory", "--objective", "--output", "--parallel", "--refresh", "--target-batch",
            "--timing", "--uniform", "--verbose", "--verify", "--workload",
        ],
        "report": ["--force", "--output"],
        "run": ["--checkpoint", "--checkpoint-seconds", "--epochs", "--json", "--steps"],
        "tune": [
            "--device", "--force", "--gpu", "--headroom", "--json", "--malloc", "--memory", "--output", "--pareto",
            "--sampler", "--seed", "--study", "--target-batch", "--timeout", "--trials", "--vary", "--workload",
        ],
        "virtual-gpu": [
            "--addresses", "--compute-capability", "--context", "--convolution-fallback", "--convolution-workspace",
            "--copies", "--devices", "--kernel", "--lag", "--memory", "--multiprocessors", "--name", "--other",
            "--trace", "--trial-workspace",
        ],
    }  # fmt: skip
