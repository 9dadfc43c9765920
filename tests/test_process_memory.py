"""What the process says of its own memory, against what was really taken; limits are the kernel's own."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time

import pytest
import torch

from autoaccum import process_memory
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.devices.cpu.peak_sampler import PeakSampler
from autoaccum.process_memory import available_bytes, committed_bytes, in_use_bytes

MIB = 2**20

LIMITED = """
import json, resource, torch
from autoaccum.devices import oom
from autoaccum.process_memory import committed_bytes, data_limited, fix_mmap_threshold, limit_data

fix_mmap_threshold()
MIB, answers = 2**20, []

def fits(mib):
    try:
        torch.empty(mib * MIB, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        assert oom.is_out_of_memory(error), error
        return False
    return True

before = resource.getrlimit(resource.RLIMIT_DATA)
answers.append(fits(300))
with data_limited(committed_bytes() + 100 * MIB):
    answers += [fits(90), fits(110)]
    inner = resource.getrlimit(resource.RLIMIT_DATA)
    with data_limited(committed_bytes() + 500 * MIB):  # a wider one inside doesn't widen
        answers += [fits(110), resource.getrlimit(resource.RLIMIT_DATA) == inner]
answers += [fits(300), resource.getrlimit(resource.RLIMIT_DATA) == before]
try:
    with data_limited(committed_bytes() + 100 * MIB):
        raise KeyboardInterrupt
except KeyboardInterrupt:
    answers.append(resource.getrlimit(resource.RLIMIT_DATA) == before)
limit_data(committed_bytes() + 100 * MIB)
answers.append(fits(110))
print(json.dumps(answers))
"""


def test_a_limit_is_the_kernels_own_and_is_put_back() -> None:
    out = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [True, True, False, False, True, True, True, True, False]


def test_bytes_in_use_grow_and_shrink_by_what_malloc_hands_out() -> None:
    before = in_use_bytes()
    if before is None:
        pytest.skip("needs glibc's mallinfo2")
    block = bytearray(64 * MIB)
    held = in_use_bytes()
    del block
    after = in_use_bytes()
    assert held is not None and after is not None
    assert held - before == pytest.approx(64 * MIB, abs=MIB)
    assert after - before == pytest.approx(0, abs=MIB)


PEAKS = """
import json
from autoaccum.process_memory import begin_resident_peak, resident_peak_bytes

def touch(mib):
    block = bytearray(mib * 2**20)
    block[::4096] = b"x" * (len(block) // 4096)

start = resident_peak_bytes()
touch(128)
large, forgets = resident_peak_bytes(), begin_resident_peak()
forgotten = resident_peak_bytes()
touch(64)
since = resident_peak_bytes()
print(json.dumps([start, large, forgets, forgotten, since]))
"""


def test_a_resident_peak_is_of_what_came_since_the_moment() -> None:
    out = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    start, large, forgets, forgotten, since = json.loads(out.stdout)
    assert large - start == pytest.approx(128 * MIB, abs=4 * MIB)
    if not forgets:
        pytest.skip("no /proc/self/clear_refs here")
    assert forgotten - start == pytest.approx(0, abs=4 * MIB)
    assert since - start == pytest.approx(64 * MIB, abs=4 * MIB)


def test_a_sampler_sees_a_block_that_was_there_for_a_moment() -> None:
    with PeakSampler() as sampler:
        before = committed_bytes()
        block = bytearray(256 * MIB)
        block[::4096] = b"x" * (len(block) // 4096)
        time.sleep(0.05)  # what came before held the interpreter's lock, and a busy machine delays the watcher
        del block
    assert sampler.committed_peak_bytes - before == pytest.approx(256 * MIB, abs=2 * MIB)
    assert committed_bytes() - before < 2 * MIB


def test_what_is_available_is_less_than_what_the_machine_has() -> None:
    whole = process_memory.PAGE_BYTES * __import__("os").sysconf("SC_PHYS_PAGES")
    found = available_bytes()
    assert found is not None and 0 < found < whole


def test_what_planning_holds_outside_of_malloc_is_no_part_of_a_fresh_process() -> None:
    before = process_memory.read_heap()
    device = CpuDevice(torch.device("cpu"))
    lean = device.read_baseline(before, before)
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        found = device.read_baseline(before, before)
        assert len(held) == 64 * MIB
    assert 64 * MIB <= found.planning_bytes - lean.planning_bytes < 65 * MIB
    assert abs(found.bytes - lean.bytes) < MIB
