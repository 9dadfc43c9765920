"""Predicted against real memory, both ways: below the limit it trains, above it it doesn't.

One size of each of six models, four of them in the slow tests; `python -m benchmarks.prediction` does 8 to 128.
"""

from __future__ import annotations

import pytest

from benchmarks import prediction

SIZES = {
    "MLP": 16,
    "CNN with BatchNorm": 16,
    "char-GPT": 8,
    "LSTM": 8,
    "ViT": 16,
    "GRU tagger": 16,
}  # small: there a constant that is missing shows most
SLOW = ("CNN with BatchNorm", "LSTM", "ViT", "GRU tagger")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SIZES])
def test_the_increment_is_predicted_and_the_peak_is_a_border(name: str) -> None:
    (row,) = prediction.table([name], [SIZES[name]])
    assert row["method"] == "replayed"
    assert abs(row["error %"]) < 3
    assert abs(row["predicted peak MiB"] / row["measured peak MiB"] - 1) < 0.015
    assert row["trains at 1.03"] is True
    assert row["trains at 0.97"] is False
    assert row["resident peak MiB"] < row["measured peak MiB"]
