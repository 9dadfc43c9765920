"""Without a target, the size of the training data ends the search; with one, a target beyond it is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from autoaccum import Plan, Workload, fit_plan
from autoaccum.planning.resolved_request import dataset_samples

DATA = TensorDataset(torch.randn(300, 8), torch.zeros(300, dtype=torch.long))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("planning reads no data")


def plan(loader: Any = None, **how: Any) -> Plan:
    work = Workload(nn.Linear(8, 3), (torch.randn(4, 8), torch.zeros(4, dtype=torch.long)), loader=loader)
    return fit_plan(work, check=False, verify=False, budget="8GiB", timing_seconds=0, **how)


def test_without_a_target_the_data_ends_the_search() -> None:
    found = plan(DataLoader(DATA, batch_size=16))
    assert (found.split, found.schedule.largest_is_capped, found.request.max_micro_batch) == ((300,), True, None)
    assert any("The data has 300 samples" in note for note in found.notes)


def test_a_target_beyond_the_data_is_said() -> None:
    found = plan(DataLoader(DATA, batch_size=16), target_batch=512)
    assert sum(found.split) == 512
    assert any("300 samples, fewer than the target of 512" in note for note in found.notes)
    assert not any("The data has" in note for note in plan(DataLoader(DATA), target_batch=64).notes)


def test_without_a_target_or_a_size_the_plan_says_so() -> None:
    found = plan(DataLoader(Stream()), max_micro_batch=1000)
    assert found.split == (1000,) and found.request.max_micro_batch == 1000
    assert any("is unknown: 1,000 samples fit" in note for note in found.notes)


@pytest.mark.parametrize(
    ("loader", "samples"),
    [
        (DataLoader(DATA, batch_size=16, drop_last=True), 288),
        ([(torch.zeros(5, 8), torch.zeros(5))] * 3, 15),
        (lambda: DataLoader(DATA), None),  # a function is called by training only
        (iter([]), None),
        ([torch.tensor(1.0)], None),  # no batch: training says so
        ([], None),
    ],
)
def test_a_size_is_read_without_reading_data(loader: Any, samples: int | None) -> None:
    assert dataset_samples(Workload(nn.Linear(8, 3), loader=loader)) == samples
    known = Workload(nn.Linear(8, 3), loader=loader, lengths=[3] * 300)
    assert dataset_samples(known) == (samples or 300)
