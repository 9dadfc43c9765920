"""Planning for GPUs that are not here: options, targets in tokens, models spread over ranks, what doesn't fit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import mlp, plan_for, vectors
from torch import nn

from autoaccum import Plan, UsageError, Workload
from autoaccum.cli.gpus import read_gpus
from autoaccum.devices.virtual import available
from autoaccum.planning.cluster import Cluster
from autoaccum.planning.request import PlanRequest
from autoaccum.planning.target_tokens import tokens_to_samples
from autoaccum.planning.unequal import GpuKind, plan_unequal
from autoaccum.simulation.solver import balanced
from autoaccum.units import parse_target
from autoaccum.window.blocks import find_blocks, repeated_blocks

REASON = available()
on_a_virtual_gpu = pytest.mark.skipif(REASON is not None, reason=REASON or "")

WORK = """
import torch
from torch import nn
from autoaccum import Workload

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(1000, 3000), nn.Linear(3000, 1000)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.tokens, self.head = nn.Embedding(999, 1000), nn.Linear(1000, 999)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
    def forward(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def work(blocks=3):
    model = Net(blocks)
    tokens = torch.randint(0, 999, (2, 64))
    return Workload(model, (tokens, tokens), optimizer=torch.optim.AdamW(model.parameters()), precision="bf16")

def large():
    return work(24)
"""


def autoaccum(folder: Path, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(WORK)
    command = [sys.executable, "-m", "autoaccum", *args]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert found.returncode == code, found.stdout + found.stderr
    return found


# -- options


@pytest.mark.parametrize(
    ("named", "gpus", "parallel", "kinds", "cluster"),
    [
        (["h100-80gb"], None, None, [GpuKind("h100-80gb", 1)], None),
        (["h100-80gb"], 64, "fsdp", [GpuKind("h100-80gb", 64)], Cluster(64, "fsdp")),
        (["h100-80gb:8"], None, None, [GpuKind("h100-80gb", 8)], Cluster(8)),
        (
            ["h100-80gb:6", "a100-40gb:2"],
            None,
            "ddp",
            [GpuKind("h100-80gb", 6), GpuKind("a100-40gb", 2)],
            Cluster(8, "ddp"),
        ),
        (None, None, None, [], None),
    ],
)
def test_gpus_are_read(named: Any, gpus: Any, parallel: Any, kinds: list[GpuKind], cluster: Cluster | None) -> None:
    assert read_gpus(named, gpus, parallel) == (kinds, cluster)


@pytest.mark.parametrize(
    ("named", "gpus", "parallel", "message"),
    [
        (None, 8, None, "--gpus was given without --gpu"),
        (None, None, "ddp", "--parallel was given without --gpu"),
        (["h100-80gb:x"], None, None, "no number behind its colon"),
        (["h100-80gb:0"], None, None, "no number behind its colon"),
        (["h100-80gb:4"], 8, None, "--gpus is 8, and --gpu names 4"),
        (["h100-80gb:6", "a100-40gb:2"], None, "fsdp", "are different GPUs, and --parallel is fsdp"),
        (["h100-80gb"], 0, None, "--gpus is 0"),
        (["h100-80gb"], 8, "tp", "--parallel tp is not known"),
    ],
)
def test_gpus_that_do_not_go_together_are_refused(named: Any, gpus: Any, parallel: Any, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_gpus(named, gpus, parallel)
    assert message in refused.value.what and refused.value.hint


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("512", (512, None)), (None, (None, None)), ("4M-tokens", (None, 4_000_000)), ("4Mi-tokens", (None, 1 << 22)),
        ("1.5k tokens", (None, 1500)), ("8192 tokens", (None, 8192)), ("1token", (None, 1)),
    ],
)  # fmt: skip
def test_targets_are_read(text: str | None, found: tuple[int | None, int | None]) -> None:
    assert parse_target(text, "--target-batch") == found


@pytest.mark.parametrize("text", ["4M", "many", "1.5", "tokens", "-4-tokens", "4T-tokens"])
def test_targets_that_are_neither_samples_nor_tokens_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither samples nor tokens"):
        parse_target(text, "--target-batch")


def test_a_target_in_tokens_is_the_nearest_number_of_samples() -> None:
    tokens = torch.zeros(2, 48, dtype=torch.long)
    request = PlanRequest(target_tokens=1000)
    work = Workload(nn.Linear(1, 1), {"input_ids": tokens, "labels": tokens})
    found, note = tokens_to_samples(request, work)
    assert found.target_batch == 21 and found.target_tokens is None
    assert note == "21 samples of 48 tokens are 1,008 tokens, the nearest to 1,000."
    with pytest.raises(UsageError, match="less than half a sample"):
        tokens_to_samples(PlanRequest(target_tokens=20), work)
    with pytest.raises(UsageError, match="samples of one length"):
        tokens_to_samples(request, Workload(nn.Linear(1, 1), (torch.zeros(2, 48), torch.zeros(2, dtype=torch.long))))


def test_repeated_blocks_of_an_encoder_and_a_decoder_are_found() -> None:
    def layers() -> nn.ModuleList:
        return nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))

    model = nn.ModuleDict({"encoder": layers(), "decoder": layers(), "head": nn.Linear(2, 2)})
    found = repeated_blocks(model)
    assert found == [*model["encoder"], *model["decoder"]]  # type: ignore[misc]
    blocks = find_blocks(model)
    assert blocks is not None and blocks.path == "encoder"
    outer = nn.ModuleList(nn.Sequential(layers(), nn.ReLU()) for _ in range(2))
    assert repeated_blocks(outer) == list(outer)


def test_unequal_gpus_share_a_target_by_their_memory() -> None:
    made = plan_for(Workload(mlp(), vectors(4)), 16, 4)
    asked: list[PlanRequest] = []

    def plan_kind(kind: GpuKind, request: PlanRequest) -> Plan:
        """As a plan of that kind would be: 30 samples fit the large one, 11 the small one."""
        asked.append(request)
        most = {"large": 30, "small": 11}[kind.name]
        split = balanced(request.samples, -(-request.samples // most)) if request.samples else (most,)
        schedule = replace(made.schedule, split=split, micro_batch=split[0], accumulation_steps=len(split))
        made_for = replace(made.request, target_batch=sum(split), world_size=1)
        return Plan.from_json(replace(made, schedule=schedule, request=made_for).to_json())

    found = plan_unequal([GpuKind("large", 3), GpuKind("small", 2)], PlanRequest(target_batch=300), plan_kind)
    assert sum(found.shares) == 300 and found.parallel == "ddp" and found.target_batch == 300
    assert max(found.shares[:3]) - min(found.shares[:3]) <= 1 and found.shares[0] / found.shares[3] == pytest.approx(
        30 / 11, rel=0.05
    )
    assert all(entry.micro_batch <= most for entry, most in zip(found.ranks, (30, 30, 30, 11, 11), strict=True))
    assert len({entry.accumulation_steps for entry in found.ranks}) == 1
    assert [request.samples for request in asked] == [None, None, found.shares[0], found.shares[3]]
    assert Plan.from_json(found.to_json()) == found
    with pytest.raises(UsageError, match="none was named"):
        plan_unequal([GpuKind("large", 3), GpuKind("small", 2)], PlanRequest(), plan_kind)


# -- plans


@on_a_virtual_gpu
def test_a_sharded_model_s_plan_is_within_one_percent_of_the_allocator(tmp_path: Path) -> None:
    out = autoaccum(
        tmp_path, "plan", "--gpu", "h100-80gb", "--gpus", "64", "--parallel", "fsdp", "--target-batch", "1M-tokens",
        "--memory", "2GiB", "--workload", "train.py:work", "--json",
    ).stdout  # fmt: skip
    plan = json.loads(out)
    assert plan["request"]["world_size"] == 64 and plan["request"]["target_batch"] == 15_625
    assert sum(plan["schedule"]["split"]) == 245 and len(plan["schedule"]["split"]) > 1
    measured, predicted = plan["evidence"]["measured_peak_bytes"], plan["evidence"]["this_process_peak_bytes"]
    assert abs(predicted / measured - 1) < 0.01
    parameters = 999 * 1000 + 1000 * 999 + 999 + 3 * (2 * 3_000_000 + 4000)
    assert plan["memory"]["baseline_bytes"] < parameters * 4 / 4  # shards, in segments of 2 MiB and more
    assert any(term["name"] == "collectives" and "964" not in term["why"] for term in plan["memory"]["budget"]["terms"])
    notes = " ".join(plan["provenance"]["notes"])
    assert "FSDP2 shards each of 3 Block" in notes and "MixedPrecisionPolicy" in notes and "15,625 samples" in notes


@pytest.mark.slow
@on_a_virtual_gpu
def test_what_does_not_fit_names_ranks_from_which_it_would(tmp_path: Path) -> None:
    def plan(ranks: int, code: int) -> str:
        return autoaccum(
            tmp_path, "plan", "--gpu", "h100-80gb", "--gpus", str(ranks), "--parallel", "fsdp", "--memory", "2.2GiB",
            "--target-batch", "512", "--workload", "train.py:large", code=code,
        ).stderr  # fmt: skip

    text = plan(4, 3)
    ranks = int(text.partition(" such GPUs in place of 4")[0].split()[-1])
    assert 4 < ranks <= 64
    plan(ranks, 0)
    if ranks > 5:
        plan(ranks - 1, 3)


@pytest.mark.slow
@on_a_virtual_gpu
def test_a_wrapped_model_has_buckets_and_a_bare_one_is_refused(tmp_path: Path) -> None:
    args = ("plan", "--gpu", "h100-80gb", "--gpus", "8", "--memory", "4GiB", "--target-batch", "512", "--json")
    plan = json.loads(autoaccum(tmp_path, *args, "--parallel", "ddp", "--workload", "train.py:work").stdout)
    alone = json.loads(
        autoaccum(tmp_path, *args[:3], *args[5:], "--workload", "train.py:work").stdout  # one GPU
    )
    parameters = 4 * (999 * 1000 + 1000 * 999 + 999 + 3 * (2 * 3_000_000 + 4000))
    more = plan["memory"]["baseline_bytes"] - alone["memory"]["baseline_bytes"]
    assert abs(more / parameters - 1) < 0.15  # as much as the gradients, in segments
    assert abs(plan["evidence"]["this_process_peak_bytes"] / plan["evidence"]["measured_peak_bytes"] - 1) < 0.01
    refused = autoaccum(tmp_path, *args, "--workload", "train.py:work", code=2).stderr
    assert "--parallel fsdp or --parallel ddp" in refused


@pytest.mark.slow
@on_a_virtual_gpu
def test_two_kinds_of_gpus_are_planned_together(tmp_path: Path) -> None:
    out = autoaccum(
        tmp_path, "plan", "--gpu", "h100-80gb:6", "--gpu", "a100-40gb:2", "--parallel", "ddp", "--target-batch",
        "4M-tokens", "--workload", "train.py:large", "--json",
    ).stdout  # fmt: skip
    plan = Plan.from_json(out)
    assert plan.target_batch == sum(plan.shares) == 62_500 and plan.world_size == len(plan.ranks) == 8
    large, small = plan.ranks[0], plan.ranks[7]
    assert "H100" in large.device and "A100" in small.device and plan.shares[0] > 2 * plan.shares[7]
    for entry in (large, small):
        assert entry.predicted_peak_bytes <= entry.budget_bytes
        assert abs(entry.predicted_peak_bytes / (entry.measured_peak_bytes or 1) - 1) < 0.02
