"""Answers below the sizes that rules are found with: what saturates between the two is recorded where it matters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autoaccum.devices.virtual import available
from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.planning.evidence import Evidence
from autoaccum.planning.schedule import sizes_around
from autoaccum.planning.windows import WindowSimulator, window_of
from autoaccum.simulation.program import plain_window
from autoaccum.simulation.recording import Event, Phase, Recording, live_peak

REASON = available()


def bytes_of(n: int) -> int:
    """Grows to four samples, then ten times more slowly: as an embedding's backward does, from its vocabulary on."""
    return 1_000_000 * min(n, 4) + 100_000 * n


def recording(n: int) -> Recording:
    def micro_batch(name: str, first: int) -> Phase:
        made = Event(first, bytes_of(n)), Event(first + 1, 7_000 * n)
        return Phase(name, (*made, *(event._replace(bytes=-event.bytes) for event in made)))

    return Recording(n, (micro_batch(FIRST, 1), micro_batch(LATER, 3), Phase(OPTIMIZER, ())), passes=2)


def evidence(*small: int) -> Evidence:
    found = Evidence(first_step=recording(2))
    found.set_recordings([recording(11), recording(13)])
    for n in small:
        found.add_small(recording(n))
    return found


def peak(known: Evidence, split: tuple[int, ...]) -> int:
    program, short = window_of(known, split)
    return live_peak(plain_window(program, short))


def expected(n: int) -> int:
    return bytes_of(n) + 7_000 * n


def test_windows_as_small_as_small_recordings_are_predicted_from_them() -> None:
    known = evidence(2, 3)
    assert [peak(known, (n, n)) for n in (2, 3, 11, 13)] == [expected(n) for n in (2, 3, 11, 13)]
    assert peak(known, (3, 3, 2)) == expected(3) and peak(known, (12, 12)) == expected(12)
    assert peak(evidence(), (2, 2)) > 1.9 * expected(2)  # by the rules of 11 and 13 alone
    assert peak(evidence(1), (1, 1)) == expected(1)


def test_what_was_replayed_of_small_windows_is_dropped_with_a_small_recording_and_the_rest_is_kept() -> None:
    class Counting(WindowSimulator):
        runs = 0

        def _run(self, program, split, start):  # type: ignore[no-untyped-def]
            Counting.runs += 1
            return live_peak(plain_window(program, split))

    known = evidence()
    simulator = known.simulator(Counting, None, None)
    for _ in range(2):
        found = [simulator.replay((n, n)) for n in (2, 13)]
    assert Counting.runs == 2 and found[0] > 1.9 * expected(2)
    known.add_small(recording(2))
    assert [simulator.replay((n, n)) for n in (2, 13)] == [expected(2), expected(13)] and Counting.runs == 3


def test_sizes_around_an_answer_are_recorded_once_and_below_the_others() -> None:
    known = evidence()
    assert sizes_around(known, 2, 1) == [2, 3] and sizes_around(known, 10, 1) == [10]
    assert sizes_around(known, 11, 1) == [] and sizes_around(known, 1, 2) == [2]
    assert sizes_around(evidence(2, 3), 2, 1) == [] and sizes_around(evidence(2, 3), 1, 1) == [1]


def test_sizes_that_are_recorded_one_by_one_include_the_small_ones() -> None:
    known = evidence(2, 3)
    known.fall_back("another reason")
    assert [each.micro_batch for each in known.recordings] == [2, 3, 11, 13] and not known.has_program
    assert peak(known, (2, 2)) == expected(2)


WORK = """
import torch
from torch import nn
from autoaccum import Workload

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20000, 1000)
        self.layers = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(3)), nn.Linear(1000, 100))
    def forward(self, tokens):
        return self.layers(self.tokens(tokens))

def work():
    tokens = torch.zeros(2, 4096, dtype=torch.long)
    return Workload(Net(), (tokens, tokens), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
"""


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
@pytest.mark.parametrize("limit", [("--memory", "1.35GiB"), ("--max-micro-batch", "2")], ids=["memory", "request"])
def test_a_plan_for_fewer_samples_than_were_recorded_is_the_allocator_s(limit: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(WORK)
    command = [sys.executable, "-m", "autoaccum", "plan", "--gpu", "h100-80gb", "--target-batch", "40", *limit]
    found = subprocess.run(
        [*command, "--workload", "train.py:work", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    plan = json.loads(found.stdout)
    recorded = [note["micro_batch"] for note in plan["evidence"]["recordings"]]
    assert max(plan["schedule"]["split"]) < min(recorded[:2]) and max(plan["schedule"]["split"]) in recorded
    assert plan["evidence"]["this_process_peak_bytes"] == plan["evidence"]["measured_peak_bytes"]
    assert plan["evidence"]["method"] == "replayed"
