"""The rules of the CUDA caching allocator: each by itself, the laws that hold for all, and against the real one.

Against the real one: PyTorch's own, on a virtual GPU. Trainings (`replay_cases.py`) are recorded with room, from empty
and from a snapshot. Replaying that log's allocations and frees has to give the allocator's `max_memory_allocated`,
`max_memory_reserved` and retries to the byte, with room and at capacities between what is alive and what is reserved,
where the real run gives blocks back or runs out of memory. All 26 of them in all settings take minutes (`-m slow`).
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from importlib.metadata import version as torch_version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_process import run_forked

from autoaccum.devices import virtual
from autoaccum.errors import UsageError
from autoaccum.simulation.cuda_allocator.addresses import Addresses
from autoaccum.simulation.cuda_allocator.allocator import CachingAllocator, CudaRules
from autoaccum.simulation.cuda_allocator.replay import CudaReplay, replay_cuda
from autoaccum.simulation.cuda_allocator.settings import MiB, round_size, segment_bytes
from autoaccum.simulation.cuda_allocator.snapshot import AllocatorState
from autoaccum.simulation.cuda_allocator.ties import LATEST_KNOWN, TIE_RULES, TieRule, minor_version, tie_rule_of
from autoaccum.simulation.recording import Event, Phase

CASES = Path(__file__).parent / "replay_cases.py"
REASON = virtual.available()
usable = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TORCH = minor_version(torch_version("torch")) or LATEST_KNOWN
FIGURES = ("allocated", "reserved", "reserved in the end", "retries", "ran out")
EXPANDABLE = CudaRules(expandable_segments=True)


# -- against the real one


def replayed(*arguments: str) -> list[dict[str, Any]]:
    out = run_forked(CASES, *arguments, gpu=virtual.VirtualGpu(memory_bytes=16 * 2**30), timeout=900)
    assert out.returncode == 0, out.stderr[-3000:]
    cases = [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]
    for case in cases:
        for figure in FIGURES:
            said, real = case[figure]
            assert said == real, (figure, case)
    return cases


def count(cases: list[dict[str, Any]], *, retries: bool, ran_out: bool) -> int:
    return sum((case["retries"][1] > 0) == retries and case["ran out"][1] == ran_out for case in cases)


@usable
def test_a_replay_is_the_allocators_own_numbers_to_the_byte_in_every_setting() -> None:
    cases = replayed("16,25", "0,1,2,3,4,5,6,7,8,9,10", "1")
    assert len(cases) == 2 * (11 - (TORCH < (2, 10))) * 2
    assert count(cases, retries=True, ran_out=False) >= 5  # or nothing of the rules about room was put to the test
    assert count(cases, retries=True, ran_out=True) >= 2
    assert any(case["streams"] == 2 and case["held"] > 0 for case in cases)
    assert any(case["given back"] > 0 and case["retries"][1] == 0 for case in cases)  # garbage collection, oversize


@usable
@pytest.mark.parametrize(
    "numbers", ["0,1,2,3,4,5,6,7,8,9,10", "11"]
)  # a segment of other pages would outlive its setting
def test_random_events_leave_the_same_after_each_as_with_the_allocator(numbers: str) -> None:
    gpu = virtual.VirtualGpu(memory_bytes=2 * 2**30, context_bytes=0, addresses="down" if "0" in numbers else "up")
    out = run_forked(CASES.with_name("replay_fuzz.py"), "6", numbers, gpu=gpu)
    assert out.returncode == 0, out.stderr[-3000:]
    found = [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]
    lacking = sum(number in ("5", "6", "11") for number in numbers.split(",")) * (TORCH < (2, 10))  # segments' size
    assert len(found) == len(numbers.split(",")) - lacking
    for message in found:
        assert message["wrong"] == 0, message
        assert message["retries"] > 0, message


@usable
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", range(11))
def test_a_replay_is_the_allocators_own_numbers_to_the_byte(setting: int) -> None:
    cases = replayed("0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25", str(setting))
    if setting == 10 and TORCH < (2, 10):
        pytest.skip("this torch has no large_segment_size_mb")
    assert len(cases) == 26 * 4
    assert count(cases, retries=True, ran_out=False) + count(cases, retries=True, ran_out=True) >= 20


# -- helpers: events, and whether what the allocator holds is in order


def phase(*sizes: int, stream: int = 0) -> list[Phase]:
    """Sizes in order; a negative number frees the block of that place, counted from 1."""
    made = [size for size in sizes if size > 0]
    events, named = [], 0
    for size in sizes:
        named += size > 0
        events.append(Event(named, size, stream) if size > 0 else Event(-size, -made[-size - 1], stream))
    return [Phase("first", tuple(events))]


def reserved(events: list[Phase], rules: CudaRules, start: AllocatorState | None = None) -> int:
    return replay_cuda(events, rules, start or AllocatorState()).phases[-1].bytes


def walked(allocator: CachingAllocator) -> list[Any]:
    """Every block there is; asserts that each pool and each segment is in order."""
    found: list[Any] = []
    for pool in [*allocator._small.values(), *allocator._large.values()]:
        mapped, free = [], []
        for address, head in pool.heads.items():
            assert head.address == address and head.before is None
            block = head
            while block is not None:
                after = block.after
                assert block.size > 0 and not (block.free and not block.mapped)
                (free if block.free else mapped if block.mapped else []).append(block)
                if after is not None:
                    assert after.before is block and after.address == block.address + block.size
                    assert not (block.free and after.free) and (block.mapped or after.mapped), "not merged"
                block = after
        assert pool.keys == sorted(block.key for block in free)
        assert all(block.key == block.size << 64 | block.rank and pool.blocks[block.key] is block for block in free)
        assert len(pool.blocks) == len(free)
        assert [b.address for b in pool.unmapped] == sorted(b.address for b in pool.unmapped)
        found += mapped + free
    assert sum(block.size for block in found) == allocator.reserved_bytes
    live = [block for block in found if not block.free]
    assert {id(block) for block in live} == {id(b) for b in [*allocator._live.values(), *allocator._held.values()]}
    assert sum(block.size for block in allocator._live.values()) == allocator.allocated_bytes
    return found


# -- sizes


@pytest.mark.parametrize(("size", "rounded"), [(1, 512), (512, 512), (513, 1024), (MiB, MiB), (MiB + 1, MiB + 512)])
def test_sizes_are_rounded_to_512(size: int, rounded: int) -> None:
    assert round_size(size) == rounded


@pytest.mark.parametrize(
    ("size", "segment"),
    [(512, 2), (MiB, 2), (MiB + 512, 20), (10 * MiB - 512, 20), (10 * MiB, 10), (21 * MiB, 22), (21 * MiB + 512, 22)],
)
def test_a_segment_is_2_or_20_mib_or_the_size_rounded_up_to_2(size: int, segment: int) -> None:
    assert segment_bytes(size) == segment * MiB


def test_divisions_round_up_to_steps_between_powers_of_two_by_interval() -> None:
    rules = CudaRules.from_settings("roundup_power2_divisions:[2:4,8:2]")
    assert round_size(5 * MiB, rules.roundup_power2_divisions) == 5 * MiB  # 4 to 8 MiB lies between the pairs
    assert round_size(9 * MiB, rules.roundup_power2_divisions) == 12 * MiB
    assert round_size(2 * MiB + 1, rules.roundup_power2_divisions) == 2 * MiB + 512 * 1024
    assert round_size(1200, rules.roundup_power2_divisions) == 1536  # too small for steps of 512


# -- the settings' text


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        (" max_split_size_mb : 64 , expandable_segments : True ", "max_split_size_bytes", 64 * MiB),
        ("roundup_power2_divisions:[256:1,512:2,>:4]", "roundup_power2_divisions", (1,) * 9 + (2,) + (4,) * 6),
        ("roundup_power2_divisions:[>:2]", "roundup_power2_divisions", (0,) + (2,) * 15),
        ("pinned_use_background_threads:True,backend:native,garbage_collection_threshold:0.5",
         "garbage_collection_threshold", 0.5),
        ("per_process_memory_fraction:0.25", "allowed_bytes", 256 * MiB),
        ("per_process_memory_fraction:1.0", "allowed_bytes", None),
        ("expandable_segments:False", "expandable_segments", False),
        ("large_segment_size_mb:11", "large_segment_bytes", 11 * MiB),
        ("", "max_split_size_bytes", None),
    ],
)  # fmt: skip
def test_settings_are_read_as_pytorch_reads_them(text: str, field: str, value: object) -> None:
    assert getattr(CudaRules.from_settings(text, device_bytes=1024 * MiB), field) == value


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bogus:1", "bogus"), ("backend:cudaMallocAsync", "backend"), ("throw_on_cudamalloc_oom:True", "throw_on_cuda"),
        ("max_split_size_mb:19", "max_split_size_mb"), ("roundup_power2_divisions:3", "roundup_power2_divisions"),
        ("roundup_power2_divisions:[3:4]", "roundup_power2_divisions"), ("expandable_segments:true", "expandable"),
        ("garbage_collection_threshold:1.0", "garbage_collection"), ("large_segment_size_mb:10", "large_segment"),
        ("max_split_size_mb", "max_split_size_mb"), ("per_process_memory_fraction:0.5", "per_process_memory_fraction"),
        ("large_segment_size_mb:40,max_split_size_mb:25", "max_split_size_mb:25"),
        ("expandable_segments_reserve:0.5", "device_bytes"), ("expandable_segments_handle_type:posix_fd", "no alloc"),
    ],
)  # fmt: skip
def test_a_setting_that_is_unknown_or_not_modelled_or_refused_is_named(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        CudaRules.from_settings(text)


@pytest.mark.parametrize(
    ("text", "version", "since"),
    [
        ("throw_on_cudamalloc_oom:False", (2, 11), (2, 12)),
        ("expandable_segments_reserve_by_class:[a:1G]", (2, 14), (2, 15)),
        ("per_process_memory_fraction:1.0", (2, 9), (2, 10)),
        ("large_segment_size_mb:32", (2, 6), (2, 10)),
    ],
)
def test_an_option_is_refused_by_a_version_that_has_none(
    text: str, version: tuple[int, int], since: tuple[int, int]
) -> None:
    with pytest.raises(UsageError, match=rf"torch 2\.{version[1]} has no .*\n.*torch 2\.{since[1]}"):
        CudaRules.from_settings(text, version=version)
    CudaRules.from_settings(text, version=since)


def test_up_to_torch_2_9_the_last_roundup_replaces_the_pair_before_it() -> None:
    text = "roundup_power2_divisions:[1:8,2:2,16:4,>:1]"
    assert CudaRules.from_settings(text, version=(2, 9)).roundup_power2_divisions[:6] == (8, 2, 0, 0, 1, 1)
    assert CudaRules.from_settings(text).roundup_power2_divisions[:6] == (8, 2, 0, 0, 4, 1)


# -- one rule at a time


def test_a_large_block_keeps_up_to_one_mib_that_is_too_little_to_split_off() -> None:
    assert replay_cuda(phase(11 * MiB + 512), CudaRules()).peak_allocated_bytes == 12 * MiB
    assert replay_cuda(phase(11 * MiB - 512), CudaRules()).peak_allocated_bytes == 11 * MiB - 512


def test_short_of_memory_it_gives_free_segments_back_and_tries_once_more() -> None:
    events = phase(30 * MiB, -1, 40 * MiB)
    assert replay_cuda(events, CudaRules()).peak_reserved_bytes == 70 * MiB
    tight = replay_cuda(events, CudaRules(capacity_bytes=60 * MiB))
    assert tight.peak_reserved_bytes == 40 * MiB and tight.retries == (1,) and tight.out_of_memory is None
    assert replay_cuda(events, CudaRules(capacity_bytes=38 * MiB)).out_of_memory == 0


def test_a_memory_fraction_limits_like_a_smaller_device() -> None:
    events = phase(30 * MiB, -1, 40 * MiB)
    limited = replay_cuda(events, CudaRules(capacity_bytes=90 * MiB, allowed_bytes=60 * MiB))
    assert limited == replay_cuda(events, CudaRules(capacity_bytes=60 * MiB))
    # Before it maps pages the allocator asks for what it would ask cudaMalloc for, here 2 MiB for 512 bytes.
    assert replay_cuda(phase(512), CudaRules(allowed_bytes=MiB, expandable_segments=True)).out_of_memory == 0


@pytest.mark.parametrize("expandable", [False, True])
def test_what_a_window_would_take_is_not_limited_by_the_fraction(expandable: bool) -> None:
    events = phase(30 * MiB, 40 * MiB, -1, 50 * MiB, -2, 60 * MiB)
    free = CudaRules(expandable_segments=expandable)
    limited = replace(free, allowed_bytes=60 * MiB)
    assert replay_cuda(events, limited).out_of_memory == 0
    assert replay_cuda(events, limited.with_capacity(None)) == replay_cuda(events, free)
    assert replay_cuda(events, limited.with_capacity(100 * MiB)) == replay_cuda(events, free.with_capacity(100 * MiB))
    assert replay_cuda(events, limited.with_capacity(60 * MiB)).out_of_memory == 0
    assert replay_cuda(events, limited.with_capacity(50 * MiB)).out_of_memory == 0


def test_without_the_fraction_s_limit_garbage_is_collected_from_the_same_amount_on() -> None:
    events = phase(30 * MiB, 40 * MiB, -1, 50 * MiB, -2, 60 * MiB)
    rules = CudaRules(garbage_collection_threshold=0.5, allowed_bytes=200 * MiB)
    assert reserved(events, rules.with_capacity(None)) == reserved(events, rules.with_capacity(1 << 40)) == 150 * MiB
    assert reserved(events, CudaRules(garbage_collection_threshold=0.5).with_capacity(None)) == 180 * MiB


def test_a_block_above_the_maximum_split_size_is_not_given_to_a_smaller_request() -> None:
    events = phase(100 * MiB, -1, 30 * MiB)
    assert reserved(events, CudaRules()) == 100 * MiB
    rules = CudaRules(max_split_size_bytes=64 * MiB)
    assert reserved(events, rules) == 130 * MiB
    assert reserved(phase(100 * MiB, -1, 81 * MiB), rules) == 100 * MiB  # within 20 MiB of it, it is
    assert reserved(phase(100 * MiB, -1, 80 * MiB), rules) == 180 * MiB
    short = replay_cuda(events, CudaRules(max_split_size_bytes=64 * MiB, capacity_bytes=110 * MiB))
    assert short.peak_reserved_bytes == 100 * MiB and short.retries == (0,)  # given back alone, which is no retry


def test_garbage_collection_gives_back_what_was_unused_longer_than_the_average() -> None:
    events = phase(30 * MiB, 40 * MiB, -1, 50 * MiB, -2, 60 * MiB)
    rules = CudaRules(garbage_collection_threshold=0.5, allowed_bytes=200 * MiB)
    assert reserved(events, CudaRules()) == 180 * MiB
    assert reserved(events, rules) == 150 * MiB  # the 30, freed first; the 40 is younger than the two's average
    assert reserved(events, CudaRules(garbage_collection_threshold=0.5)) == 180 * MiB  # no fraction, no collection
    assert reserved(events, CudaRules(garbage_collection_threshold=0.7, allowed_bytes=200 * MiB)) == 180 * MiB


def test_a_block_that_another_stream_uses_is_not_free_yet_but_no_longer_allocated() -> None:
    held = [Event(1, 30 * MiB), Event(1, 0), Event(2, 30 * MiB), Event(1, -30 * MiB), Event(3, 30 * MiB)]
    found = replay_cuda([Phase("first", tuple(held))], CudaRules())
    assert found.peak_reserved_bytes == 60 * MiB == found.peak_allocated_bytes
    assert replay_cuda([Phase("first", tuple(held[:3]))], CudaRules()).peak_allocated_bytes == 30 * MiB
    short = replay_cuda([Phase("first", tuple(held[:4]))], CudaRules(capacity_bytes=30 * MiB))
    assert short.out_of_memory is None and short.retries == (1,)  # out of room, it waits for the other stream


def test_streams_have_pools_of_their_own() -> None:
    other = phase(30 * MiB, stream=7)[0].events
    found = reserved([Phase("first", (Event(5, 30 * MiB), Event(5, -30 * MiB), *other))], CudaRules())
    assert found == 60 * MiB


def test_of_free_blocks_of_one_size_that_in_the_oldest_segment_is_taken() -> None:
    allocator = CachingAllocator(CudaRules(capacity_bytes=100 * MiB))
    allocator.run(phase(30 * MiB, 30 * MiB, 30 * MiB, -1, 40 * MiB)[0])  # the first goes, to make room for the 40
    allocator.run(Phase("more", (Event(4, -40 * MiB), Event(9, 30 * MiB))))
    old, new = allocator._live[2], allocator._live[9]
    frees = (Event(9, -30 * MiB), Event(2, -30 * MiB))
    allocator.run(Phase("more", (*frees, Event(10, 30 * MiB), Event(11, 30 * MiB))))
    assert (allocator._live[10], allocator._live[11]) == (old, new)


def order(rule: TieRule, down: bool = False) -> list[int]:
    """Which of blocks 1 and 3 (in an old segment), and 5 (in a newer one) come back first, all of 4 MiB and free."""
    allocator = CachingAllocator(CudaRules(tie_rule=rule, addresses_down=down))
    allocator.run(phase(4 * MiB, 12 * MiB, 4 * MiB, 15 * MiB, 4 * MiB, 16 * MiB)[0])
    places = {allocator._live[name].address: name for name in (1, 3, 5)}
    allocator.run(Phase("more", tuple(Event(name, -4 * MiB) for name in (5, 1, 3))))
    allocator.run(Phase("more", tuple(Event(name, 4 * MiB) for name in (11, 12, 13))))
    walked(allocator)
    return [places[allocator._live[name].address] for name in (11, 12, 13)]


def test_each_version_takes_another_of_equal_free_blocks() -> None:
    assert order("oldest segment") == order("oldest segment", down=True) == [1, 3, 5]
    assert order("lowest address") == [1, 3, 5]
    assert order("lowest address", down=True) == [5, 1, 3]
    assert order("oldest block") == order("oldest block", down=True) == [3, 1, 5]  # 3 is what was left of the segment


@pytest.mark.parametrize(
    ("version", "rule"),
    [
        ("2.6.0", "lowest address"), ("2.6.0+cu124", "lowest address"), ("2.11.0+cu130", "lowest address"),
        ("2.12.0", "oldest block"), ("2.12.1+cpu", "oldest block"), ("2.13.0", "oldest segment"),
        ("2.15.0+cu132", "oldest segment"), ("2.16.0", None), ("3.0.0", None), ("2.14.0.dev20260801+cu130", None),
        ("2.9.0a0+50eac811a6.nv25.09", None), ("2.14.1+gitabc", None), ("2.12.0+rocm7.1", None), ("2.14.0rc1", None),
    ],
)  # fmt: skip
def test_the_rule_is_known_of_released_versions(version: str, rule: str | None) -> None:
    assert tie_rule_of(version) == rule


def test_addresses_are_those_of_the_nearest_gap() -> None:
    for down in (False, True):
        places = Addresses(1 << 40, down)
        first, second, third = (places.take(size * MiB) for size in (4, 6, 2))
        far = (third < second < first) if down else (first < second < third)
        assert far and first == (1 << 40) - 4 * MiB * down
        places.give(first)
        places.give(second)  # one gap of 10
        assert places.take(12 * MiB) == third + (-12 if down else 2) * MiB
        assert places.take(2 * MiB) == first + 2 * MiB * down
        assert places.take(8 * MiB) == second + (-2 + 2 * down) * MiB
    held = Addresses(100 * MiB, False, [(110 * MiB, 2 * MiB), (100 * MiB, 4 * MiB)])
    assert [held.take(size * MiB) for size in (8, 6, 2)] == [112 * MiB, 104 * MiB, 120 * MiB]


# -- expandable segments


def test_a_segment_spans_what_is_reserved_for_it_and_no_block_spans_two() -> None:
    rules = CudaRules.from_settings(
        "expandable_segments:True,expandable_segments_reserve:0.1", device_bytes=2048 * MiB, capacity_bytes=1500 * MiB
    )
    assert rules.expandable_span(20 * MiB) == 220 * MiB
    assert reserved(phase(100 * MiB, 100 * MiB, 205 * MiB), rules) == 420 * MiB
    assert (
        replay_cuda(phase(221 * MiB), rules).out_of_memory == 0 and not replay_cuda(phase(219 * MiB), rules).retries[0]
    )
    assert CudaRules.from_settings("expandable_segments_reserve:1G").expandable_reserve_bytes == 1 << 30
    assert CudaRules.from_settings("expandable_segments_reserve:little").expandable_reserve_bytes is None


def test_pages_of_2_and_20_mib_are_mapped_as_they_are_needed() -> None:
    assert reserved(phase(512), EXPANDABLE) == 2 * MiB
    assert reserved(phase(3 * MiB), EXPANDABLE) == 20 * MiB
    assert reserved(phase(30 * MiB, 9 * MiB), EXPANDABLE) == 40 * MiB
    assert reserved(phase(30 * MiB, 11 * MiB), EXPANDABLE) == 60 * MiB
    assert reserved(phase(30 * MiB, -1, 50 * MiB), EXPANDABLE) == 60 * MiB  # grows in place
    assert replay_cuda(phase(11 * MiB + 512), EXPANDABLE).peak_allocated_bytes == 11 * MiB + 512  # split to the byte


def test_out_of_room_whole_free_pages_are_unmapped() -> None:
    events = (*phase(50 * MiB, 3 * MiB, -1, 45 * MiB, stream=1)[0].events, Event(9, 25 * MiB, 2))
    allocator = CachingAllocator(CudaRules(expandable_segments=True, capacity_bytes=80 * MiB))
    allocator.run(Phase("first", events[:3]))
    assert allocator.reserved_bytes == 60 * MiB
    result = allocator.run(Phase("first", (events[4],)))  # another stream: pages 1 and 2 go, page 3 holds the 3 MiB
    assert result.retries == 1 and allocator.reserved_bytes == 60 * MiB
    walked(allocator)
    assert not allocator.run(Phase("first", (Event(10, 15 * MiB, 1),))).out_of_memory  # mapped again at the beginning
    assert allocator._live[10].address < allocator._live[2].address


def test_a_segment_without_pages_ends_and_one_that_is_full_is_followed_by_another() -> None:
    rules = CudaRules(expandable_segments=True, device_bytes=64 * MiB, capacity_bytes=64 * MiB)
    allocator = CachingAllocator(rules)
    allocator.run(phase(30 * MiB, -1, 70 * MiB)[0])  # more than there is: everything is unmapped on the way
    assert allocator.out_of_memory and allocator.reserved_bytes <= 60 * MiB
    roomy = CachingAllocator(CudaRules(expandable_segments=True, device_bytes=64 * MiB))
    roomy.run(phase(70 * MiB, 30 * MiB)[0])  # 9/8 of 64 MiB: four pages of 20
    assert len(roomy._large[0].heads) == 2 and roomy.reserved_bytes == 120 * MiB
    walked(roomy)


# -- starts


def snapshot(*segments: tuple[int, bool, list[tuple[int, str]]], **more: Any) -> list[dict[str, Any]]:
    """As `torch.cuda.memory_snapshot` gives it: address in MiB, whether small, blocks by size and state."""
    return [
        {
            "device": 0, "address": address * MiB, "stream": 0, "segment_type": "small" if small else "large",
            "segment_pool_id": (0, 0), "is_expandable": False, "total_size": sum(size for size, _ in blocks),
            "blocks": [{"size": size, "state": state} for size, state in blocks],
        } | more
        for address, small, blocks in segments
    ]  # fmt: skip


def test_a_start_is_used_before_anything_is_asked_of_the_driver() -> None:
    start = AllocatorState.from_snapshot(
        snapshot(
            (100, False, [(15 * MiB, "active_allocated"), (25 * MiB, "inactive")]),
            (8, True, [(512, "active_allocated"), (2 * MiB - 512, "inactive")]),
        )
        + snapshot((500, False, [(90 * MiB, "inactive")]), device=1)
    )
    assert start.reserved_bytes == 42 * MiB and start.allocated_bytes == 15 * MiB + 512
    assert reserved(phase(25 * MiB, 1000), CudaRules(), start) == 42 * MiB
    assert reserved(phase(26 * MiB), CudaRules(), start) == 68 * MiB
    assert replay_cuda(phase(26 * MiB), CudaRules(capacity_bytes=60 * MiB), start).out_of_memory == 0
    freed = Phase("first", (Event(-100 * MiB, -15 * MiB), Event(1, 40 * MiB)))  # named by its address
    assert reserved([freed], CudaRules(), start) == 42 * MiB
    unknown = Phase("first", (Event(-3, -15 * MiB), Event(1, 40 * MiB)))
    assert reserved([unknown], CudaRules(), start) == 82 * MiB


def test_a_private_pool_of_the_start_is_reserved_and_left_alone() -> None:
    start = AllocatorState.from_snapshot(
        snapshot((0, False, [(30 * MiB, "inactive"), (30 * MiB, "active_allocated")]), segment_pool_id=(0, 1))
    )
    assert reserved(phase(30 * MiB), CudaRules(), start) == 90 * MiB
    assert replay_cuda(phase(30 * MiB), CudaRules(), start).peak_allocated_bytes == 60 * MiB
    assert replay_cuda(phase(30 * MiB), CudaRules(capacity_bytes=80 * MiB), start).out_of_memory == 0


def test_what_the_start_holds_for_another_stream_is_free_when_there_is_no_room() -> None:
    start = AllocatorState.from_snapshot(snapshot((0, False, [(30 * MiB, "active_pending_free")])))
    assert reserved(phase(30 * MiB), CudaRules(), start) == 60 * MiB
    assert reserved(phase(30 * MiB), CudaRules(capacity_bytes=50 * MiB), start) == 30 * MiB


def test_ranges_of_an_expandable_segment_are_one_segment_with_gaps() -> None:
    blocks = [(20 * MiB, "active_allocated")]
    start = AllocatorState.from_snapshot(snapshot((100, False, blocks), (160, False, blocks), is_expandable=True))
    allocator = CachingAllocator(EXPANDABLE, start)
    walked_before = len(allocator._large[0].unmapped)
    allocator.run(phase(35 * MiB)[0])  # fits the 40 MiB between them
    assert walked_before == 2 and allocator._live[1].address == 120 * MiB and allocator.reserved_bytes == 80 * MiB


# -- laws


SETTINGS = [
    "", "max_split_size_mb:32", "roundup_power2_divisions:4", "garbage_collection_threshold:0.5",
    "expandable_segments:True", "large_segment_size_mb:32", "expandable_segments:True,max_split_size_mb:20",
]  # fmt: skip
GC_ALLOWED = 200 * MiB


def rules_of(text: str, capacity: int | None, rule: TieRule = "oldest segment", down: bool = False) -> CudaRules:
    allowed = GC_ALLOWED if "garbage" in text else None
    found = CudaRules.from_settings(text, capacity_bytes=capacity)
    return replace(found, allowed_bytes=allowed, tie_rule=rule, addresses_down=down)


def scenario(seed: int, count: int) -> list[Event]:
    """Allocations of all sizes on two streams; frees, some of them of held blocks."""
    rng = random.Random(seed)
    live: list[Event] = []
    events: list[Event] = []
    for name in range(1, count + 1):
        size = int(2 ** rng.uniform(0, 26))
        live.append(Event(name, size, rng.choice((0, 0, 0, 7))))
        events.append(live[-1])
        while live and rng.random() < 0.47:
            block, size, stream = live.pop(rng.randrange(len(live)))
            events += [Event(block, 0, stream)] * (rng.random() < 0.1) + [Event(block, -size, stream)]
    return events


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SETTINGS), st.sampled_from([None, 60 * MiB, 150 * MiB, 400 * MiB]))
def test_blocks_tile_their_segments_and_the_sums_are_the_allocators(seed: int, text: str, capacity: int | None) -> None:
    rules = rules_of(text, capacity, TIE_RULES[seed % 3], seed % 2 == 1)
    allocator = CachingAllocator(rules)
    for place, event in enumerate(scenario(seed, 100)):
        result = allocator.run(Phase("one", (event,)))
        if place % 7 == 0 and not result.out_of_memory:
            walked(allocator)
        assert allocator.allocated_bytes <= allocator.reserved_bytes <= result.peak_reserved_bytes
        limit = min(x for x in (capacity, rules.allowed_bytes, 1 << 60) if x is not None)
        assert result.peak_reserved_bytes <= limit
        if result.out_of_memory:
            break


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SETTINGS))
def test_phases_add_up_to_one_phase(seed: int, text: str) -> None:
    events, rules = scenario(seed, 100), rules_of(text, None)
    whole = replay_cuda([Phase("first", tuple(events))], rules)
    parts = replay_cuda([Phase("first", tuple(events[i : i + 9])) for i in range(0, len(events), 9)], rules)
    assert (whole.peak_reserved_bytes, whole.peak_allocated_bytes) == (
        parts.peak_reserved_bytes,
        parts.peak_allocated_bytes,
    )
    assert whole.phases == parts.phases and sum(whole.retries) == sum(parts.retries)


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


def later(template: list[Event], number: int) -> tuple[Phase, list[int]]:
    """The template with its blocks' names those of the n-th copy, after freeing what the copy before left behind."""
    left = {event.block: event for event in template}
    for event in template:
        if event.bytes < 0:
            left.pop(event.block, None)
    base = number * 10_000
    stale = tuple(Event(base - 10_000 + e.block, -e.bytes, e.stream) for e in left.values())
    own = tuple(Event(base + e.block, e.bytes, e.stream) for e in template)
    return Phase("later", own + stale), [base + block for block in left]


def repeats(seed: int, text: str, capacity: int | None) -> bool:
    """Whether a state came again as it was some micro-batches before; asserts that from then on all of them do."""
    template = scenario(seed, 40)
    allocator = CachingAllocator(rules_of(text, capacity, TIE_RULES[seed % 3], seed % 2 == 1))
    keys: list[object] = []
    results: list[object] = []
    period = 0
    for number in range(1, 12):
        one, kept = later(template, number)
        results.append(allocator.run(one))
        if allocator.out_of_memory:
            assert not period
            return False
        keys.append(allocator.state_key(kept))
        if period:
            assert (results[-1], keys[-1]) == (results[-1 - period], keys[-1 - period])
        elif keys[-1] in keys[:-1]:  # two that take turns, where what one leaves behind is freed by the next
            period = keys[::-1].index(keys[-1], 1)
    return period > 0


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SETTINGS), st.sampled_from([None, 400 * MiB]))
def test_equal_states_go_on_alike(seed: int, text: str, capacity: int | None) -> None:
    repeats(seed, text, capacity)


@pytest.mark.parametrize("text", SETTINGS)
def test_equal_states_are_found(text: str) -> None:
    assert sum(repeats(seed, text, 400 * MiB) for seed in range(12)) >= (1 if "garbage" in text else 4)


def test_a_state_tells_layouts_free_blocks_and_named_places_apart() -> None:
    def key(*sizes: int, names: tuple[int, ...] = ()) -> object:
        allocator = CachingAllocator(CudaRules())
        allocator.run(phase(*sizes)[0])
        return allocator.state_key(names)

    assert key(30 * MiB, 40 * MiB) == key(30 * MiB, 40 * MiB)
    assert key(30 * MiB, 40 * MiB) != key(40 * MiB, 30 * MiB)
    assert key(30 * MiB, 40 * MiB) != key(30 * MiB, 40 * MiB, -1)
    assert key(30 * MiB, 30 * MiB) == key(30 * MiB, 30 * MiB, -1, 30 * MiB)  # the third lies where the first did
    assert key(30 * MiB, 30 * MiB, names=(1, 2)) != key(30 * MiB, 30 * MiB, names=(2, 1))


def test_out_of_memory_ends_a_phase_and_the_allocator() -> None:
    allocator = CachingAllocator(CudaRules(capacity_bytes=50 * MiB))
    result = allocator.run(phase(30 * MiB, 30 * MiB, 2 * MiB)[0])
    assert result.out_of_memory and result.peak_reserved_bytes == 30 * MiB and allocator.out_of_memory
    with pytest.raises(ValueError, match="ran out"):
        allocator.run(phase(512)[0])


def test_nothing_was_reserved_by_no_phases() -> None:
    assert replay_cuda([], CudaRules()) == CudaReplay(0, 0, (), ())
