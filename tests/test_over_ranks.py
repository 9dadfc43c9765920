"""Training over ranks: real processes over gloo, every gradient against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_cases
from helpers_train import FP64, base_plan
from rank_groups import run_groups

EXACT = [
    "uneven_ddp", "uneven_bare", "uneven_mean_of_samples", "ragged_tokens", "ragged_tokens_counted",
    "one_micro_batch_each", "a_share_that_is_all_ignored", "large_gradients_in_place", "channels_last",
    "a_wrapper_that_is_expecting_a_backward",
]  # fmt: skip
EPOCHS = [
    "epoch_map_style", "epoch_tiny_tail", "epoch_with_generator_and_workers", "epoch_of_a_stream", "epoch_of_a_list",
    "the_order_of_one_rank",
]  # fmt: skip
OTHERS = [
    "bucket_view_and_unused", "fifty_steps", "one_decision_of_the_scaler", "bf16_sums_in_fp32",
    "batchnorm_takes_the_first_ranks", "a_bad_batch_on_one_rank", "an_error_of_the_loss",
]  # fmt: skip
WINDOWS = ["merged_statistics", "representations"]
PLANS = ["refused", "a_plan_of_all_ranks"]
GROUPS = {
    2: [*EXACT, *EPOCHS, *OTHERS, *WINDOWS, *PLANS],
    3: [*EXACT[:1], *EXACT[3:4], *EPOCHS[:2], *OTHERS[:1], *WINDOWS[:1]],
}
SLOW_GROUPS = {2: ["a_plan_with_representations"], 3: ["representations"]}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    return run_groups("rank_cases", GROUPS, base_plan(), tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def said_slowly(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    return run_groups("rank_cases", SLOW_GROUPS, base_plan(), tmp_path_factory.mktemp("slow"))


def of(said: dict[int, Any], world: int, case: str) -> list[Any]:
    """What each rank's case returned; a traceback is shown whole."""
    found: list[Any] = said[world][case]
    broken = [each for each in found if isinstance(each, str)]
    assert not broken, "\n".join(broken)
    return found


@pytest.mark.parametrize(
    ("world", "case"), [(w, case) for w, cases in GROUPS.items() for case in cases if case in EXACT]
)
def test_the_gradient_is_that_of_the_whole_batch(said: dict[int, Any], world: int, case: str) -> None:
    for each in of(said, world, case):
        assert each["worst"] <= FP64, each
        assert each["equal"] and each["reduced"] == 1.0, each
    assert of(said, world, case)[0]["samples"] in (64, 9 * world)


@pytest.mark.parametrize("world", [2, 3])
def test_a_parameter_that_no_rank_reaches_has_no_gradient(said: dict[int, Any], world: int) -> None:
    for each in of(said, world, "bucket_view_and_unused"):
        assert each["none"] == ["never.weight", "never.bias"] and each["worst"] <= FP64 and each["equal"]


def test_fifty_steps_leave_equal_bits(said: dict[int, Any]) -> None:
    for each in of(said, 2, "fifty_steps"):
        assert each["equal"] and each["worst"] < 1e-9 and each["norm"] <= 1e-11 and each["rate"], each


def test_a_scaler_decides_once_for_all_ranks(said: dict[int, Any]) -> None:
    first, second = of(said, 2, "one_decision_of_the_scaler")
    assert first["said"] == second["said"] and first["equal"]
    assert [stepped for stepped, _ in first["said"]] == [True, True, True, False, True, True]


def test_half_precision_is_summed_in_fp32_over_ranks(said: dict[int, Any]) -> None:
    for each in of(said, 2, "bf16_sums_in_fp32"):
        assert each["got"] == each["expected"]


def test_buffers_are_the_first_ranks(said: dict[int, Any]) -> None:
    assert all(each["equal"] and each["moved"] for each in of(said, 2, "batchnorm_takes_the_first_ranks"))


@pytest.mark.parametrize("world", [2, 3])
def test_merged_running_statistics_are_those_of_all_ranks(said: dict[int, Any], world: int) -> None:
    for each in of(said, world, "merged_statistics"):
        assert [each[case]["steps"] for case in ("bare", "twice, ddp", "tail")] == [2, 4, 2], each
        assert all(found["worst"] <= FP64 and found["equal"] for found in each.values()), each
        assert each["tail"]["samples"] == [64, 2]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_loss_over_representations_has_those_of_all_ranks(request: pytest.FixtureRequest, world: int) -> None:
    """Also where a rank runs out of memory, before or after they met; all then start over, or it alone does."""
    said = request.getfixturevalue("said" if world == 2 else "said_slowly")
    for rank, each in enumerate(of(said, world, "representations")):
        name, text, failed, _ = each.pop("unlike")
        assert (
            name == "RanksFailed"
            and failed in range(world)
            and "representations of ranks 0 and 1 can't be joined" in text
        ), text
        assert all(found["worst"] <= FP64 and found["equal"] for found in each.values()), each
        assert each.pop("tail")["samples"] == [64, 1]
        for case, found in each.items():
            fails = case not in ("ddp", "bare")
            assert found["ranks_retried"] == [0, int(fails), 0] and found["samples"] == 64, (case, found)
            assert found["retries"] == [0, int(fails and rank == world - 1), 0], (case, found)


@pytest.mark.parametrize(
    ("world", "case"), [(w, case) for w, cases in GROUPS.items() for case in cases if case in EPOCHS]
)
def test_every_sample_is_trained_once(said: dict[int, Any], world: int, case: str) -> None:
    ranks = of(said, world, case)
    samples = {"epoch_tiny_tail": 65, "epoch_with_generator_and_workers": 130}.get(case, 150)
    sizes = [64] * (samples // 64) + [samples % 64] * (samples % 64 > 0)
    shares = [sum(split) for split in rank_cases.UNEVEN[world]]
    for epoch in range(2):
        found = [rank["found"][epoch] for rank in ranks]
        trained = [i for rank in found for window in rank for i in window]
        assert sorted(trained) == list(range(samples))
        assert [[len(window) for window in rank[:-1]] for rank in found] == [[s] * (samples // 64) for s in shares]
    assert all(rank["sizes"] == 2 * sizes for rank in ranks)
    if case != "epoch_of_a_list":
        orders = [[i for rank in ranks for i in rank["found"][epoch][0]] for epoch in range(2)]
        assert orders[0] != orders[1]
    if case == "the_order_of_one_rank":
        whole = [[i for w in zip(*(r["found"][e] for r in ranks), strict=True) for p in w for i in p] for e in range(2)]
        assert whole == ranks[0]["orders"] and len({rank["drawn"] for rank in ranks}) == 1
    else:
        assert len({rank["drawn"] for rank in ranks}) == world  # each rank's own numbers go on


REFUSED = {
    "static_graph": ("UsageError", "static_graph=True"),
    "SyncBatchNorm": ("UsageError", "(SyncBatchNorm)"),
    "encode": ("UsageError", "encode= was given on 2 ranks, without a target batch"),
    "below the world": ("UsageError", "A target batch of 1 cannot be shared by 2 ranks"),
    "shares": ("UsageError", "shares is (60, 1), 2 numbers that sum to 61"),
    "other targets": ("UsageError", "target_batch: 64 on rank 0, 65 on rank 1"),
    "other models": ("UsageError", "model: 'Sequential"),
    "rank 1 fails": ("UsageError", "Rank 1: "),
    "another world": ("UsageError", "The plan is for 1 rank, and 2 train here"),
    "world_size": ("UsageError", "in its process group"),
    "other trained tensors": ("UsageError", "trained tensors: "),
    "DistributedSampler": ("UsageError", "The loader has a DistributedSampler"),
    "other samples": ("RanksFailed", "its loader gave other samples than rank 0's"),
    "fewer windows": ("RanksFailed", "its loader has ended"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ranks_cannot_do_is_the_same_error_on_all(said: dict[int, Any], case: str) -> None:
    kind, text = REFUSED[case]
    for name, message, *_ in (each[case] for each in of(said, 2, "refused")):
        assert name == kind and text in message, message
        assert len(message.splitlines()) == 3 or case == "world_size", message  # what, why, and what to do


def test_a_bad_batch_of_one_rank_is_left_out_by_all(said: dict[int, Any]) -> None:
    for each in of(said, 2, "a_bad_batch_on_one_rank"):
        assert each["raise"]["said"][0] == each["raise"]["said"][2] == 64 and each["raise"]["equal"]
        name, text = each["raise"]["said"][1]
        assert name == "BatchError" and text.startswith("Rank 1: ")
        assert each["skip"]["said"] == [64, 56, 64] and each["skip"]["equal"]  # its micro-batch of 8


FAILS = {
    "loss": ("forward and backward", "ValueError: a mistake of the loss"),
    "count": ("optimizer step, loading or counting", "ValueError: a mistake of the count"),
    "optimizer": ("optimizer step, loading or counting", "RuntimeError: a mistake of the optimizer"),
    "loader": ("optimizer step, loading or counting", "OSError: the disk is gone"),
    "between": ("optimizer step, loading or counting", "KeyError: 'a mistake of the evaluation'"),
}


@pytest.mark.parametrize("place", FAILS)
def test_what_one_rank_raises_ends_all_ranks_with_the_reason(said: dict[int, Any], place: str) -> None:
    phase, reason = FAILS[place]
    for each in of(said, 2, "an_error_of_the_loss"):
        name, text, rank, where = each[place]
        assert (name, rank, where) == ("RanksFailed", 1, phase) and reason in text, each[place]


def test_one_plan_has_all_ranks(said: dict[int, Any]) -> None:
    ranks = of(said, 2, "a_plan_of_all_ranks")
    for rank, each in enumerate(ranks):
        assert each["target"] == 500 and each["shares"] == [250, 250] and each["parallel"] == "bare"
        assert each["splits"] == [[84, 83, 83], [125, 125]] and each["split"] == each["splits"][rank] == each["own"]
        assert each["first"] == each["splits"][0] and each["samples"] == 500 and each["explain"]
        assert each["why"] == "equal" and "exact" in each["exactness"]


@pytest.mark.slow
def test_a_plan_has_room_for_the_loss_of_all_ranks(said_slowly: dict[int, Any]) -> None:
    for each in of(said_slowly, 2, "a_plan_with_representations"):
        assert each["shares"] == [800, 800] and each["samples"] == 1600 and each["split"] == [200] * 4
        assert each["more"] > 3 * 4 * (1600**2 - 800**2), each  # scores of all pairs, of which some are there at once


@pytest.mark.slow
def test_shares_by_memory_and_speed_sum_to_the_target(tmp_path: Path) -> None:
    said = run_groups("rank_cases", {2: ["shares_by_what_fits"]}, base_plan(), tmp_path)
    for each in of(said, 2, "shares_by_what_fits"):
        assert each["memory"] == [100, 200] and each["given"] == [290, 10] and each["parallel"] == "ddp"
        assert sum(each["speed"]) == 300 and min(each["speed"]) >= 1 and "samples per second" in each["why"]
        assert each["verified"]
