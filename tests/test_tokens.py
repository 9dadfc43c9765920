"""Ragged sequences: longest first, within a budget of tokens, and the same gradient."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_train import (
    FP64,
    Capture,
    Rows,
    distance,
    gradients,
    one_thread,  # noqa: F401
    pad,
    plan_for,
    runner_for,
    seen,
    sequence,
    tagger,
    token_count,
    token_sum,
)
from hypothesis import given
from hypothesis import strategies as st
from plan_fields import changed_plan
from torch import nn
from torch.utils.data import DataLoader

from autoaccum import Plan, Runner, UsageError, Workload, fit_plan
from autoaccum.data import tree
from autoaccum.data.sample import at_longest
from autoaccum.data.tokens import longest_first, most_rows, padded_tokens, split_by_tokens
from autoaccum.process_memory import committed_bytes

LENGTHS = [int(n) for n in torch.randn(48, generator=torch.Generator().manual_seed(0)).exp().mul(6).clamp(1, 50)]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.integers(1, 20),
    st.one_of(st.none(), st.integers(1, 300)),
    st.integers(1, 3),
)
def test_every_sample_once_and_within_both_budgets(
    lengths: list[int], most_rows: int, most_tokens: int | None, least: int
) -> None:
    lengths.sort(reverse=True)
    sizes = split_by_tokens(lengths, most_rows, most_tokens, least)
    assert sum(sizes) == len(lengths)
    assert min(sizes) >= min(least, len(lengths))
    start = 0
    for size in sizes:
        if size > 2 * least:  # below that the smallest micro-batch allowed decides
            assert size <= max(most_rows, least)
            assert most_tokens is None or size * lengths[start] <= most_tokens
        start += size
    if least == 1 and most_tokens is None:
        assert len(sizes) == -(-len(lengths) // most_rows)


@given(st.permutations(range(len(LENGTHS))))
def test_longest_first_is_the_same_samples(indices: list[int]) -> None:
    ordered = longest_first(indices, LENGTHS)
    assert sorted(ordered) == sorted(indices)
    found = [LENGTHS[i] for i in ordered]
    assert found == sorted(found, reverse=True)


def trained(max_tokens: int | None, lengths: Any = LENGTHS, workers: int = 0) -> tuple[Any, Any, list[Any], list[Any]]:
    samples = [sequence(length, seed=i) for i, length in enumerate(LENGTHS)]
    shapes: list[tuple[int, int]] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        shapes.append(tuple(batch["ids"].shape))
        return token_sum(model, batch)

    model = tagger()
    work = Workload(
        model, pad(samples[:2], length=50), loss=loss, count=token_count, optimizer=Capture, lengths=lengths,
        max_tokens=max_tokens,
    )  # fmt: skip
    runner = runner_for(work, 16, 6)
    loader = DataLoader(Rows(samples), batch_size=7, collate_fn=pad, num_workers=workers)
    results = list(runner.epoch(loader))
    wants = [gradients(model, token_sum, pad(samples[i : i + 16])) for i in (0, 16, 32)]
    for got, want in zip(seen(runner), wants, strict=True):
        assert distance(got, want) <= FP64
    return runner, results, shapes, samples


def test_the_gradient_is_the_same_and_padding_is_less() -> None:
    _, results, shapes, _ = trained(None)
    assert [result.split for result in results] == [(6, 5, 5)] * 3
    per_window = [shapes[i : i + 3] for i in (0, 3, 6)]
    for window, start in zip(per_window, (0, 16, 32), strict=True):
        widths = [width for _, width in window]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] == max(LENGTHS[start : start + 16])
    padded = sum(rows * width for rows, width in shapes)
    _, _, unsorted, _ = trained(None, lengths=None)
    assert padded < 0.85 * sum(rows * width for rows, width in unsorted)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_budget_of_tokens_holds_as_well_as_that_of_rows(workers: int) -> None:
    _, results, shapes, _ = trained(60, workers=workers)
    assert all(rows <= 6 and (rows * width <= 60 or rows == 1) for rows, width in shapes)
    assert any(rows == 6 for rows, _ in shapes) and any(rows < 5 for rows, _ in shapes)
    assert all(result.samples == 16 for result in results)


def test_log_normal_lengths_are_padded_to_less_than_half() -> None:
    g = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in torch.randn(256, generator=g).mul(0.9).add(5.5).exp().clamp(1, 4096)]
    in_order = padded_tokens(lengths, (8,) * 32)
    ordered = [lengths[i] for i in longest_first(range(256), lengths)]
    assert padded_tokens(ordered, split_by_tokens(ordered, 8, None)) < 0.5 * in_order


def test_long_samples_that_do_not_fit_are_cut_without_cutting_the_short_ones() -> None:
    samples = [sequence(length, seed=i) for i, length in enumerate([50] * 4 + [2] * 12)]

    def loss(model: nn.Module, batch: Any) -> Any:
        if batch["ids"].numel() > 60:
            raise torch.OutOfMemoryError("short")
        return token_sum(model, batch)

    lengths = [len(sample["ids"]) for sample in samples]
    model = tagger()
    work = Workload(
        model, pad(samples[:2]), loss=loss, count=token_count, optimizer=Capture, lengths=lengths, max_tokens=100
    )
    runner = runner_for(work, 16, 6)
    want = gradients(model, token_sum, pad(samples))
    first, second = (next(iter(runner.epoch(DataLoader(Rows(samples), batch_size=4, collate_fn=pad)))) for _ in "ab")
    assert first.split == (1, 1, 1, 1, 6, 6) and first.retries == 2  # each piece of two long ones, and no other
    assert second.split == (1, 1, 1, 1, 6, 6) and second.retries == 0
    assert all(distance(got, want) <= FP64 for got in seen(runner))
    assert runner.micro_batch == 6


@pytest.mark.parametrize("longest", [8, 9])
def test_data_longer_than_the_planned_sample_is_said_at_once(longest: int, caplog: pytest.LogCaptureFixture) -> None:
    work = Workload(tagger(), pad([sequence(8, seed=0)] * 2), loss=token_sum, optimizer=Capture, lengths=[3, longest])
    runner_for(work, 4, 2)
    assert ("The longest sample has 9" in caplog.text) == (longest == 9)


def test_lengths_need_a_map_style_loader_and_a_budget_needs_lengths() -> None:
    samples = [sequence(3, seed=i) for i in range(4)]
    work = Workload(tagger(), pad(samples), loss=token_sum, count=token_count, optimizer=Capture, lengths=[3] * 4)
    runner = runner_for(work, 4, 2)
    with pytest.raises(UsageError, match="map-style"):
        list(runner.epoch([pad(samples)]))
    with pytest.raises(UsageError, match="max_tokens"):
        Workload(tagger(), pad(samples), max_tokens=100)


# --- planned at the longest ----------------------------------------------------------------------------------------


def test_a_plan_is_made_at_the_longest_that_the_data_has() -> None:
    """The first batch is seldom the longest: planned by it, the longest would run out of memory in mid-epoch."""
    samples = [sequence(length, seed=i) for i, length in enumerate([8] * 15 + [50])]
    given = Workload(
        tagger(), pad(samples[:3]), loss=token_sum, count=token_count, optimizer=Capture,
        lengths=[len(each["ids"]) for each in samples],
    )  # fmt: skip
    plan = fit_plan(given, target_batch=16, max_micro_batch=6, verify=False, budget="4GiB")
    longest = replace(given, sample=pad(samples[13:]), lengths=None)
    same = fit_plan(longest, target_batch=16, max_micro_batch=6, verify=False, budget="4GiB")
    assert (
        [leaf.trailing_shape for leaf in plan.provenance.signature]
        == [(50,), (50,)]
        == [s.trailing_shape for s in same.provenance.signature]
    )
    assert [row.later_bytes for row in plan.memory.peaks] == [row.later_bytes for row in same.memory.peaks]
    assert any("The sample has 8 positions, the longest by lengths= has 50" in note for note in plan.notes)
    assert not any("positions" in note for note in same.notes)
    runner = Runner(given, plan)
    (result,) = runner.epoch(DataLoader(Rows(samples), batch_size=4, collate_fn=pad))
    assert result.split == (6, 5, 5)


@pytest.mark.parametrize(
    ("sample", "shapes"),
    [
        (torch.ones(3, 8, dtype=torch.long), {"batch": (3, 20)}),
        (
            {"ids": torch.ones(3, 8).long(), "x": torch.ones(3, 8, 32)},
            {"batch['ids']": (3, 20), "batch['x']": (3, 20, 32)},
        ),
        ((torch.ones(3, 8, 16), torch.ones(3).long()), {"batch[0]": (3, 20, 16), "batch[1]": (3,)}),
        ((torch.ones(3, 20, 16), torch.ones(3).long()), {"batch[0]": (3, 20, 16), "batch[1]": (3,)}),
        ((torch.ones(3, 4, 20), torch.ones(3, 20).long()), {"batch[0]": (3, 4, 20), "batch[1]": (3, 20)}),
    ],
    ids=["ids", "features beside", "features alone", "long enough", "channels first"],
)  # fmt: skip
def test_a_sample_is_lengthened_along_its_positions(sample: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    made, message = at_longest(Workload(tagger(), sample, lengths=[3, 20, 5]))
    assert {path: tuple(leaf.shape) for path, leaf in tree.leaves(made)} == shapes
    assert ("planned at 20" in message) == (made is not sample)
    assert at_longest(Workload(tagger(), sample)) == (sample, "")


@pytest.mark.parametrize(
    "sample",
    [
        {"ids": torch.ones(3, 8).long(), "labels": torch.ones(3, 6).long()},
        {"ids": torch.ones(3, 8).long(), "pairs": torch.ones(3, 8, 8, dtype=torch.bool)},
    ],
    ids=["two lengths", "pairs"],
)
def test_a_sample_that_cannot_be_lengthened_is_asked_for(sample: Any) -> None:
    with pytest.raises(UsageError, match="Give a sample with 20 positions"):
        fit_plan(Workload(tagger(), sample, lengths=[3, 20, 5]), target_batch=4)


# --- a budget of tokens, planned -----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 30))
def test_no_micro_batch_can_have_more_rows_than_the_shortest_samples_allow(
    lengths: list[int], tokens: int, samples: int
) -> None:
    rows = most_rows(lengths, tokens, samples)
    window = sorted(lengths)[:samples][::-1]
    assert 1 <= rows <= min(samples, len(lengths))
    assert max(split_by_tokens(window, len(window), tokens)) <= rows
    assert rows == 1 or rows * sorted(lengths)[rows - 1] <= tokens


class PerRow(nn.Module):
    """Takes memory by token, or by row alone."""

    def __init__(self, row_bytes: int) -> None:
        super().__init__()
        self.row_bytes, self.embedding = row_bytes, nn.Embedding(11, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        spare = torch.zeros(len(ids) * self.row_bytes, dtype=torch.uint8)
        out = self.embedding(ids).sum(-1).square()
        if out.requires_grad:  # there until the backward
            out.register_hook(lambda grad, kept=spare: grad)
        return out


@pytest.mark.parametrize("row_bytes", [0, 8 << 20], ids=["by token", "by row"])
def test_short_samples_come_in_as_many_rows_as_were_tried(row_bytes: int) -> None:
    lengths = [64] * 4 + [4] * 28
    work = Workload(
        PerRow(row_bytes), torch.ones(2, 64, dtype=torch.long), lengths=lengths, max_tokens=128, optimizer=Capture,
        loss=lambda m, b: (m(b).sum(), b.numel()),
    )  # fmt: skip
    plan = fit_plan(
        work, target_batch=32, check=False, train_in_new_process=True, budget=committed_bytes() + (120 << 20)
    )
    assert plan.micro_batch == 2 and plan.schedule.max_tokens == 128  # two of the longest
    if row_bytes:  # 28 rows of 4 tokens would take 224 MiB
        assert plan.schedule.max_rows is None or 2 < plan.schedule.max_rows <= 14
    else:
        assert plan.schedule.max_rows == 28
    runner = Runner(work, plan)
    loader = DataLoader(Rows([torch.ones(n, dtype=torch.long) for n in lengths]), batch_size=4, collate_fn=torch.stack)
    (result,) = runner.epoch(loader)
    most = plan.schedule.max_rows or 2
    rest = [most] * (28 // most) + [28 % most] * (28 % most > 0)
    assert result.split == (2, 2, *rest)
    assert Plan.from_json(plan.to_json()) == plan


def test_short_samples_that_do_not_fit_are_cut_without_cutting_the_long_ones() -> None:
    samples = [sequence(length, seed=i) for i, length in enumerate([50] * 2 + [2] * 14)]

    def loss(model: nn.Module, batch: Any) -> Any:
        if len(batch["ids"]) > 6:
            raise torch.OutOfMemoryError("short")
        return token_sum(model, batch)

    model, lengths = tagger(), [len(sample["ids"]) for sample in samples]
    work = Workload(
        model, pad(samples[:2]), loss=loss, count=token_count, optimizer=Capture, lengths=lengths, max_tokens=100
    )
    plan = changed_plan(plan_for(work, 16, 2), max_tokens=100, max_rows=14)
    runner = Runner(work, plan)
    (result,) = runner.epoch(DataLoader(Rows(samples), batch_size=4, collate_fn=pad))
    assert result.split == (2, 4, 4, 3, 3) or (result.split[0] == 2 and max(result.split) <= 6)
    assert distance(seen(runner)[-1], gradients(model, token_sum, pad(samples))) <= FP64
    assert runner.micro_batch == 2


def test_a_checkpoint_keeps_the_limits_that_an_out_of_memory_lowered() -> None:
    samples = [sequence(length, seed=i) for i, length in enumerate([50] * 2 + [2] * 14)]

    def loss(model: nn.Module, batch: Any) -> Any:
        if len(batch["ids"]) > 6 or batch["ids"].numel() > 60:  # both of short samples and of long ones too many
            raise torch.OutOfMemoryError("too many")
        return token_sum(model, batch)

    def made() -> Runner:
        model, lengths = tagger(), [len(sample["ids"]) for sample in samples]
        work = Workload(
            model, pad(samples[:2]), loss=loss, count=token_count, optimizer=Capture, lengths=lengths, max_tokens=100
        )
        return Runner(work, changed_plan(plan_for(work, 16, 4), max_tokens=100, max_rows=14))

    first, second = made(), made()
    (lowered,) = first.epoch(DataLoader(Rows(samples), batch_size=4, collate_fn=pad))
    assert lowered.retries
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    splits = [
        next(iter(each.epoch(DataLoader(Rows(samples), batch_size=4, collate_fn=pad)))) for each in (first, second)
    ]
    assert splits[0].split == splits[1].split and not splits[1].retries
    (again,) = made().epoch(DataLoader(Rows(samples), batch_size=4, collate_fn=pad))
    assert again.retries  # without the checkpoint they are found anew
