"""One rank's out-of-memory is its own affair; one that is gone ends all; a checkpoint goes on, also on other ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import FP64, base_plan, mlp, vectors
from rank_faults import schedule
from rank_groups import run_groups
from rank_memory import SHARES, WINDOWS
from torch.utils.data import DataLoader

from autoaccum.devices.virtual import VirtualGpu, available, launch
from autoaccum.workload import default_loss

GROUPS = {
    "2": ["schedules_few", "a_checkpoint_goes_on_bitwise", "begun_here", "an_optimizer_fails_at_the_very_end"],
    "3": ["schedules_few", "gone_on_with", "a_rank_is_killed"],
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_groups("rank_faults", GROUPS, base_plan(), tmp_path_factory.mktemp("faults"))


def check_schedules(ranks: list[Any], world: int, numbers: range) -> dict[str, int]:
    """Hold each schedule to what must come of it; return how they ended."""
    assert not any(isinstance(each, str) for each in ranks), ranks
    ends = {"trained": 0, "started over": 0, "ended together": 0}
    for place, seed in enumerate(numbers):
        each = [rank[place] for rank in ranks]
        assert all(one["worst"] <= FP64 for one in each), (seed, each)
        _, _, _, faults = schedule(seed, world)
        ending = [rank for rank, own in enumerate(faults) if any(fault.times > 10 for fault in own)]
        if any(one["ended"] for one in each):
            assert all(one["ended"] and one["ended"][:2] == each[0]["ended"][:2] for one in each), (seed, each)
            assert each[0]["ended"][0] == "RanksFailed" and (not ending or each[0]["ended"][1] in ending), (seed, each)
            assert ending or "which can't be" in each[0]["ended"][2] or "micro-batch of 1" in each[0]["ended"][2]
            ends["ended together"] += 1
            continue
        assert not ending, (seed, each)
        assert all(one["equal"] and one["counted"] == each[0]["counted"] for one in each), (seed, each)
        for window, counted in enumerate(each[0]["counted"]):
            assert counted == sum(one["retries"][window] > 0 for one in each), (seed, each)
        ends["started over" if any(each[0]["counted"]) else "trained"] += 1
    return ends


@pytest.mark.parametrize(("world", "numbers"), [(2, range(8)), (3, range(4, 8))])
def test_faults_of_one_rank_leave_exact_gradients_or_end_all(said: dict[str, Any], world: int, numbers: range) -> None:
    ends = check_schedules(said[str(world)]["schedules_few"], world, numbers)
    assert ends["started over"] >= 1 and ends["ended together"] >= 1, ends


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3])
def test_two_hundred_schedules_of_faults(tmp_path: Path, world: int) -> None:
    found = run_groups("rank_faults", {str(world): ["schedules_200"]}, base_plan(), tmp_path, 1800)
    print(world, "ranks:", check_schedules(found[str(world)]["schedules_200"], world, range(200)))


def test_a_run_that_goes_on_from_its_checkpoint_has_the_same_bits(said: dict[str, Any]) -> None:
    for each in said["2"]["a_checkpoint_goes_on_bitwise"]:
        assert each["same"] and each["equal"] and each["steps"] == [4, 9, 9] and each["samples"] == [128, 288], each


def test_other_ranks_go_on_with_a_checkpoint(said: dict[str, Any]) -> None:
    """Two ranks train 4 windows, three the other 5: as one process trains all 9, in the same order."""
    assert said["2"]["begun_here"] == [4, 4]
    values = [each["values"] for each in said["3"]["gone_on_with"]]
    assert all(each["steps"] == 9 and each["samples"] == 288 and each["equal"] for each in said["3"]["gone_on_with"])
    assert values[0] == values[1] == values[2]
    expected = _as_one_process()
    got = torch.tensor(values[0], dtype=torch.float64)
    assert float((got - expected).norm() / expected.norm()) < 1e-10


def _as_one_process() -> torch.Tensor:
    """Three epochs of three windows of 32, in the order that is drawn after the model was made."""
    batch, twin = vectors(96), mlp()
    optimizer = torch.optim.AdamW(twin.parameters(), 1e-2)
    loader: Any = DataLoader(range(96), 32, shuffle=True)  # type: ignore[arg-type]
    for _ in range(3):
        for rows in loader:
            optimizer.zero_grad()
            default_loss(twin, (batch[0][rows], batch[1][rows])).backward()
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in twin.parameters()])


def test_a_rank_that_is_killed_ends_all_others(said: dict[str, Any]) -> None:
    for each in said["3"]["a_rank_is_killed"][:2]:
        name, text, rank, _ = each["said"]
        assert (name, rank) == ("RanksFailed", 2) and "its process ended" in text and each["seconds"] < 20, each


def test_a_failure_after_the_last_window_waits_for_nobody(said: dict[str, Any]) -> None:
    trained, failed = said["2"]["an_optimizer_fails_at_the_very_end"]
    assert trained["last"]["said"] == "nothing was raised"  # its step was whole
    assert trained["alone"], "rank 1 raised only once rank 0 said its next word"
    for name, text, rank, phase in (failed["last"]["said"], trained["then"]["said"]):
        assert (name, rank, phase) == ("RanksFailed", 1, "optimizer step, loading or counting") and "injected" in text
    assert failed["last"]["seconds"] < 5 and trained["then"]["seconds"] < 5, (trained, failed)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_and_a_first_rank_that_is_killed(tmp_path: Path) -> None:
    groups = {"3a": ["the_first_rank_is_killed"], "2a": ["a_rank_stops_answering"]}
    found = run_groups("rank_faults", groups, base_plan(), tmp_path)
    for each in found["3a"]["the_first_rank_is_killed"][1:]:
        assert each["said"][0] == "RanksFailed" and each["said"][2] == 0, each
    waiting = found["2a"]["a_rank_stops_answering"][0]
    assert waiting["said"][0] == "RanksFailed" and waiting["said"][2] == 1 and waiting["seconds"] < 10, waiting
    assert "didn't answer within 2 s" in waiting["said"][1], json.dumps(waiting)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(available() is not None, reason=available() or "")
def test_a_real_out_of_memory_of_one_rank_leaves_the_other_alone(tmp_path: Path) -> None:
    """On two virtual GPUs: rank 1's neighbour takes three quarters of its device after planning."""
    here = Path(__file__).parent
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    gpus = VirtualGpu(memory_bytes=4 << 30, devices=2, copies="all")
    done = launch([*ranks, str(here / "rank_memory.py"), str(tmp_path)], gpus, env=env)
    assert done.wait(timeout=800) == 0
    whole, short = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    print(json.dumps([whole, short]))
    for each in (whole, short):
        assert each["samples"] == [sum(SHARES)] * WINDOWS and each["ranks_retried"] == [
            int(n > 0) for n in short["retries"]
        ]
        assert all(each["same"]) and len(each["same"]) == 1 + WINDOWS  # parameters, and each window's gradient
    assert whole["retries"] == [0] * WINDOWS and whole["splits"] == [whole["planned"]] * WINDOWS
    assert whole["failures"] == 0 and abs(whole["reserved"] / whole["predicted"] - 1) <= 0.01, whole
    assert short["failures"] > 0 and short["retries"][0] >= 1 and len(short["splits"][-1]) > len(short["planned"])
    assert all(sum(split) == SHARES[1] for split in short["splits"])


LOOKS = """
import sys, tempfile, time
from types import SimpleNamespace
import torch.distributed as dist
from autoaccum.ranks import ending

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
ending.SECONDS, ending.default_store = 0, lambda: store
made = [ending.Ending(SimpleNamespace(rank=0, name=str(number))) for number in range(16)]
time.sleep(0.1)
"""


@pytest.mark.slow
def test_looking_for_failed_ranks_ends_before_the_interpreter() -> None:
    """In the store's C++ code its thread would be unwound, and the process aborted after a whole training."""
    done = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
