"""A little of what `scripts/fuzz` does: mutated plan files, checkpoints and command lines."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch

from autoaccum.checkpoint import write_checkpoint
from autoaccum.plan import Plan

SEEDS = 80


def test_mutated_plans_are_refused_or_can_be_told() -> None:
    beginnings = fuzz.plan_texts()
    assert all(fuzz.check_plan(json.dumps(each)) for each in beginnings)
    accepted = 0
    for seed in range(SEEDS):
        try:
            accepted += fuzz.check_plan(fuzz.plan_text(seed, beginnings))
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert SEEDS / 20 < accepted < SEEDS * 0.8  # else it tests nothing


def changed(path: tuple[Any, ...], value: Any) -> str:
    data = fuzz.plan_texts()[0]
    where: Any = data
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("peaks", 0, "micro_batch"), 0),
        (("smallest_micro_batch",), 0),
        (("times", 0, "round_seconds", 0), 0.0),
        (("times", 0, "step_seconds"), 1e-320),
        (("budget", "bytes"), 10**40),
        (("peaks", 0, "later_bytes"), -1),
        (("window_seconds",), float("-inf")),
        (("fresh_pages_share",), float("nan")),
        (("phases",), {}),
        (("timeline", 0, "bytes"), []),
        (("configuration",), {"precision": "fp7"}),
        (("history_bytes",), 7),
    ],
)
def test_what_would_break_the_telling_is_refused(path: tuple[Any, ...], value: Any) -> None:
    text = changed(path, value)
    if path == ("history_bytes",):
        text = text.replace('"history_bytes": "a reason', '"other": "a reason')
    assert not fuzz.check_plan(text)


@pytest.mark.parametrize(("path", "value"), [(("notes", 0), "\ud800"), (("fingerprint",), {"\ud800": "", "model": ""})])
def test_half_a_character_can_be_told(path: tuple[Any, ...], value: Any) -> None:
    assert fuzz.check_plan(changed(path, value))


def test_spoilt_checkpoints_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole.pt", {"runner": {"model": torch.arange(9.0)}, "for": {}, "place": {}})
    content = (tmp_path / "whole.pt").read_bytes()
    for seed in range(300):
        fuzz.check_checkpoint(seed, content, tmp_path / "spoilt.pt")


def test_command_lines_are_accepted_or_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz.command_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    accepted = sum(fuzz.check_command(fuzz.command_line(seed)) for seed in range(100))
    assert 5 < accepted < 95


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(Exception, match="can't be read"):
        Plan.load("/dev/zero")


def test_a_plan_can_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    text = json.dumps(fuzz.plan_texts()[1])
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text))
    writer.start()
    assert Plan.load(tmp_path / "pipe").target_batch == 512
    writer.join()
