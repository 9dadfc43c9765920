"""The benchmarks use planning's own functions: they have to run when these change."""

from __future__ import annotations

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
