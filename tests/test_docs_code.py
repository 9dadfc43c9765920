"""The documentation's code: python blocks are run, page by page; commands are parsed with their options."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from autoaccum.cli import app
from autoaccum.devices import virtual

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```(?:sh|console|bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4,}(?:\$ )?(autoaccum .*)$", re.MULTILINE)

# Pages whose python blocks another test runs.
RUN_ELSEWHERE = {
    "ranks.md": "tests/test_torchrun.py",
    **dict.fromkeys(("accelerate.md", "lightning.md", "plain-loop.md", "training.md"), "tests/test_loop_pages.py"),
    "huggingface.md": "tests/test_hugging_face_trainer.py",
    "two-optimizers.md": "tests/test_first_tries.py",
    "workload.md": "tests/test_workloads.py",
}

SMALL = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from autoaccum import Workload
torch.manual_seed(0)
data = TensorDataset(torch.randn(40, 6), torch.randint(3, (40,)))
loader = DataLoader(data, batch_size=8)
sample = next(iter(loader))
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
loss = lambda m, batch: torch.nn.functional.cross_entropy(m(batch[0]), batch[1])
optimizer = torch.optim.AdamW(model.parameters())
"""
MINE = f"""
from pathlib import Path
Path("mine.py").write_text('''{SMALL}
def workload(tokens=512):
    return Workload(model, sample, loss=loss)
''')
import functools
"""
PLAN = (
    "from autoaccum import fit_plan\nfit_plan(Workload(model, sample, loss=loss), target_batch=16).save('plan.json')\n"
)
TRAINER = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
dataset = [{"input_ids": [i % 60] * 8, "labels": [i % 60] * 8} for i in range(300)]
args = TrainingArguments("out", max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
"""
# What a page's examples take for granted; "page:n": before its n-th block, counted from 0.
BEFORE: dict[str, str] = {
    "README.md": TRAINER,
    "README.md:1": SMALL + "criterion = torch.nn.CrossEntropyLoss()\nplan = 'plan.json'\n" + PLAN,
    "README.md:2": SMALL,
    "plan-cache.md": SMALL,
    "report.md": SMALL + PLAN,
    "tune.md": MINE,
    "virtual-gpu.md": "import sys\nfrom pathlib import Path\nPath('train.py').write_text('')\n",
}
# A test process holds more before planning than a script does, and tuning takes long.
REPLACED: dict[str, tuple[str, str]] = {
    "tune.md": ("target_batch=512)", "target_batch=16, trials=1)"),
}
LONG = {"tune.md"}


def blocks(page: Path) -> list[str]:
    """Return a page's python blocks, in order."""
    return PYTHON.findall(page.read_text())


WITH_PYTHON = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name in LONG)) for p in WITH_PYTHON if p.name not in RUN_ELSEWHERE],
    ids=lambda page: page.name,
)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {"__name__": "page"}
    if page.name == "README.md":
        pytest.importorskip("transformers")
    if page.name == "virtual-gpu.md" and (reason := virtual.available()) is not None:
        pytest.skip(reason)
    exec(compile(BEFORE.get(page.name, ""), "before", "exec"), names)
    for number, block in enumerate(blocks(page)):
        if number and f"{page.name}:{number}" in BEFORE:
            exec(compile(BEFORE[f"{page.name}:{number}"], "before", "exec"), names)
        first = block.partition("\n")[0]
        if re.fullmatch(r"# \w+\.py", first):  # a file that later blocks import
            Path(first.removeprefix("# ")).write_text(block)
        if page.name in REPLACED:
            block = block.replace(*REPLACED[page.name])
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_pages_that_another_test_runs_are_named_there() -> None:
    for page, test in RUN_ELSEWHERE.items():
        assert blocks(ROOT / "docs" / page) and page.removesuffix(".md") in (ROOT / test).read_text(), page


def commands(page: Path) -> Iterator[str]:
    """Yield the command lines that begin with autoaccum, joined where a backslash continues them."""
    text = page.read_text()
    lines = [line for block in FENCED.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *INDENTED.findall(text)]:
        for part in line.removeprefix("$ ").split("&&"):
            words = re.sub(r"\s+(#|exit code|<|>|\|).*", "", part.strip())  # a remark, a redirection
            if words.startswith("autoaccum ") and "[" not in words and "..." not in words:
                yield words


@pytest.mark.parametrize("page", [p for p in PAGES if list(commands(p))], ids=lambda page: page.name)
def test_commands_have_the_options_that_the_pages_give_them(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    context = root.make_context("autoaccum", ["doctor"])
    for line in commands(page):
        name, *arguments = shlex.split(line)[1:]
        if name.startswith("-"):
            continue
        command = root.get_command(context, name)
        assert command is not None, f"{page.name}: {line}"
        try:
            command.make_context(name, arguments)
        except Exception as error:
            pytest.fail(f"{page.name}: {line}: {error}")


# Commands that another test runs, or that need what a test machine lacks.
NOT_RUN_HERE = {
    "--device cuda": "a GPU",
    "--parallel": "tests/test_cluster.py",
    "autoaccum bench": "tests/test_bench.py",
    "autoaccum tune": "tests/test_tune.py",
    "autoaccum run tuned.json": "tests/test_tune.py",
    "tests/replay_fuzz.py": "tests/test_caching_allocator.py",
}
TRAIN = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from autoaccum import Workload

def language(device="cpu"):
    ids = torch.randint(60, (4, 128))
    model = nn.Sequential(nn.Embedding(60, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 60))
    loss = lambda m, batch: cross_entropy(m(batch[0]).flatten(0, 1), batch[1].flatten())
    return Workload(model, (ids, ids), loss=loss, optimizer="adamw")

work = workload = language
"""
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 500}
TINY["max_position_embeddings"] = 8192
CONFIGURATIONS = {
    "config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TINY},
    "llama/config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TINY},
    "gpt2/config.json": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2,
    },
    "ds.json": {"zero_optimization": {"stage": 2}},
}  # fmt: skip


def run_here(line: str) -> bool:
    return not any(part in line for part in NOT_RUN_HERE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [p for p in PAGES if any(map(run_here, commands(p)))], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """As they stand there, one after the other, with small models in the files that they name."""
    if (reason := virtual.available()) is not None and "gpu" in page.read_text():
        pytest.skip(reason)
    (tmp_path / "train.py").write_text(TRAIN)
    for name, content in CONFIGURATIONS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for line in filter(run_here, commands(page)):
        words = [sys.executable if word == "python" else word for word in shlex.split(line)]
        words = [each for word in words for each in ([sys.executable, "-m", word] if word == "autoaccum" else [word])]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
        assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout}{done.stderr}"
