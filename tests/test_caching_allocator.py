"""The rules of the CUDA caching allocator against the real one: PyTorch's own, on a virtual GPU.

Each of 21 trainings (`replay_cases.py`) is recorded with room. Replaying that log's allocations and frees has to give
the allocator's `max_memory_allocated`, `max_memory_reserved` and retries to the byte, with room and at three
capacities between what is alive and what is reserved, where the real run gives blocks back or runs out of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum import virtual
from autoaccum.caching_allocator import CudaRules, replay_cuda
from autoaccum.cuda_rules import MiB, round_size, segment_bytes
from autoaccum.recording import Event, Phase

CASES = Path(__file__).parent / "replay_cases.py"
REASON = virtual.available()


def replayed(settings: str) -> list[dict[str, Any]]:
    gpu = virtual.VirtualGpu(memory_bytes=16 * 2**30)
    environment = virtual.environment(gpu) | {"PYTORCH_CUDA_ALLOC_CONF": settings}
    out = subprocess.run([sys.executable, str(CASES)], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("settings", ["", "max_split_size_mb:64,roundup_power2_divisions:8"])
def test_a_replay_is_the_allocators_own_numbers_to_the_byte(settings: str) -> None:
    cases = replayed(settings)
    assert len(cases) == 84
    for case in cases:
        for figure in ("allocated", "reserved", "retries", "ran out"):
            said, real = case[figure]
            assert said == real, case
    assert sum(case["retries"][1] > 0 for case in cases) >= 20  # or nothing of the rules about room was put to the test
    assert sum(case["ran out"][1] for case in cases) >= 10
    assert sum(not case["ran out"][1] and case["retries"][1] > 0 for case in cases) >= 5


def phase(*sizes: int) -> list[Phase]:
    """Sizes in order; a negative number frees the block of that place, counted from 1."""
    made = [size for size in sizes if size > 0]
    events, named = [], 0
    for size in sizes:
        named += size > 0
        events.append(Event(named, size) if size > 0 else Event(-size, -made[-size - 1]))
    return [Phase("first", tuple(events))]


@pytest.mark.parametrize(("size", "rounded"), [(1, 512), (512, 512), (513, 1024), (MiB, MiB), (MiB + 1, MiB + 512)])
def test_sizes_are_rounded_to_512(size: int, rounded: int) -> None:
    assert round_size(size) == rounded


@pytest.mark.parametrize(
    ("size", "segment"),
    [(512, 2), (MiB, 2), (MiB + 512, 20), (10 * MiB - 512, 20), (10 * MiB, 10), (21 * MiB, 22), (21 * MiB + 512, 22)],
)
def test_a_segment_is_2_or_20_mib_or_the_size_rounded_up_to_2(size: int, segment: int) -> None:
    assert segment_bytes(size) == segment * MiB


def test_a_large_block_keeps_up_to_one_mib_that_is_too_little_to_split_off() -> None:
    assert replay_cuda(phase(11 * MiB + 512), CudaRules()).peak_allocated_bytes == 12 * MiB
    assert replay_cuda(phase(11 * MiB - 512), CudaRules()).peak_allocated_bytes == 11 * MiB - 512


def test_short_of_memory_it_gives_free_segments_back_and_tries_once_more() -> None:
    events = phase(30 * MiB, -1, 40 * MiB)
    assert replay_cuda(events, CudaRules()).peak_reserved_bytes == 70 * MiB
    tight = replay_cuda(events, CudaRules(capacity_bytes=60 * MiB))
    assert tight.peak_reserved_bytes == 40 * MiB and tight.retries == (1,) and tight.out_of_memory is None
    assert replay_cuda(events, CudaRules(capacity_bytes=38 * MiB)).out_of_memory == 0


@given(st.lists(st.integers(1, 64 * MiB), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_what_is_alive_is_within_what_is_allocated_is_within_what_is_reserved(sizes: list[int], random: Any) -> None:
    events: list[Event] = []
    live: list[Event] = []
    for block, size in enumerate(sizes, start=1):
        live.append(Event(block, size))
        events.append(live[-1])
        if random.random() < 0.5:
            freed = live.pop(random.randrange(len(live)))
            events.append(Event(freed.block, -freed.bytes))
    found = replay_cuda([Phase("first", tuple(events))], CudaRules())
    running = peak = 0
    for event in events:
        running += event.bytes
        peak = max(peak, running)
    assert peak <= found.peak_allocated_bytes <= found.peak_reserved_bytes
    assert replay_cuda([Phase("first", tuple(events))], CudaRules(found.peak_reserved_bytes)) == found
