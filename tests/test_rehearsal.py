"""No out-of-memory while planning, also where two samples don't fit, or not even one.

Each case is a process on a virtual GPU, with the real caching allocator, that runs this file in forks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoaccum import Workload, fit_plan
from autoaccum.devices.virtual import VirtualGpu, available, launch
from autoaccum.errors import DoesNotFit
from autoaccum.planning import rehearsal

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.truth_cases import limit
from benchmarks.truth_search import count, forked

REASON = available()
MIB = 1 << 20
SAMPLE_MIB = 48  # of logits
CAPACITIES = {"none": 120, "one": 200, "nearly two": 360, "two": 480, "many": 2000}
RECURRENT = {"none": 70, "one": 190}  # of LSTM: 62 MiB a sample are in cuDNN's reserve space
WORKSPACES_MIB = 1000


class Head(nn.Module):
    """Logits of 48 MiB a sample, and little else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6144, 64)
        self.head = nn.Linear(64, 6144, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


class Recurrent(nn.Module):
    """Three layers through cuDNN, for which a sample's outputs are only 6 MiB of 84."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 256, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    ids, goal = batch
    return F.cross_entropy(model(ids).flatten(0, 1), goal.flatten())


def planned(mib: int) -> dict[str, Any]:
    ids = torch.zeros(2, 2048, dtype=torch.long)
    return planned_within(mib, Workload(Head().cuda(), (ids, ids.clone()), loss=loss))


def planned_recurrent(mib: int) -> dict[str, Any]:
    x = torch.zeros(2, 4000, 64)
    return planned_within(mib, Workload(Recurrent().cuda(), x, loss=lambda model, batch: model(batch).mean()))


class Workspaces(nn.Module):
    """Take an eighth of the workspaces of an LSTM on an H200: of aligned parts, other kernels from 100 samples on.

    The slope between two sizes is no whole number of bytes, and the events of small recordings are others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = len(x)
        if n >= 100:
            torch.empty(1000 * n + 77, dtype=torch.uint8, device=x.device)
        y = self.inner(x)
        torch.empty((3_932_194 + 185_345 * n + 31) // 32 * 32, dtype=torch.uint8, device=x.device)
        return y


def planned_workspaces(mib: int) -> dict[str, Any]:
    work = Workload(Workspaces().cuda(), torch.zeros(2, 64, 256), loss=lambda model, batch: model(batch).mean())
    return planned_within(mib, work, target_batch=20_000)


def planned_within(mib: int, work: Workload, target_batch: int = 8) -> dict[str, Any]:
    limit(mib * MIB)
    said: list[str] = []
    try:
        plan = fit_plan(work, target_batch=target_batch, check=False, headroom=0, progress=said.append)
    except DoesNotFit as error:
        return {"ooms": count("num_ooms"), "split": None, "text": str(error), "said": said}
    how = {"method": plan.method, "predicted": plan.predicted_peak_bytes, "measured": plan.measured_peak_bytes}
    return {"ooms": count("num_ooms"), "split": plan.split, "text": plan.explain(), "said": said} | how


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    if REASON is not None:
        pytest.skip(REASON)
    process = launch(
        [sys.executable, __file__],
        VirtualGpu(memory_bytes=8 << 30, copies="zero"),
        stdout=subprocess.PIPE,
        env=os.environ
        | {"TORCH_CUBLAS_WORKSPACE_CACHE": "1"},  # capacities for a torch that keeps workspaces: not 2.15
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    found: dict[str, dict[str, Any]] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("room", [*CAPACITIES, *(f"LSTM: {name}" for name in RECURRENT), "workspaces"])
@pytest.mark.slow
def test_memory_never_runs_out_while_planning(answers: dict[str, dict[str, Any]], room: str) -> None:
    assert answers[room]["ooms"] == 0


@pytest.mark.slow
def test_workspaces_of_aligned_parts_are_predicted_from_small_recordings(answers: dict[str, dict[str, Any]]) -> None:
    found = answers["workspaces"]
    assert found["method"] == "replayed" and len(found["split"]) > 4
    assert abs(found["predicted"] / found["measured"] - 1) < 0.005
    assert found["measured"] > 0.8 * WORKSPACES_MIB * MIB


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_it_would_need(answers: dict[str, dict[str, Any]]) -> None:
    found = answers["none"]
    assert found["split"] is None
    assert "(windows of 1 don't fit: 48.0 MiB more are needed, where" in found["text"]
    assert not any(text.startswith("recording") for text in found["said"])


@pytest.mark.slow
def test_one_sample_is_planned_where_two_do_not_fit(answers: dict[str, dict[str, Any]]) -> None:
    for found in (answers["one"], answers["nearly two"]):
        assert found["split"] == [1] * 8
        assert any("windows of 2 don't fit" in text for text in found["said"])
        assert "recording at 2 samples" not in found["said"]


@pytest.mark.slow
def test_two_samples_are_recorded_where_they_fit(answers: dict[str, dict[str, Any]]) -> None:
    assert all(answers[room]["said"][0] == "recording at 2 samples" for room in ("two", "many"))
    assert max(answers["two"]["split"]) >= 2


@pytest.mark.slow
def test_what_cudnn_reserves_for_a_recurrent_net_is_expected(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["LSTM: none"]["split"] is None and answers["LSTM: one"]["split"] == [1] * 8
    assert any("windows of 2 don't fit" in text for text in answers["LSTM: one"]["said"])


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (lambda f, x, y: f(torch.ops.aten.mm.default, (x, y), {}), (4 * 40 * 10,)),
        (lambda f, x, y: f(torch.ops.aten.t.default, (x,), {}), ()),
        (lambda f, x, y: f(torch.ops.aten.add_.Tensor, (x, x), {}), ()),
        (lambda f, x, y: f(torch.ops.aten._to_copy.default, (x,), {"dtype": torch.float16}), (2 * 40 * 30,)),
        (lambda f, x, y: f(torch.ops.aten._foreach_add.List, ([x, y], [x, y]), {}), (4 * 40 * 30, 4 * 30 * 10)),
        (lambda f, x, y: f(torch.ops.aten.zeros.default, ([7, 5],), {"device": torch.device("cpu")}), (4 * 35,)),
    ],
    ids=["product", "view", "in place", "cast", "several", "factory"],
)
def test_what_an_operation_makes_is_known_beforehand(call: Any, sizes: tuple[int, ...]) -> None:
    assert call(rehearsal._sizes, torch.ones(40, 30), torch.ones(30, 10)) == sizes


def main() -> None:
    """The plans for each capacity, on the virtual GPU."""
    torch.set_num_threads(1)
    found = {name: forked(partial(planned, mib)) for name, mib in CAPACITIES.items()}
    found |= {f"LSTM: {name}": forked(partial(planned_recurrent, mib)) for name, mib in RECURRENT.items()}
    found["workspaces"] = forked(partial(planned_workspaces, WORKSPACES_MIB))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
