"""The comparison of gradients still runs, and tells a wrong gradient from a right one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_train import one_thread  # noqa: F401

from benchmarks import peer_gradients
from benchmarks.peer_gradient_cases import CASES, whole_gradients
from benchmarks.peer_gradient_trainers import TRAINERS, Done, Trainer

BY_TITLE = {case.title: case for case in CASES}
RAGGED = BY_TITLE["ragged: 8, 8, 8, 4, 2, 1, 1, 1 tokens"]
TAIL = BY_TITLE["last window of 1 micro-batch in 4"]


def test_windows_are_held_against_their_own_whole_batch():
    first, tail = whole_gradients(TAIL)
    assert peer_gradients.error_of([first, tail], [first, tail]) == 0
    assert peer_gradients.error_of([first, tail / 4], [first, tail]) == pytest.approx(0.75)
    assert peer_gradients.error_of([first], [first, tail]) == math.inf
    assert peer_gradients.error_of([first, tail * torch.nan], [first, tail]) == math.inf


def test_autoaccum_is_right_where_it_says_so_and_says_where_not():
    (mean, counted) = peer_gradients.rows_of(RAGGED, ["autoaccum"])
    assert not mean["right"] and mean["said"].startswith("not exact")
    assert counted["right"] and counted["how"] == "(sum, count)" and counted["said"].startswith("exact")
    assert [row["right"] for row in peer_gradients.rows_of(TAIL, ["autoaccum"])] == [True, True]


@pytest.mark.parametrize(("name", "wrong"), [("Accelerate", True), ("Hugging Face Trainer", False)])
def test_a_peer_by_its_own_package(name, wrong):
    for package in ("accelerate", "transformers"):
        pytest.importorskip(package)
    usual, *others = peer_gradients.rows_of(TAIL, [name])
    assert float(usual["error"]) == (pytest.approx(0.75, abs=0.01) if wrong else pytest.approx(0, abs=1e-12))
    assert [row["right"] for row in others] == [True]


def test_the_table_shows_what_is_wrong_and_what_there_is_for_it(monkeypatch):
    def run(case, how):
        wanted = whole_gradients(case)
        return Done(wanted if how else [gradient / 4 for gradient in wanted], "" if how else "not exact: it is a sum")

    monkeypatch.setitem(TRAINERS, "Some trainer", Trainer("torch", lambda case: [None, "its option"], run))
    monkeypatch.setitem(TRAINERS, "Another", Trainer("torch", lambda case: [], run))
    text = peer_gradients.table(peer_gradients.rows_of(TAIL, ["Some trainer", "Another"]))
    assert text.splitlines()[-1] == (
        f"| {TAIL.title} | **7.5e-01**; 0.0e+00 with its option; *`autoaccum check`: not exact* |"
    )
