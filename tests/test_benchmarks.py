"""The benchmarks use planning's own functions: they have to run when these change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import speed, tuning


@pytest.mark.slow
def test_solving_is_timed_on_a_program_of_ten_thousand_events() -> None:
    found = speed._in_process("solving")
    assert found["events"] >= 10_000
    assert found["steps"] > 1 and found["seconds"] > 0


def test_the_interval_of_paired_ratios_covers_their_median_and_shrinks_with_pairs() -> None:
    noise = np.random.default_rng(1)
    widths, covered = [], 0
    for count in (30, 480):
        middle, low, high = tuning.interval(noise.lognormal(0.0, 0.1, count).tolist(), resamples=2000)
        assert low <= middle <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    for seed in range(60):  # the truth is 1
        _, low, high = tuning.interval(noise.lognormal(0.0, 0.1, 40).tolist(), resamples=500, seed=seed)
        covered += low <= 1 <= high
    assert covered >= 52
    assert tuning.interval([1.5] * 30) == (1.5, 1.5, 1.5)


def test_the_tuning_table_is_written_with_a_line_for_each_model(tmp_path: Path) -> None:
    ratios = {
        "grid / tuned": 1.01,
        "low": 0.97,
        "high": 1.04,
        "plain / tuned": 1.5,
        "plain low": 1.4,
        "plain high": 1.6,
    }
    row = {
        "model": "mlp", "grid": 36, "trials": 9, "tuned": "bf16, 32 x 4", "best of the grid": "bf16, 32 x 4",
        "plain s": 0.03, "tuned s": 0.02, "grid s": 0.0202, "windows": 40, "above 0.95": "yes",
        "changes numbers": "nothing", "took s": 66.0,
    }  # fmt: skip
    text = tuning.written([row | ratios], tmp_path)
    assert "| mlp | 9 of 36 | 0.0300 | 0.0200 | 0.0202 | 1.50 (1.40 to 1.60) | 1.010 (0.970 to 1.040) | yes |" in text
    assert "in 1.1 minutes" in text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".md"]
