"""Random allocations and frees on a virtual GPU, and beside each the replay's own count. Prints what differs first.

    autoaccum virtual-gpu --memory 2GiB --context 0 -- python tests/replay_fuzz.py SEEDS [SETTINGS]

A line of JSON for each setting, with how often memory ran short.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import replace
from typing import Any

import torch
from allocator_text import VERSION, has_large_segments, reset_settings, set_settings

from autoaccum.devices.virtual import control
from autoaccum.simulation.cuda_allocator.allocator import CachingAllocator, CudaRules
from autoaccum.simulation.cuda_allocator.settings import MiB
from autoaccum.simulation.cuda_allocator.snapshot import AllocatorState
from autoaccum.simulation.cuda_allocator.ties import OLDEST_SEGMENT, tie_rule_of
from autoaccum.simulation.recording import Event, Phase

SETTINGS = [
    "expandable_segments:False",
    "max_split_size_mb:21",
    "roundup_power2_divisions:[1:8,2:2,16:4,>:1]",
    "garbage_collection_threshold:0.6",
    "garbage_collection_threshold:0.8,max_split_size_mb:32",
    "large_segment_size_mb:32",
    "large_segment_size_mb:64,max_split_size_mb:64",
    "expandable_segments:True",
    "expandable_segments:True,max_split_size_mb:21",
    "expandable_segments:True,roundup_power2_divisions:4,garbage_collection_threshold:0.6",
    "max_split_size_mb:40,max_non_split_rounding_mb:25",  # last: torch 2.9 never takes the latter back
    "expandable_segments:True,large_segment_size_mb:30",
]
EVENTS = 200
TIE_RULE = tie_rule_of(torch.__version__) or OLDEST_SEGMENT
DOWN = os.environ["AUTOACCUM_GPU_ADDRESSES"] == "down"


class Real:
    """The allocator that PyTorch runs."""

    def __init__(self) -> None:
        self.streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
        self.tensors: dict[int, torch.Tensor] = {}

    def run(self, event: Event, side: int) -> bool:
        """Whether it ran out."""
        if event.bytes <= 0:
            tensor = self.tensors.pop(event.block)
            if event.bytes == 0:
                tensor.record_stream(self.streams[1 - side])
            return False
        try:
            with torch.cuda.stream(self.streams[side]):
                self.tensors[event.block] = torch.empty(event.bytes, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            return True
        return False


def first_segment() -> tuple[int, int]:
    """Where the device's addresses begin, and where the first 2 MiB end."""
    tensor = torch.empty(1, dtype=torch.uint8, device="cuda")
    begin = tensor.data_ptr()
    del tensor
    torch.cuda.empty_cache()
    return begin, begin + 2 * MiB


def figures() -> tuple[int, int, int]:
    """Reserved, allocated, retries."""
    stats = torch.cuda.memory_stats()
    return stats["reserved_bytes.all.current"], stats["allocated_bytes.all.current"], stats["num_alloc_retries"]


def size_of(rng: random.Random) -> int:
    """Any size up to 64 MiB, or one of a few, so that free blocks of the same size have to be distinguished."""
    if rng.random() < 0.4:
        return rng.choice((700, 300_000, 3 * MiB, 12 * MiB, 20 * MiB, 30 * MiB))
    return int(2 ** rng.uniform(0, rng.choice((20, 24, 26))))


def one(seed: int, setting: str) -> dict[str, int]:
    """Runs a random course of events; raises where the two differ."""
    rng = random.Random(f"{seed} {setting}")
    real = Real()
    total = torch.cuda.mem_get_info()[1]
    set_settings(setting)
    rules = CudaRules.from_settings(setting, device_bytes=total, capacity_bytes=total, version=VERSION)
    rules = replace(rules, tie_rule=TIE_RULE, addresses_down=DOWN)
    outermost = first_segment()
    limit = rng.choice((60, 120, 240, 480)) * MiB
    if "garbage" in setting or rng.random() < 0.3:
        torch.cuda.set_per_process_memory_fraction(limit / total)
        rules = replace(rules, allowed_bytes=int(limit / total * total))
    else:
        control.set_other(0, total - limit)
        rules = replace(rules, capacity_bytes=limit)
    allocator = CachingAllocator(rules)
    live: list[tuple[Event, int]] = []
    pending: list[Event] = []  # held by the other stream until the next allocation looks whether it is done
    addresses: list[int] = []
    name, ran_out, retries, begun = 0, 0, figures()[2], rng.random() < 0.5 and "garbage" not in setting
    for place in range(EVENTS):
        if place == 50 and begun:  # go on from a snapshot
            found = AllocatorState.from_snapshot(torch.cuda.memory_snapshot(), outermost=outermost)
            allocator, retries = CachingAllocator(rules, found), figures()[2]
            live = [(Event(-real.tensors[e.block].data_ptr(), e.bytes, e.stream), side) for e, side in live]
            real.tensors = {-tensor.data_ptr(): tensor for tensor in real.tensors.values()}
            pending = [event._replace(block=-address) for event, address in zip(pending, addresses, strict=True)]
        if live and rng.random() < 0.48:
            made, side = live.pop(rng.randrange(len(live)))
            held = rng.random() < 0.1
            event = made._replace(bytes=0 if held else -made.bytes)
            if held:
                pending.append(made._replace(bytes=-made.bytes))
                addresses.append(real.tensors[made.block].data_ptr())
        else:
            name, side = name + 1, int(rng.random() < 0.2)
            event = Event(name, size_of(rng), side and real.streams[1].cuda_stream)
            live.append((event, side))
        course = [*pending, event] if event.bytes > 0 else [event]
        if event.bytes > 0:
            pending, addresses = [], []
        result = allocator.run(Phase("one", tuple(course)))
        failed = real.run(event, side)
        said = (allocator.reserved_bytes, allocator.allocated_bytes, allocator.retries + retries)
        if said != figures() or failed != result.out_of_memory:
            raise AssertionError(
                f"{setting} seed {seed} event {place} {event}: {said} {result}, real {figures()} {failed}"
            )
        if failed:
            ran_out = 1
            break
    return {"ran out": ran_out, "retries": allocator.retries, "from a snapshot": int(begun)}


def reset() -> None:
    torch.cuda.set_per_process_memory_fraction(1.0)
    control.set_other(0, 0)
    torch.cuda.empty_cache()
    reset_settings()
    assert torch.cuda.memory_reserved() == 0


def main() -> None:
    """Some seeds in each setting."""
    settings: Any = SETTINGS if len(sys.argv) < 3 else [SETTINGS[int(i)] for i in sys.argv[2].split(",")]
    for setting in settings:
        if "large_segment" in setting and not has_large_segments():
            continue
        sums = {"ran out": 0, "retries": 0, "from a snapshot": 0, "wrong": 0}
        first = ""
        for seed in range(int(sys.argv[1])):
            reset()
            try:
                for key, number in one(seed, setting).items():
                    sums[key] += number
            except (AssertionError, RuntimeError, KeyError) as error:
                sums["wrong"] += 1
                first = first or repr(error)[:700]
        print(json.dumps({"setting": setting} | sums | {"first": first}), flush=True)


if __name__ == "__main__":
    main()
