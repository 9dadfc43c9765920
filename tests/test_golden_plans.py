"""Plans on stored recordings come to the same numbers, and say the same, as when they were last looked at.

Where a change is meant: `python -m tests.golden --write`, read what it says, and commit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from autoaccum.devices.virtual import available
from tests import golden

REASON = available()
AGAIN = "\nIf that is meant: python -m tests.golden --write"


@pytest.fixture(scope="module")
def found() -> Any:
    return golden.as_json(golden.answers())


def test_numbers_are_as_they_were(found: Any) -> None:
    text = golden.difference(golden.read_json(golden.NUMBERS), found[0])
    assert not text, text + AGAIN


def test_words_and_json_are_as_they_were(found: Any) -> None:
    text = golden.difference(golden.read_json(golden.WORDS), found[1])
    assert not text, text + AGAIN


def test_the_questions_have_answers_of_every_kind(found: Any) -> None:
    numbers = found[0]
    plans = [each for each in numbers.values() if "split" in each]
    assert len(numbers) == len(list(golden.questions())) >= 40
    assert sum("missing_bytes" in each for each in numbers.values()) >= 2
    assert any(any(plan["retries"]) for plan in plans) and any(plan["by_hand_peak"] for plan in plans)
    assert {plan["steps"] > 1 for plan in plans} == {True, False}
    assert any(max(plan["split"]) - min(plan["split"]) > 1 for plan in plans)


def test_one_number_that_moves_is_seen_and_named(found: Any) -> None:
    moved = golden.as_json(found[0])
    name = next(name for name, each in moved.items() if "split" in each)
    moved[name]["timeline"][1][3][5] += 1
    assert f"{name} / timeline[1][3][5]: " in golden.difference(found[0], moved)
    assert (
        golden.difference({"a": 1}, {"a": 1.0}) and golden.difference([1], [1, 2]) and golden.difference({}, {"b": 0})
    )
    assert not golden.difference(found[0], found[0])


def test_a_plan_without_its_explanation_has_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {name: golden.read_source(name) for name in ("llama", "cnn")}
    asked = (each for each in golden.questions() if each.source in sources and each.target)
    question = next(each for each in asked if sources[each.source]["device"] != "cpu")
    data = sources[question.source]
    evidence = golden.observed_of(data, question.setting)
    whole = golden.plan_of(question, data, evidence)
    monkeypatch.setattr(golden, "ResolvedRequest", partial(golden.ResolvedRequest, explained=False))
    short = golden.plan_of(question, data, evidence)
    assert whole.on_cuda and whole.schedule.largest_without_retries and len(whole.memory.peaks) > 10
    assert short.schedule.largest_without_retries is None and len(short.memory.peaks) <= len({*short.split}) + 2
    assert short.schedule.split == whole.schedule.split
    assert short.predicted_peak_bytes == whole.predicted_peak_bytes and short.memory.phases == whole.memory.phases


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_whole_plans_on_the_virtual_gpu_are_as_they_were() -> None:
    stored, now = golden.read_json(golden.WHOLE), golden.whole_plans()
    if stored["torch"] != str(torch.__version__):
        pytest.skip(f"torch {torch.__version__} may allocate otherwise than {stored['torch']}, which it was made with")
    text = golden.difference(stored, now)
    assert not text, text + f"{AGAIN} --virtual"
