"""Predicted against real memory, both ways: below the limit it trains, above it it doesn't.

One size of each of six models, five of them in the slow tests; `python -m benchmarks.prediction` does 8 to 128.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import prediction

SIZES = {
    "MLP": 16,
    "CNN with BatchNorm": 16,
    "char-GPT": 8,
    "LSTM": 8,
    "ViT": 16,
    "GRU tagger": 16,
}  # small: there a constant that is missing shows most
SLOW = ("char-GPT", "CNN with BatchNorm", "LSTM", "ViT", "GRU tagger")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SIZES])
def test_the_increment_is_predicted_and_the_peak_is_a_border(name: str) -> None:
    # A build without CUDA has a third of the base, in which the few MiB that it is off by weigh three times as much.
    limits = prediction.LIMITS if torch.version.cuda else (1.05, 0.95)
    (row,) = prediction.table([name], [SIZES[name]], limits)
    assert row["method"] == "replayed"
    assert abs(row["error %"]) < 3
    assert abs(row["peak's error %"]) < 0.5 or not torch.version.cuda
    assert [row[f"trains at {factor:.2f}"] for factor in limits] == [True, False]
    if torch.version.cuda:  # whose libraries commit much that they never touch
        assert row["resident peak MiB"] < row["measured peak MiB"]
