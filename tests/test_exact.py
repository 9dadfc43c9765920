"""The verdict on losses whose answer is known, on easy and on hard samples; and that finding it leaves no trace."""

from __future__ import annotations

import torch
import pytest
from exact_cases import CASES, Case
from helpers_train import distance, gradients, one_thread  # noqa: F401

from autoaccum import Workload, exact

SAMPLES = pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])


@SAMPLES
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(case: Case, hard: bool) -> None:
    found = exact.check(Workload(case.model(), case.sample(hard), loss=case.loss, count=case.count))
    assert found.kind == case.kind, found
