"""What grows in steps and ends beyond the last recording: a size is the largest only if it fits with every end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.phases import FIRST
from autoaccum.planning import solution
from autoaccum.planning.cuda_certainty import MAX_ENDS
from autoaccum.planning.evidence import Evidence
from autoaccum.planning.predictor_cuda import CudaPredictor
from autoaccum.planning.schedule import Guess
from autoaccum.simulation import saturation
from autoaccum.simulation.program import Step, StepProgram
from autoaccum.simulation.recording import Recording
from autoaccum.simulation.scaling import Rule
from autoaccum.simulation.solver import Solution

MiB = 1 << 20
TILES = Rule(0, per_sample=MiB, unit_bytes=8 * MiB)
ROWS = Rule(0, per_sample=16 * MiB, samples_per_step=16)


def program(*rules: Rule, at: int = 100) -> StepProgram:
    return StepProgram(at, (), {FIRST: tuple(Step(i + 1, rule, 0) for i, rule in enumerate(rules))}, {})


def sizes(found: StepProgram, n: int) -> list[int]:
    return [step.rule.at(n) for step in found.phases[FIRST] if step.rule is not None]


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (Rule(5 * MiB), False),
        (Rule(0, per_sample=MiB), False),
        (TILES, True),
        (ROWS, True),
        (TILES._replace(max_bytes=64 * MiB), False),  # it has ended
        (Rule(0, per_sample=64, unit_bytes=1024), False),  # too small to matter
    ],
)
def test_large_blocks_that_step_and_have_not_ended_may_end(rule: Rule, steps: bool) -> None:
    assert saturation.may_saturate(program(rule)) is steps
    assert (saturation.steps_until(program(rule), 200) > 0) is steps
    assert (sizes(saturation.saturated_after(program(rule), 0), 1000) != [rule.at(1000)]) is steps


@given(st.sampled_from([TILES, ROWS]), st.integers(0, 20), st.integers(1, 400))
def test_an_end_is_so_many_steps_beyond_the_recording_and_changes_nothing_below(rule: Rule, steps: int, n: int) -> None:
    one = 8 * MiB if rule is TILES else 16 * MiB
    assert sizes(saturation.saturated_after(program(rule), steps), n) == [min(rule.at(n), rule.at(100) + steps * one)]


@given(st.integers(101, 400))
def test_with_as_many_steps_as_a_size_takes_nothing_has_ended(n: int) -> None:
    found = program(TILES, ROWS, Rule(3 * MiB))
    assert sizes(saturation.saturated_after(found, saturation.steps_until(found, n)), n) == sizes(found, n)


def predictor(of: StepProgram) -> CudaPredictor:
    recordings = [Recording(n, (), 2, 0.0) for n in (50, of.recorded_at)]
    evidence = Evidence(recordings=recordings, _program=of)
    none = cast(Any, None)
    return CudaPredictor(none, none, evidence, 0, none, 0)


@pytest.mark.parametrize(("n", "asked"), [(100, 1), (104, 1), (105, 2), (130, 1 + 4), (1000, 1 + MAX_ENDS)])
def test_every_end_between_the_last_recording_and_a_size_is_asked(
    monkeypatch: pytest.MonkeyPatch, n: int, asked: int
) -> None:
    seen: list[list[int]] = []

    def fits(self: CudaPredictor, split: tuple[int, ...]) -> bool:
        seen.append(sizes(self.evidence.program(), split[0]))
        return True

    monkeypatch.setattr(CudaPredictor, "fits", fits)
    assert predictor(program(TILES)).fits_surely((n, n))
    assert len(seen) == asked == len(set(map(tuple, seen)))
    assert seen[0] == [TILES.at(n)]


@pytest.mark.parametrize("refusing", range(4))
def test_a_size_that_one_end_leaves_no_room_for_is_not_sure_to_fit(
    monkeypatch: pytest.MonkeyPatch, refusing: int
) -> None:
    calls = iter(range(100))
    monkeypatch.setattr(CudaPredictor, "fits", lambda self, split: next(calls) != refusing)
    assert not predictor(program(TILES)).fits_surely((130, 130))


@pytest.mark.parametrize(
    ("most", "may_saturate", "at_least"),
    [(104, False, 100), (103, False, 75), (104, True, 75), (112, True, 100)],
)
def test_where_a_little_more_does_not_fit_one_step_more_is_considered(
    monkeypatch: pytest.MonkeyPatch, most: int, may_saturate: bool, at_least: int
) -> None:
    seen = SimpleNamespace(
        request=SimpleNamespace(samples=298, least=1),
        evidence=Evidence(),
        may_saturate=may_saturate,
        fits=lambda split: split[0] <= most,
    )
    monkeypatch.setattr(solution, "solve", lambda predictor: Solution((100, 99, 99), 1))
    assert solution.guess(cast(Any, seen)) == Guess(100, at_least)
    seen.request.samples = None  # nothing is asked for but the largest
    assert solution.guess(cast(Any, seen)) == Guess(100, 100)
