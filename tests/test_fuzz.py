"""A little of what `scripts/fuzz` does: mutated plan files, checkpoints and command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from plan_fields import changed_json

from autoaccum.plan import Plan
from autoaccum.runner.checkpoint import write_checkpoint

SEEDS = 80


def test_mutated_plans_are_refused_or_can_be_rendered() -> None:
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
        (("memory", "peaks", 0, "micro_batch"), 0),
        (
            (
                "request",
                "min_micro_batch",
            ),
            0,
        ),
        (("timing", "timed_sizes", 0, "round_seconds", 0), 0.0),
        (("timing", "timed_sizes", 0, "step_seconds"), 1e-320),
        (("memory", "budget", "bytes"), 10**40),
        (("memory", "peaks", 0, "later_bytes"), -1),
        (
            (
                "timing",
                "window_seconds",
            ),
            float("-inf"),
        ),
        (
            (
                "timing",
                "kernel_time_fraction",
            ),
            float("nan"),
        ),
        (
            (
                "memory",
                "phases",
            ),
            {},
        ),
        (("memory", "timeline", 0, "bytes"), []),
        (
            (
                "schedule",
                "configuration",
            ),
            {"precision": "fp7"},
        ),
        (
            (
                "memory",
                "history_bytes",
            ),
            7,
        ),
    ],
)
def test_what_would_break_the_telling_is_refused(path: tuple[Any, ...], value: Any) -> None:
    text = changed(path, value)
    if path[-1] == "history_bytes":
        text = text.replace('"history_bytes": "a reason', '"other": "a reason')
    assert not fuzz.check_plan(text)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("provenance", "notes", 0), "\ud800"), (("provenance", "fingerprint"), {"\ud800": "", "model": ""})],
)
def test_half_a_character_can_be_rendered(path: tuple[Any, ...], value: Any) -> None:
    assert fuzz.check_plan(changed(path, value))


def alone(rows: list[dict[str, int]], **changes: Any) -> str:
    """A plan file with those peaks, beyond which nothing limits what may be asked of it."""
    data = fuzz.plan_texts()[1]
    peaks = [dict.fromkeys(data["memory"]["peaks"][0], 0) | row for row in rows]
    limits = {"max_micro_batch": None, "min_micro_batch": 1} | changes
    return json.dumps(changed_json(data, peaks=peaks, **limits))


SIZE = fuzz.plan_texts()[1]["schedule"]["micro_batch"]


@pytest.mark.parametrize(
    "text",
    [
        alone([{"micro_batch": SIZE, "between_bytes": 10**12}]),
        alone([{"micro_batch": 1, "between_bytes": 10**12}, {"micro_batch": SIZE}]),
        alone([{"micro_batch": SIZE}, {"micro_batch": 10**7, "optimizer_bytes": 10**12}], min_micro_batch=2),
        fuzz.plan_text(1462, fuzz.plan_texts()),
    ],
    ids=["nothing fits", "but for the rest", "sizes of millions", "seed 1462"],
)
def test_millions_of_samples_are_answered_in_seconds_where_only_the_optimizer_step_is_too_large(text: str) -> None:
    assert fuzz.check_plan(text)


HANGS = """
import os, sys
from importlib.machinery import SourceFileLoader
fuzz = SourceFileLoader("fuzz_script", sys.argv.pop(1)).load_module()
ends = {2: lambda: sum(range(10**15)), 4: lambda: os._exit(9), 5: lambda: 1 / 0}
fuzz.KINDS = {"plans": lambda folder: lambda seed: ends.get(seed, bool)() is None}
sys.exit(fuzz.main())
"""


def test_the_fuzzer_reports_a_seed_that_does_not_end_and_goes_on() -> None:
    script = str(Path(__file__).parent.parent / "scripts" / "fuzz")
    words = ["plans", "--seed", "0", "--count", "8", "--limit", "0.5"]
    ended = subprocess.run([sys.executable, "-c", HANGS, script, *words], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "8 from seed 0 on, 0 accepted, 3 failed" in ended.stdout, ended
    assert [seed for seed in range(8) if f"plans --seed {seed} --count 1" in ended.stdout] == [2, 4, 5]
    assert "Timeout" in ended.stderr and "in <lambda>" in ended.stderr and "ZeroDivisionError" in ended.stderr


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


@pytest.mark.parametrize("words", [[""], ["", "--name", "x"], ["--", "", "x"], []], ids=repr)
def test_a_virtual_gpu_for_an_empty_command_is_refused(words: list[str]) -> None:
    assert not fuzz.check_command(["virtual-gpu", *words])


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(Exception, match="cannot be read"):
        Plan.load("/dev/zero")


def test_a_plan_can_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    text = json.dumps(fuzz.plan_texts()[1])
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text))
    writer.start()
    assert Plan.load(tmp_path / "pipe").target_batch == 512
    writer.join()
