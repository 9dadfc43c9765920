"""The workloads that come along, and the page that shows how to write one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoaccum import UsageError, Workload
from autoaccum.data import tree
from autoaccum.data.split import select
from autoaccum.processes.examples import BUILT_IN
from autoaccum.processes.workload_source import load_workload
from autoaccum.window import step

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_is_the_same_each_time_and_its_loss_falls(name: str) -> None:
    work, again = load_workload(name), load_workload(name)
    for one, other in zip(work.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert work.name == name and callable(work.loader)
    batch = next(iter(work.loader()))
    assert [leaf.shape[1:] for _, leaf in tree.leaves(batch)] == [
        leaf.shape[1:] for _, leaf in tree.leaves(work.sample)
    ]
    context = step.open_context(work)
    few = select(batch, range(8))
    losses = [float(step.train_window(context, [few], [8]).loss) for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]


def test_digits_says_how_to_get_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match="pip install 'autoaccum"):
        load_workload("digits")


@pytest.mark.slow
def test_the_page_on_workloads_works_as_it_is_written(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/workload.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(blocks[0])
    script = blocks[1].replace('4096, budget="1200MiB"', '8192, budget="1200MiB"')
    out = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "accumulation step" in out.stdout and out.stdout.strip().splitlines()[-1].startswith("2 ")
    compile(blocks[2], "docs/workload.md", "exec")


def test_a_workload_without_anything_to_train_is_refused() -> None:
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        Workload(model)
    with pytest.raises(UsageError, match="'int4' is not known"):
        Workload(torch.nn.Linear(2, 2), precision="int4")
