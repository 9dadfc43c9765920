"""Moments of the allocator's history are found by its counters."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from prepared_process import run_forked

from autoaccum.devices.cuda.positions import find_positions
from autoaccum.devices.virtual import VirtualGpu, available

REASON = available()


def entries(*actions: str) -> list[dict[str, Any]]:
    """Entries such as "alloc 1"."""
    return [dict(zip(("action", "addr"), text.split(), strict=True)) for text in actions]


RING = entries("alloc 1", "free_requested 1", "free_completed 1", "snapshot 0", "alloc 2", "segment_alloc 3", "alloc 3")


@pytest.mark.parametrize(
    ("positions", "found"),
    [((7, 8, 10), [1, 3, 7]), ((9,), [5]), ((10, 10), [7, 7]), ((6,), None), ((5, 10), None), ((), [])],
)
def test_a_position_is_where_so_many_blocks_were_handed_out_or_given_back(
    positions: tuple[int, ...], found: list[int] | None
) -> None:
    assert find_positions(RING, 10, positions) == found


def test_a_history_that_began_right_before_is_whole_and_one_that_may_have_lost_entries_is_not() -> None:
    assert find_positions(entries("snapshot 0", "alloc 1"), 5, (4, 5)) == [0, 2]
    assert find_positions(entries("alloc 1", "alloc 2"), 5, (3,)) is None  # a completed free may have been before it
    assert find_positions([], 5, (5,)) == [0]


def test_a_free_that_waited_for_another_stream_belongs_to_what_comes_after() -> None:
    waited = entries("snapshot 0", "alloc 1", "free_requested 1", "free_completed 9", "alloc 2")
    assert find_positions(waited, 3, (2,)) == [3]


SCRIPT = """
import json, sys, torch
from autoaccum.devices.cuda import workspaces
from autoaccum.devices.cuda.recorder import record
from autoaccum.errors import UsageError

def run(on_phase):
    with on_phase("first"):
        kept = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")
        a = torch.zeros(64, 64, device="cuda") @ torch.zeros(64, 64, device="cuda")
        workspaces.release()
    with on_phase("optimizer"):
        del kept
        torch.empty(5 << 20, dtype=torch.uint8, device="cuda")
        side = torch.cuda.Stream()
        held = torch.empty(7 << 20, dtype=torch.uint8, device="cuda")
        with torch.cuda.stream(side):
            held.record_stream(side)
        del held

recording = record(run, micro_batch=1)
mib = {p.name: [round(e.bytes / 2**20) for e in p.events if abs(e.bytes) >= 2**20] for p in recording.phases}
found = {"phases": mib}
blocks = {e.block: e.bytes for p in recording.phases for e in p.events if e.bytes > 0}
found["workspaces"] = [blocks[block] >= 1 << 20 for block in recording.workspaces]
torch.cuda.memory._record_memory_history("all", context=None, max_entries=4)
try:
    record(run, micro_batch=1)
except UsageError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_phases_and_workspaces_are_found_and_a_ring_that_is_too_short_is_refused() -> None:
    out = run_forked(SCRIPT, gpu=VirtualGpu(memory_bytes=4 * 2**30))
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    workspace = found["phases"]["first"][1]
    # A stream still uses the last block, which is not free yet.
    assert found["phases"] == {"first": [3, workspace, -workspace], "optimizer": [-3, 5, -5, 7]}
    keeps = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)  # later, a product gives its own back at once
    assert found["workspaces"] == ([True] if keeps else []) and workspace >= 8
    assert "already kept" in found["error"] and "max_entries=1_000_000" in found["error"]
