"""What is shown of texts from elsewhere: one line, and nothing unseen."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import made_up_plan

from autoaccum.budget import Budget, BudgetItem
from autoaccum.cli.terminal import show_error
from autoaccum.errors import AutoaccumError
from autoaccum.files.escape import MAX_CHARACTERS, lines, one_line
from autoaccum.plan import LeafForm, Plan
from autoaccum.processes.child import _described
from autoaccum.reporting import render
from autoaccum.reporting.explain import explain, summary
from autoaccum.tuning.result import MEASURED, Trial, TuningResult
from autoaccum.tuning.result import summary as of_trials

EVIL = "x\x1b[2K\x07\r\nexactness   forged (tested on 8 samples)\u202eexe\u2066\u200b\ud800\x9b2K"
FORGED = "\nexactness   forged (tested"
RAW = {"Cc", "Cs", "Zl", "Zp"}


def unseen(text: str) -> str:
    """Every character that does something and isn't seen; our own line breaks left out."""
    return "".join(c for c in text if (unicodedata.category(c) in RAW and c != "\n") or c in "\u202e\u2066\u200b")


@given(st.text())
def test_a_line_is_one_line_and_of_nothing_unseen(text: str) -> None:
    shown = one_line(text)
    assert not unseen(shown) and "\n" not in shown
    shown.encode()  # a lone surrogate has no UTF-8
    assert one_line(shown) == shown


@pytest.mark.parametrize(
    "text", ["größe", "训练集/模型", "عربى فارسی می‌خواهم", "क्‍ष", "👩‍👩‍👧 3", "C:\\new\\x1b", "a  b"]
)
def test_what_is_seen_stays(text: str) -> None:
    assert one_line(text) == text


def test_what_is_not_seen_is_named() -> None:
    assert one_line("a\x1b[0m\n\t\u202e\ud800") == "a\\x1b[0m\\n\\t\\u202e\\ud800"
    assert one_line("pass\u200dword") == "pass\\u200dword"
    assert one_line("x" * 10**6) == "x" * MAX_CHARACTERS + "... (cut: 1,000,000 characters)"
    assert len(one_line("\x1b" * 10**6)) < MAX_CHARACTERS + 40
    assert lines("one\x07\ntwo") == "one\\x07\ntwo" and lines("a\n" * 9, most=2).endswith("... (cut: 10 lines)")


PLACES: dict[str, Callable[[], Plan]] = {
    "notes": lambda: made_up_plan(notes=(EVIL,)),
    "device": lambda: made_up_plan(device_name=EVIL),
    "exactness": lambda: made_up_plan(exactness=EVIL),
    "binding_constraint": lambda: made_up_plan(binding_constraint=EVIL),
    "method": lambda: made_up_plan(method=EVIL),
    "workload": lambda: made_up_plan(workload=EVIL),
    "reasons": lambda: made_up_plan(reasons=dict.fromkeys(made_up_plan().provenance.reasons, EVIL) | {"times": EVIL}),
    "names": lambda: made_up_plan(fingerprint={EVIL: EVIL}, environment={EVIL + "!": EVIL}),
    "budget": lambda: made_up_plan(budget=Budget(2**31, 2**31, 0, (BudgetItem(EVIL, 2**31, EVIL),), EVIL)),
    "signature": lambda: made_up_plan(signature=(LeafForm(EVIL, EVIL, ()),)),
    "composition": lambda: made_up_plan(composition={EVIL: {EVIL: 1}}),
    "configuration": lambda: made_up_plan(configuration={EVIL: EVIL, "precision": "bf16"}),
    "timeline": lambda: made_up_plan(timeline=(replace(made_up_plan().memory.timeline[0], phase=EVIL),)),
}
FORMS: dict[str, Callable[[Plan], str]] = {
    "summary": summary,
    "explain": explain,
    "notebook": lambda plan: plan._repr_html_(),
    **{suffix: lambda plan, suffix=suffix: render(plan, suffix) for suffix in (".md", ".html", ".csv", ".json")},  # type: ignore[misc]
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_no_text_of_a_plan_forges_a_line_or_reaches_the_terminal(place: str, form: str) -> None:
    words = FORMS[form](PLACES[place]())
    assert not unseen(words)
    assert FORGED not in words
    assert words.encode()


def test_nor_does_one_of_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    best = Trial(0, MEASURED, {"own": EVIL}, 8, 1, 0.5, 3, 100, EVIL, {"own": EVIL})
    tuned = TuningResult(made_up_plan(), (best, replace(best, state="failed", number=1)), "seconds", 4, (EVIL,), 0, 1.0)
    for words in (tuned.table(), of_trials(tuned), tuned.to_json()):
        assert not unseen(words) and FORGED not in words


@pytest.mark.parametrize("with_traceback", [True, False])
def test_nor_does_an_error_of_the_users(with_traceback: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def raised() -> dict[str, Any]:
        try:
            raise ValueError(EVIL)
        except ValueError as error:
            return _described(error)

    words = raised()
    error = AutoaccumError(words["what"] + EVIL, words["why"], words["hint"] + EVIL)
    error.add_note(words["traceback"])
    show_error(error, with_traceback=with_traceback)
    err = capsys.readouterr().err
    assert not unseen(err) and ("\nexactness" in err) is with_traceback  # a traceback has the message's own lines
    why = AutoaccumError("The library doesn't compile.", "The last it said:\n100\nno such thing", "CC=gcc")
    show_error(why, with_traceback=False)
    assert capsys.readouterr().err.endswith("\n  The last it said:\n  100\n  no such thing\n  CC=gcc\n")
