"""Lanes over ranks: statistics of the whole window of all ranks, in real processes over gloo."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_train import FP32, FP64, base_plan
from rank_groups import run_groups
from rank_lanes_memory import ROWS, SHARES, WINDOWS
from test_rank_faults import check_schedules

from autoaccum.devices.virtual import VirtualGpu, available, launch

EXACT = ["whole_statistics", "one_each", "ragged_counts", "gathered_rows", "checkpointed_blocks"]
GROUPS = {
    "2": [*EXACT, "a_tail", "dropout_of_lanes", "out_of_memory", "refused"],
    "3": ["whole_statistics", "a_tail", "a_rank_is_killed"],
}
SLOW_GROUPS = {
    "3": [*EXACT[1:], "dropout_of_lanes", "out_of_memory", "refused"],
    "2": ["planned", "planned_rows", "precisions"],
    "2a": ["a_rank_stops_answering"],
    "2b": ["a_rank_is_killed_in_its_forward"],
    "3a": ["a_rank_is_killed"],
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return run_groups("rank_lanes", GROUPS, base_plan(), tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def said_slowly(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return run_groups("rank_lanes", SLOW_GROUPS, base_plan(), tmp_path_factory.mktemp("slow"))


def of(said: dict[Any, Any], world: int, case: str) -> list[Any]:
    found: list[Any] = said[str(world)][case]
    broken = [each for each in found if isinstance(each, str)]
    assert not broken, "\n".join(broken)
    return found


def check_exact(said: dict[Any, Any], world: int, case: str) -> None:
    for each in of(said, world, case):
        for name, one in each.items():
            assert one["worst"] <= FP64 and one["equal"], (name, one)
            assert one["none"] == (6 if case == "ragged_counts" else 0), (name, one)
            assert all(number == len(one["samples"]) for number in one["norms"]), (name, one)


@pytest.mark.parametrize("case", EXACT)
def test_the_gradient_is_that_of_the_whole_batch_of_all_ranks(said: dict[Any, Any], case: str) -> None:
    check_exact(said, 2, case)


def test_three_ranks_have_the_statistics_of_all(said: dict[Any, Any]) -> None:
    check_exact(said, 3, "whole_statistics")


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT[1:])
def test_three_ranks_train_what_two_do(said_slowly: dict[Any, Any], case: str) -> None:
    check_exact(said_slowly, 3, case)


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_without_samples_takes_part(said: dict[Any, Any], world: int) -> None:
    ranks = of(said, world, "a_tail")
    for name in ("first", "last"):
        for each in ranks:
            assert each["tails"][name]["worst"] <= FP64 and each["tails"][name]["equal"], each
            assert each["tails"][name]["samples"] == [64, 1]
        assert 0 in [each["tails"][name]["here"][1] for each in ranks]
    for each in ranks:
        assert each["too few"]["said"][0] == "BatchError" and "got 1 in the window" in each["too few"]["said"][1]
        assert each["too few"]["again"] == [64] and each["too few"]["equal"]


def check_dropout(said: dict[Any, Any], world: int) -> None:
    for each in of(said, world, "dropout_of_lanes"):
        assert each["worst"] <= FP64 and each["equal"] and each["unlike"] > 40, each


def test_each_lane_of_each_rank_draws_its_own(said: dict[Any, Any]) -> None:
    check_dropout(said, 2)


def check_retries(said: dict[Any, Any], world: int) -> None:
    for rank, each in enumerate(of(said, world, "out_of_memory")):
        for place, one in each.items():
            assert one["worst"] <= FP64 and one["equal"], (place, one)
            assert one["ranks_retried"] == [0, 1, 0], (place, one)
            assert one["retries"] == [0, int(rank == world - 1), 0], (place, one)
            assert len(one["splits"][1]) > len(one["splits"][0]) if rank == world - 1 else True, (place, one)


def test_all_start_over_when_one_rank_runs_out_of_memory(said: dict[Any, Any]) -> None:
    check_retries(said, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [2, 3])
def test_a_hundred_schedules_of_faults(tmp_path: Path, world: int) -> None:
    found = run_groups("rank_lanes", {str(world): ["schedules_100"]}, base_plan(), tmp_path, 900)
    print(world, "ranks:", check_schedules(found[str(world)]["schedules_100"], world, range(100)))


REFUSED = {
    "never fits": ("RanksFailed", "Out of memory with a micro-batch of 1"),
    "order": ("RanksFailed", "'inner.1'"),
    "end": ("RanksFailed", "its lanes are at the end of its forward passes"),
    "mistake": ("RanksFailed", "a mistake of the model"),
    "encode": ("UsageError", "gather_window(representations)"),
    "own": ("UsageError", "is a SyncBatchNorm with a forward of its own"),
    "merged": ("UsageError", "Use batchnorm='exact'"),
    "unlike choices": ("UsageError", "batchnorm: "),
}


def check_refused(said: dict[Any, Any], world: int, case: str) -> None:
    kind, text = REFUSED[case]
    ranks = [each[case] for each in of(said, world, "refused")]
    for name, message, rank, _ in ranks:
        assert name == kind and text in message, message
        assert (rank == 1) == (kind == "RanksFailed"), message
    assert len({message.replace(" This is that rank.", "") for _, message, *_ in ranks}) == 1


@pytest.mark.parametrize("case", REFUSED)
def test_what_ends_all_ranks_is_the_same_error_on_all(said: dict[Any, Any], case: str) -> None:
    check_refused(said, 2, case)


def test_a_rank_that_is_killed_in_a_meeting_ends_all(said: dict[Any, Any]) -> None:
    for each in said["3"]["a_rank_is_killed"][:2]:
        assert each["said"][0] == "RanksFailed" and each["said"][2] == 2 and each["seconds"] < 20, each


@pytest.mark.slow
def test_three_ranks_fail_as_two_do(said_slowly: dict[Any, Any]) -> None:
    check_dropout(said_slowly, 3)
    check_retries(said_slowly, 3)
    for case in REFUSED:
        check_refused(said_slowly, 3, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a_rank_is_killed", "a_rank_is_killed_in_its_forward", "a_rank_stops_answering"])
def test_a_rank_that_is_gone_ends_all(said_slowly: dict[Any, Any], case: str) -> None:
    group = {"a_rank_is_killed": "3a", "a_rank_is_killed_in_its_forward": "2b"}.get(case, "2a")
    for each in said_slowly[group][case][:-1]:
        assert each["said"][0] == "RanksFailed" and each["said"][2] == int(group[0]) - 1, each
        assert each["seconds"] < (12 if case == "a_rank_stops_answering" else 20), each


@pytest.mark.slow
def test_other_precisions_than_double(said_slowly: dict[Any, Any]) -> None:
    ranks = of(said_slowly, 2, "precisions")
    for each in ranks:
        assert each["fp32"]["worst"] <= FP32 and each["fp32"]["equal"], each
        assert each["bf16"]["worst"] <= 0.03 and each["bf16"]["equal"], each
        assert each["bf16"]["stepped"] == [True, False, True] and each["bf16"]["scales"] == ranks[0]["bf16"]["scales"]


@pytest.mark.slow
def test_rows_of_all_ranks_are_planned_for_a_target(said_slowly: dict[Any, Any]) -> None:
    for each in of(said_slowly, 2, "planned_rows"):
        assert each["samples"] == 1600 and sum(each["split"]) == 800, each
        assert "without a target batch" in each["no target"][1], each


@pytest.mark.slow
def test_ranks_plan_lanes_alone(said_slowly: dict[Any, Any], tmp_path: Path) -> None:
    for each in of(said_slowly, 2, "planned"):
        assert each["split"] == each["own"] and sum(each["split"]) == 40 and each["samples"] == 80, each
        assert each["statistics"] <= FP32 and each["equal"] and not each["left"], each


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(available() is not None, reason=str(available()))
@pytest.mark.parametrize("what", ["norms", "rows"])
def test_ranks_reserve_what_was_planned(tmp_path: Path, what: str) -> None:
    """Two virtual GPUs: DistributedDataParallel and SyncBatchNorm, several lanes on one; a loss over all rows."""
    here = Path(__file__).parent
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    gpus = VirtualGpu(memory_bytes=4 << 30, devices=2, copies="all")
    done = launch([*ranks, str(here / "rank_lanes_memory.py"), str(tmp_path), what], gpus, env=env)
    assert done.wait(timeout=240) == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    print(json.dumps(found))
    samples = sum(SHARES) * (1 if what == "norms" else ROWS)
    for each in found:
        assert each["samples"] == [samples] * WINDOWS and each["splits"] == [each["planned"]] * WINDOWS
        assert each["failures"] == 0 and each["retries"] == [0] * WINDOWS
        assert abs(each["reserved"] - each["predicted"]) <= 0.02 * each["predicted"], each
    if what == "rows":
        return
    assert len(found[0]["planned"]) > 1 and found[1]["planned"] == [SHARES[1]]
    for each in found:
        assert each["method"] == "replayed"
        assert each["short_samples"] == [sum(SHARES)] * WINDOWS and each["short_retried"] == [1, *[0] * (WINDOWS - 1)]
    assert found[0]["short_retries"][0] >= 1 and found[1]["short_retries"] == [0] * WINDOWS
