"""A bad batch in the middle of an epoch: named by its samples, left out where that is wanted, and the epoch goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
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
    runner_for,
    seen,
    sequence,
    tagger,
    token_sum,
)
from torch.utils.data import DataLoader

from autoaccum import BatchError, Runner, UsageError, Workload

LONG = 9  # the sample that is longer than the plan knows
SAMPLES = [sequence(6 if i != LONG else 9, i) for i in range(20)]


def runner() -> Runner:
    work = Workload(tagger(), pad(SAMPLES[:4]), loss=token_sum, optimizer=Capture)
    return runner_for(work, 8, 2)


def loaders(kind: str) -> Any:
    if kind == "map-style":
        return DataLoader(Rows(SAMPLES), batch_size=5, collate_fn=pad)
    batches = [pad(SAMPLES[start : start + 2]) for start in range(0, 20, 2)]
    return iter(batches) if kind == "generator" else batches


KINDS = pytest.mark.parametrize("kind", ["map-style", "iterable", "generator"])


@KINDS
def test_an_epoch_goes_on_behind_a_bad_batch(kind: str) -> None:
    trained = runner()
    epoch = trained.epoch(loaders(kind))
    assert next(epoch).samples == 8
    with pytest.raises(BatchError, match=rf"holds samples {LONG - 1} to {LONG} of the") as refused:
        next(epoch)
    assert "Plan again" in refused.value.hint
    assert next(epoch).samples == 4
    assert next(epoch, None) is None
    expected = [gradients(tagger(), token_sum, pad(SAMPLES[a:b])) for a, b in ((0, 8), (16, 20))]
    assert max(distance(*pair) for pair in zip(seen(trained), expected, strict=True)) < FP64


@KINDS
def test_skipping_leaves_out_the_micro_batch_and_trains_the_rest(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    trained = runner()
    results = list(trained.epoch(loaders(kind), on_bad_batch="skip"))
    assert [result.samples for result in results] == [8, 6, 4]
    assert f"A micro-batch of 2 samples is left out: batch['ids'] is torch.int64 of (9,)" in caplog.text  # noqa: F541
    assert f"samples {LONG - 1} to {LONG} of the" in caplog.text
    rest = [SAMPLES[i] for i in range(8, 16) if i not in (LONG - 1, LONG)]
    expected = [gradients(tagger(), token_sum, pad(rows)) for rows in (SAMPLES[:8], rest, SAMPLES[16:])]
    assert max(distance(*pair) for pair in zip(seen(trained), expected, strict=True)) < FP64


def test_shuffled_samples_are_named_by_their_own_indices() -> None:
    loader = DataLoader(Rows(SAMPLES), batch_size=5, collate_fn=pad, sampler=[3, 17, 12, LONG, 5, 6, 7, 8])
    with pytest.raises(BatchError, match=rf"samples 12, {LONG} of the dataset"):
        list(runner().epoch(loader))


@pytest.mark.parametrize("on_bad_batch", ["raise", "skip"])
def test_batches_that_cannot_be_cut_are_passed_over_too(on_bad_batch: str) -> None:
    def batches() -> Iterator[Any]:
        yield pad(SAMPLES[:6])
        yield {"ids": torch.zeros(3, 6, dtype=torch.int64), "labels": torch.zeros(2, 6, dtype=torch.int64)}
        yield pad(SAMPLES[10:12])
        yield {"ids": "nothing"}

    trained, errors, sizes = runner(), list[str](), list[int]()
    epoch = trained.epoch(batches(), on_bad_batch=on_bad_batch)
    while True:
        try:
            sizes.append(next(epoch).samples)
        except StopIteration:
            break
        except BatchError as error:
            errors.append(str(error))
    assert sizes == [8]
    expected = ["sample 1 of the loader's batches", "sample 3 of the loader's batches"] * (on_bad_batch == "raise")
    assert len(errors) == len(expected) and all(part in text for part, text in zip(expected, errors, strict=True))
    rows = pad([*SAMPLES[:6], *SAMPLES[10:12]])
    assert distance(seen(trained)[0], gradients(tagger(), token_sum, rows)) < FP64


def test_a_window_of_bad_batches_only_is_left_out_whole(caplog: pytest.LogCaptureFixture) -> None:
    batches = [pad(SAMPLES[:8]), pad(SAMPLES[8:16], 9), pad(SAMPLES[12:20])]
    trained = runner()
    before = copy.deepcopy(trained.context.model.state_dict())
    assert [result.number for result in trained.epoch(batches, on_bad_batch="skip")] == [1, 2]
    assert "A window is left out" in caplog.text and before.keys()
    # After a resume, as many windows are passed over as were trained: the bad one isn't one of them.
    assert [result.samples for result in trained.epoch(batches, skip=1, on_bad_batch="skip")] == [8]
    assert distance(seen(trained)[-1], gradients(tagger(), token_sum, batches[2])) < FP64


def test_a_choice_that_is_not_known_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="on_bad_batch 'ignore'"):
        runner().epoch([], on_bad_batch="ignore")
