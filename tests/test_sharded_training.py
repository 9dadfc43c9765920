"""FSDP2 over ranks: real processes over gloo, every gradient against one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import FP64, base_plan
from rank_groups import run_groups

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed.ReduceOp, "AVG") or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="before torch 2.9 FSDP2 averages by a reduction that gloo lacks",
)
EXACT = [
    "unequal_steps", "mean_of_samples", "ragged_tokens", "a_share_that_is_all_ignored", "a_factor_that_was_set",
    "factors_that_differ", "a_loop_that_accumulated_itself", "a_micro_batch_that_is_all_ignored", "scaled",
    "kept_on_the_host",
    "replicated_and_sharded", "clipped_epochs", "planned_together", "shares_that_were_given",
]  # fmt: skip
GROUPS = {2: [*EXACT, "overflow", "in_bf16", "refused"]}
SLOW_GROUPS = {4: ["replicated_and_sharded"], "2a": ["a_model_that_divides_itself"]}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_groups("sharded_cases", GROUPS, base_plan(), tmp_path_factory.mktemp("sharded"))[2]


@pytest.fixture(scope="module")
def said_slowly(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    return run_groups("sharded_cases", SLOW_GROUPS, base_plan(), tmp_path_factory.mktemp("slow"))


def of(said: dict[str, Any], case: str) -> list[Any]:
    broken = [each for each in said[case] if isinstance(each, str)]
    assert not broken, "\n".join(broken)
    found: list[Any] = said[case]
    return found


@pytest.mark.parametrize("case", EXACT)
def test_the_gradient_is_that_of_the_whole_batch(said: dict[str, Any], case: str) -> None:
    for each in of(said, case):
        assert each["worst"] <= FP64, each


@pytest.mark.slow
@pytest.mark.parametrize("group", SLOW_GROUPS)
def test_the_gradient_is_that_of_the_whole_batch_on_further_groups(said_slowly: Any, group: Any) -> None:
    for case in SLOW_GROUPS[group]:
        for each in of(said_slowly[group], case):
            assert each["worst"] <= FP64, each


def test_a_policy_of_bf16_is_one_process_s_that_casts_alike(said: dict[str, Any]) -> None:
    for each in of(said, "in_bf16"):
        assert each["fp32"] < 1e-6, each  # sums over micro-batches and ranks lose nothing
        assert 1e-4 < each["bf16"] < 1e-2, each  # what is reduced in bf16 does
        assert 1e-3 < each["beside fp32"] < 2e-2, each


def test_a_gradient_that_overflows_in_one_shard_stops_all_ranks_steps(said: dict[str, Any]) -> None:
    for each in of(said, "overflow"):
        assert each == {"scales": [1024.0, 512.0, 512.0], "moved": [True, False, True]}
    assert [each["scale"] for each in of(said, "scaled")] == [2048.0] * 2


def test_given_shares_run_as_many_micro_batches(said: dict[str, Any]) -> None:
    for each in of(said, "shares_that_were_given"):
        assert each["same"] and each["shares"] == [10, 6] and each["splits"] == [[3, 3, 2, 2], [2, 2, 1, 1]]


def test_a_plan_is_of_all_ranks_and_leaves_the_model_as_it_was(said: dict[str, Any]) -> None:
    first, second = of(said, "planned_together")
    for each in (first, second):
        assert each["same"] and each["parallel"] == "fsdp" and each["shares"] == [9, 8] and each["verified"]
        assert "sharded" in each["exactness"] and each["splits"] == [[3, 3, 3], [3, 3, 2]]
    assert (first["own"], second["own"]) == ([3, 3, 3], [3, 3, 2])


def test_what_is_not_trained_sharded_is_refused_on_all_ranks(said: dict[str, Any]) -> None:
    for each in of(said, "refused"):
        partly, speed, memory = each["said"]
        assert "2.weight of the model isn't sharded by fully_shard over all 2 ranks" in partly
        assert "'speed'" in speed and "'memory'" in memory


FAILING = """
import sys
import torch, torch.distributed as dist
rank, store, here = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path.insert(0, here)
from helpers_train import mlp, vectors
from sharded_cases import sharded
from autoaccum import RanksFailed, Runner, Workload, fit_plan
from autoaccum.workload import default_loss
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
windows = []
def loss(model, batch):
    if rank == 1 and len(windows) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory, as it were")
    return default_loss(model, batch)
work = Workload(sharded(mlp()), vectors(4), loss=loss, count=len)
runner = Runner(work, fit_plan(work, target_batch=16, budget="6GiB", max_micro_batch=4), timeout_seconds=30)
print("begins", flush=True)
for _ in range(4):
    windows.append(0)
    try:
        runner.step(vectors(8))
    except RanksFailed as error:
        print(f"raised: {error.reason}", flush=True)
        sys.exit(3)
"""


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_ends_all_within_seconds(tmp_path: Path) -> None:
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FAILING, str(rank), str(tmp_path / "group"), here],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert ranks[1].stdout is not None and ranks[1].stdout.readline() == "begins\n"
    begun = time.monotonic()
    (_, first), (second, _) = (process.communicate(timeout=100) for process in ranks)
    assert time.monotonic() - begun < 20
    assert (ranks[1].returncode == 3 and "can't start it over" in second) or "out of memory" in second
    assert ranks[0].returncode not in (0, 3) and "rank 0 ends, as rank 1 failed" in first and "out of memory" in first
