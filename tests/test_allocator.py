"""malloc's replay: the peak of an event list, by rules of their own and against what a process maps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Recorded, Truth, recorded_programs, truths

from autoaccum.process_memory import PAGE_BYTES
from autoaccum.simulation.malloc import (
    ALIGNMENT_BYTES,
    MAPPING_OVERHEAD_BYTES,
    CpuRules,
    HeapState,
    in_use_peaks,
    mapping_bytes,
    replay,
    smallest_mapping,
)
from autoaccum.simulation.program import as_recorded, window
from autoaccum.simulation.recording import Event, Phase, live_peak

THRESHOLD = 131072
RECORDED = recorded_programs()
KEPT = CpuRules(THRESHOLD, keeps_pages=True)
ALL_RULES = st.sampled_from([CpuRules(None), CpuRules(4096), CpuRules(THRESHOLD), KEPT])
FIXED_RULES = st.sampled_from([4096, THRESHOLD, 2**20])

# Asks the real malloc: the growth of VmData and of the number of mappings, for each size. Before each, the heap is
# left without a hole that could take the block.
PROBE = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
libc.mallinfo2.restype = Mallinfo2
libc.free.argtypes = [ctypes.c_void_p]
libc.malloc.restype = ctypes.c_void_p
assert libc.mallopt(-3, int(sys.argv[1])) == 1
statm, page = os.open("/proc/self/statm", os.O_RDONLY), os.sysconf("SC_PAGE_SIZE")
def data():
    return int(os.pread(statm, 256, 0).split()[5]) * page
sizes = json.load(sys.stdin)
for _ in range(300):
    libc.malloc(60_000)
block, found = ctypes.c_void_p(), []
for size in sizes:
    libc.malloc_trim(0)
    before, mappings = data(), libc.mallinfo2().hblks
    assert libc.posix_memalign(ctypes.byref(block), 64, size) == 0
    found.append((data() - before, libc.mallinfo2().hblks - mappings))
    libc.free(block)
    assert libc.mallinfo2().hblks == mappings
json.dump(found, sys.stdout)
"""


def malloc_says(sizes: list[int], threshold: int = THRESHOLD) -> list[tuple[int, int]]:
    """Growth of VmData in bytes, and of mappings, for each size."""
    command = [sys.executable, "-c", PROBE, str(threshold)]
    done = subprocess.run(command, input=json.dumps(sizes), capture_output=True, text=True, check=True)
    return [(grown, mappings) for grown, mappings in json.loads(done.stdout)]


def glibc() -> bool:
    import ctypes

    return hasattr(ctypes.CDLL(None), "mallinfo2") and __import__("os").sysconf("SC_PAGE_SIZE") == PAGE_BYTES


needs_glibc = pytest.mark.skipif(not glibc(), reason="rules of glibc 2.33 or newer, pages of 4 KiB")


@needs_glibc
def test_200_sizes_take_the_mappings_that_glibc_makes_to_the_byte() -> None:
    sizes = [int(2**16 * 1024 ** (i / 199)) + i * 37 for i in range(200)]
    for size, (grown, mappings) in zip(sizes, malloc_says(sizes), strict=True):
        if size >= smallest_mapping(THRESHOLD):
            assert (grown, mappings) == (mapping_bytes(size), 1), size
        else:
            assert mappings == 0, size
    assert 64 * 2**10 <= sizes[0] < THRESHOLD < sizes[-1] <= 65 * 2**20


@needs_glibc
@pytest.mark.parametrize("threshold", [THRESHOLD, THRESHOLD + 8, THRESHOLD + 24, 2**20])
def test_the_border_between_heap_and_mapping_is_glibcs_own(threshold: int) -> None:
    border = smallest_mapping(threshold)
    sizes = [*range(border - 40, border + 40)]
    assert [mappings for _, mappings in malloc_says(sizes, threshold)] == [size >= border for size in sizes]


@needs_glibc
def test_every_size_about_a_page_border_takes_the_pages_that_glibc_takes() -> None:
    sizes = [2**20 + offset for offset in (*range(-170, 20), *range(PAGE_BYTES - 170, PAGE_BYTES + 20))]
    assert [grown for grown, _ in malloc_says(sizes)] == [mapping_bytes(size) for size in sizes]


@given(truth=truths(scale=500), split=st.lists(st.integers(1, 20), min_size=1, max_size=6), rules=ALL_RULES)
def test_the_live_peak_is_a_floor_of_the_peak(truth: Truth, split: list[int], rules: CpuRules) -> None:
    phases = window(truth.program(), split)
    found = replay(phases, rules)
    assert live_peak(phases) == found.live_bytes <= found.peak_bytes == max(phase.bytes for phase in found.phases)


@given(truth=truths(), split=st.lists(st.integers(1, 20), min_size=1, max_size=6), rules=ALL_RULES, free=st.integers(0))
def test_free_bytes_of_the_heap_are_used_first_and_no_more_than_there_are(
    truth: Truth, split: list[int], rules: CpuRules, free: int
) -> None:
    phases = window(truth.program(), split)
    empty, holes = replay(phases, rules), replay(phases, rules, HeapState(free))
    assert empty.peak_bytes - free <= holes.peak_bytes <= empty.peak_bytes
    if rules.mmap_threshold_bytes is None:
        assert holes.peak_bytes == empty.peak_bytes


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
def test_a_recorded_log_without_a_threshold_is_the_running_sum(recorded: Recorded) -> None:
    for recording in recorded.recordings:
        found = replay(recording.phases, CpuRules(None))
        sums, running = {phase.name: 0 for phase in recording.phases}, 0
        for phase in recording.phases:
            for event in phase.events:
                running += event.bytes
                sums[phase.name] = max(sums[phase.name], running if event.bytes > 0 else 0)
        assert {phase.name: phase.bytes for phase in found.phases} == sums
        assert found.peak_bytes == found.live_bytes == max(sums.values()) == live_peak(recording.phases)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
def test_real_models_take_more_than_what_is_alive_by_pages_and_heap_only(recorded: Recorded) -> None:
    recording = recorded.recordings[1]
    phases = window(as_recorded(recording), (recording.micro_batch,) * 2)
    found = replay(phases, CpuRules(THRESHOLD))
    assert found.live_bytes <= found.peak_bytes
    assert found.peak_bytes >= replay(phases, CpuRules(None)).peak_bytes


def test_a_large_block_is_given_back_and_the_heap_keeps_its_top() -> None:
    large, small = 2**20, 1000
    events = [Event(1, large), Event(1, -large), *(Event(i, small) for i in range(2, 12))]
    events += [Event(i, -small) for i in range(2, 12)]
    found = replay([Phase("first", tuple(events)), Phase("later", (Event(20, large),))], CpuRules(THRESHOLD))
    heap = 10 * (small + 64)
    assert [phase.bytes for phase in found.phases] == [mapping_bytes(large), heap + mapping_bytes(large)]
    assert mapping_bytes(large) == large + PAGE_BYTES


def test_kept_pages_and_the_heap_are_both_at_their_top() -> None:
    large, small = 2**20 + 1, 1000
    events = [Event(1, large), Event(1, -large), *(Event(i, small) for i in range(2, 12))]
    found = replay([Phase("first", tuple(events)), Phase("later", (Event(20, 2**18),))], KEPT)
    heap, pages = 10 * (small + 64), 2**20 + PAGE_BYTES
    assert [phase.bytes for phase in found.phases] == [pages + heap, 2**18 + heap]
    assert found.peak_bytes == pages + heap


@given(truth=truths(scale=500), split=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_what_kept_pages_take_is_what_was_alive_in_whole_pages(truth: Truth, split: list[int]) -> None:
    phases = window(truth.program(), split)
    pages = heap = most_pages = most_heap = 0
    for event in (event for phase in phases for event in phase.events):
        sign, size = (1, event.bytes) if event.bytes > 0 else (-1, -event.bytes)
        if size >= THRESHOLD:
            pages += sign * -(-size // PAGE_BYTES)
        else:
            heap += sign * (size + ALIGNMENT_BYTES)
        most_pages, most_heap = max(most_pages, pages), max(most_heap, heap)
    assert replay(phases, KEPT).peak_bytes == most_pages * PAGE_BYTES + most_heap


def test_phases_of_one_name_have_one_peak() -> None:
    phases = [
        Phase("later", (Event(1, 5), Event(1, -5))),
        Phase("later", (Event(2, 9),)),
        Phase("x", (Event(3, 1),)),
    ]
    assert [(phase.name, phase.bytes) for phase in replay(phases, CpuRules(None)).phases] == [("later", 9), ("x", 10)]


@given(truth=truths(), split=st.lists(st.integers(1, 20), min_size=1, max_size=6), extra=st.integers(0, 2**24))
def test_unrecorded_blocks_are_in_the_heap_during_micro_batches_only(
    truth: Truth, split: list[int], extra: int
) -> None:
    phases = window(truth.program(), split)
    without, with_them = replay(phases, CpuRules(THRESHOLD)), replay(phases, CpuRules(THRESHOLD, extra))
    assert without.peak_bytes <= with_them.peak_bytes <= without.peak_bytes + extra
    assert with_them.live_bytes == without.live_bytes
    before = {phase.name: phase.bytes for phase in without.phases}
    for phase in with_them.phases:
        assert before[phase.name] <= phase.bytes <= before[phase.name] + extra
    only_step = [phase for phase in phases if phase.name == "optimizer"]
    assert replay(only_step, CpuRules(THRESHOLD, extra)) == replay(only_step, CpuRules(THRESHOLD))


def test_unrecorded_blocks_fill_holes_like_any_small_block() -> None:
    phases = [Phase("first", (Event(1, 2**20),))]
    peaks = [replay(phases, CpuRules(THRESHOLD, 5000), HeapState(free)).peak_bytes for free in (0, 2000, 5000, 9000)]
    assert peaks == [mapping_bytes(2**20) + above for above in (5000, 3000, 0, 0)]


@given(truth=truths(), split=st.lists(st.integers(1, 20), min_size=1, max_size=4), threshold=FIXED_RULES)
def test_bytes_in_use_lie_between_what_is_alive_and_what_is_taken(
    truth: Truth, split: list[int], threshold: int
) -> None:
    phases = window(truth.program(), split)
    rules = CpuRules(threshold)
    in_use, taken = max(in_use_peaks(phases, rules).values()), replay(phases, rules).peak_bytes
    blocks = sum(event.bytes > 0 for phase in phases for event in phase.events)
    assert live_peak(phases) <= in_use <= live_peak(phases) + blocks * (PAGE_BYTES + MAPPING_OVERHEAD_BYTES)
    assert in_use <= taken or taken == 0


def test_a_phase_is_in_use_with_what_earlier_ones_left() -> None:
    phases = [Phase("first", (Event(1, 1000), Event(2, 2**20), Event(1, -1000))), Phase("later", (Event(3, 500),))]
    large, step = mapping_bytes(2**20), ALIGNMENT_BYTES
    assert in_use_peaks(phases, CpuRules(THRESHOLD)) == {"first": large + 1000 + step, "later": large + 500 + step}
