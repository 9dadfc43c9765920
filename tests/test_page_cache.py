"""The page cache of a CPU's tensors: its own rules against a model, in processes, under limits, and in plans."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoaccum import Plan, Runner, Workload, fit_plan, process_memory
from autoaccum.devices.cpu import page_cache
from autoaccum.errors import UsageError
from autoaccum.processes.child import call

HERE = Path(__file__).parent
SOURCES = Path(page_cache.__file__).parent / "source"
MIB = 1 << 20
pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(process_memory.glibc() is None, reason="malloc is not glibc's"),
]

# -- its rules, against a model

VARIANTS = {"": [], "stubborn": ["-DCACHE_MREMAP=stubborn"], "renewing": ["-DCACHE_MOST_PIECES=40"]}


@functools.cache
def driver(variant: str, folder: Path, *flags: str) -> Path:
    program = folder / f"driver-{variant or 'plain'}"
    sources = [SOURCES / "cache.c", SOURCES / "blocks.c", HERE / "page_cache_driver.c"]
    options = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", *VARIANTS[variant], *flags]
    subprocess.run(["cc", *options, "-o", program, *sources, "-lpthread"], check=True)
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("driver")


def driven(command: list[Any], timeout: float = 120) -> dict[str, int]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "operations", [50_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_random_operations_leave_every_block_as_it_was_filled(variant: str, operations: int, folder: Path) -> None:
    """After each one, what is committed is the most that was alive, whatever the order."""
    found = driven([driver(variant, folder), "random", operations, 7], timeout=500)
    assert found["pieces"] > 100 and found["moved"] > 100 * MIB
    assert found["committed"] < 10 * found["peak"] or variant == "renewing"  # trimmed now and then


@pytest.mark.parametrize("variant", ["", "stubborn"])
@pytest.mark.parametrize("order", ["threads 20000", "fork 2000", "limit 64"])
def test_threads_forks_and_limits(variant: str, order: str, folder: Path) -> None:
    driven([driver(variant, folder), *order.split(), 11])


def test_pages_on_their_way_are_in_no_other_threads_limit(folder: Path) -> None:
    """While they move, /proc counts them twice; a mapping under a limit that leaves 4 MiB is never refused."""
    found = driven([driver("", folder), "moving", 64, 0])
    assert found["mapped"] >= 1000 and found["moved"] >= 40 * 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("order", ["threads 20000", "fork 1000"])
def test_no_data_race(order: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ThreadSanitizer ends the program with an error at the first one.

    A forked process doesn't join its parent's thread, which may have ended by then: that is no race.
    """
    monkeypatch.setenv("TSAN_OPTIONS", "report_thread_leaks=0")
    made = folder / "thread"
    made.mkdir(exist_ok=True)
    driven([driver("", made, "-fsanitize=thread"), *order.split(), 11])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_no_invalid_access(folder: Path) -> None:
    driven(["valgrind", "-q", "--error-exitcode=9", driver("", folder), "random", 20_000, 11])


# -- in a process with torch: preloaded, or joined while it runs

PROCESS = """
import ctypes, gc, json, os, resource, sys, threading, torch
from autoaccum import process_memory as memory
from autoaccum.devices.cpu.peak_sampler import PeakSampler
MIB = 1 << 20
if sys.argv[1] == "joined":
    held = torch.ones(MIB)  # taken from malloc, freed while the cache serves
    assert memory.join_page_cache(__import__("pathlib").Path(sys.argv[2])) == ""
    del held
assert memory.page_cache_serves()
found = {}
first, small = torch.ones(MIB), torch.ones(1000)
found["live"] = memory.read_page_cache().live_bytes
heap = memory.read_heap()
found["outside"] = memory.committed_bytes() - heap.taken_bytes - heap.outside_bytes  # the cache's, and mappings
others = []
thread = threading.Thread(target=lambda: others.append(torch.full((3 * MIB,), 7.0)))
thread.start(); thread.join()
assert float(others[0].sum()) == 7.0 * 3 * MIB
others.clear()  # taken by a thread that is gone
found["kept"] = memory.read_page_cache().kept_bytes
again = torch.zeros(2 * MIB)
found["reused"] = found["kept"] - memory.read_page_cache().kept_bytes
child = os.fork()
if not child:
    again += 1
    del first
    os._exit(0 if float(again.sum()) == 2.0 * MIB and torch.ones(5 * MIB).sum() == 5 * MIB else 1)
assert os.waitpid(child, 0)[1] == 0 and float(again.sum()) == 0 and float(first.sum()) == MIB
first.resize_(4 * MIB)
assert float(first[:MIB].sum()) == MIB
first.untyped_storage().resize_(4)
del again, first
gc.collect()
found["left"] = memory.read_page_cache().live_bytes
memory.trim()
assert memory.read_page_cache().kept_bytes == 0
memory.serve_from_page_cache(False)
plain = torch.ones(MIB)
found["off"] = memory.read_page_cache().live_bytes
memory.serve_from_page_cache(True)
del plain

with PeakSampler() as sampler:
    for _ in range(40):
        parts = [torch.ones(6 * MIB) for _ in range(4)]
        del parts[::2]
        torch.ones(12 * MIB)  # made of two parts that lie apart: one of them is moved
        del parts
        memory.trim()
found["moved"] = memory.read_page_cache().moved_bytes
found["seen"] = sampler.committed_peak_bytes - sampler.baseline_bytes
memory.trim()

limit = memory.committed_bytes() + 64 * MIB
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
blocks, refused = [], 0
for turn in range(200):  # a limit that is hit in the middle, again and again
    try:
        blocks.append(torch.full((100_000 + 13_000 * (turn % 17),), float(turn)))
    except RuntimeError as error:
        assert "DefaultCPUAllocator: can't allocate memory" in str(error)
        refused += 1
        assert all(float(block[0]) == float(block[-1]) for block in blocks)
        del blocks[::2]
found["refused"] = refused
blocks.clear()
whole = memory.read_page_cache().kept_bytes
torch.ones(whole // 4)  # all that lay free, in one piece
found["whole"] = whole
print(json.dumps(found))
"""
FUNCTIONS = """
import ctypes, json, random, resource
from autoaccum import process_memory as memory
libc = ctypes.CDLL(None)
for name in ("realloc", "reallocarray", "malloc", "aligned_alloc", "memalign"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.malloc_usable_size.restype = ctypes.c_size_t
P, S = ctypes.c_void_p, ctypes.c_size_t
def aligned(alignment, size):
    block = P()
    code = libc.posix_memalign(ctypes.byref(block), S(alignment), S(size))
    return code or block.value
random.seed(1)
for alignment in (8, 16, 64, 512, 4096, 8192, 1 << 16, 1 << 21):
    for size in (0, 1, 1000, 131071, 131072, 131073, 3 << 20):
        block = aligned(alignment, size)
        assert block % alignment == 0, (alignment, size)
        assert libc.malloc_usable_size(P(block)) >= size
        if size:
            ctypes.memset(block, 7, size)
        libc.free(P(block))
assert aligned(3, 1 << 20) == 22 and aligned(0, 1 << 20) == 22 and aligned(24, 1 << 20) == 22  # EINVAL
assert aligned(64, (1 << 64) - 1) == 12 and aligned(64, 1 << 46) == 12  # ENOMEM
block, size = aligned(64, 200_000), 200_000
ctypes.memset(block, 5, size)
for _ in range(2000):  # through the heap and back
    new = random.choice((random.randrange(1, 300_000), random.randrange(1, 4 << 20)))
    block = libc.realloc(P(block), S(new)) if random.random() < 0.5 else libc.reallocarray(P(block), S(1), S(new))
    assert libc.malloc_usable_size(P(block)) >= new
    assert ctypes.string_at(block, min(new, size, 1000)) == b"\\5" * min(new, size, 1000)
    assert ctypes.string_at(block + min(new, size) - 1, 1) == b"\\5"
    ctypes.memset(block, 5, new)
    size = new
libc.free(P(block))
block = aligned(64, 1 << 20)
assert libc.realloc(P(block), S(0)) is None and libc.reallocarray(None, S(1 << 40), S(1 << 40)) is None
for take in (libc.malloc, lambda size: libc.aligned_alloc(64, size), lambda size: libc.memalign(64, size)):
    libc.free(P(take(S(1 << 20))))
libc.free(None)
print(json.dumps(memory.read_page_cache().live_bytes))
"""


@functools.cache
def process(code: str, how: str) -> Any:
    library = page_cache.built_library()
    env = page_cache.environment("cached") if how == "preloaded" else dict(os.environ)
    command = [sys.executable, "-c", code, how, str(library)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["preloaded", pytest.param("joined", marks=pytest.mark.slow)])
def test_tensors_come_from_it_and_keep_their_values(how: str) -> None:
    found = process(PROCESS, how)
    assert found["live"] == 4 * MIB and found["outside"] >= 4 * MIB
    assert found["kept"] == 12 * MIB and found["reused"] == 8 * MIB
    assert found["left"] == 0 and found["off"] == 0
    assert found["moved"] >= 40 * 24 * MIB and found["seen"] < 100 * MIB  # what is moved isn't counted twice
    assert 2 < found["refused"] < 150 and 40 * MIB < found["whole"] < 66 * MIB


def test_the_c_librarys_functions_know_its_blocks() -> None:
    assert process(FUNCTIONS, "preloaded") == 0


# -- in plans


class Wide(nn.Module):
    """Sizes that fall below the threshold and above it, with holes for a best fit to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((64, 700), (700, 333), (333, 2048), (2048, 10)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def wide() -> Workload:
    torch.manual_seed(0)
    return Workload(Wide(), (torch.randn(16, 64), torch.randint(10, (16,))))


ASKED = {"target_batch": 4000, "max_micro_batch": 2000, "check": False, "timing_seconds": 0}
TRAINS = """
import json, sys
from test_page_cache import wide
from autoaccum import OutOfMemory, Plan, Runner, process_memory
from autoaccum.data import split
from autoaccum.devices import oom
plan = Plan.load(sys.argv[1])
work = wide()
batch = split.tile(work.sample, 4000)
runner = Runner(work, plan)
process_memory.limit_data(int(float(sys.argv[2]) * plan.predicted_peak_bytes))
for _ in range(3):
    runner.step(batch)
print(json.dumps([runner.micro_batch, process_memory.read_page_cache().peak_bytes, process_memory.committed_bytes()]))
"""


@pytest.mark.slow  # tests/test_prediction.py has the same of a model, preloaded
def test_a_plan_in_python_is_for_the_page_cache_and_right_to_half_a_percent(tmp_path: Path) -> None:
    code = (
        "import sys; from test_page_cache import wide, ASKED; from autoaccum import fit_plan;"
        "fit_plan(wide(), **ASKED, train_in_new_process=True).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "plan.json"], cwd=HERE, check=True)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.device.malloc == "cached" and plan.evidence.method == "replayed" and plan.split == (2000, 2000)
    assert plan.measured_peak_bytes is not None
    assert plan.predicted_peak_bytes == pytest.approx(plan.measured_peak_bytes, rel=0.005)
    trained = {}
    for share in (1.01, 0.98):
        command = [sys.executable, "-c", TRAINS, tmp_path / "plan.json", str(share)]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        trained[share] = json.loads(done.stdout)[0], "Out of memory" in done.stderr
    assert trained[1.01] == (2000, False), "it trains under 1.01 times its peak"
    assert trained[0.98][0] < 2000 and trained[0.98][1], "it runs out under 0.98 times its peak, and recovers"


@pytest.mark.slow
def test_fixed_is_fixed_also_where_the_cache_served_before() -> None:
    work = wide()
    assert fit_plan(work, **ASKED, verify=False).device.malloc == "cached" and process_memory.page_cache_serves()
    plan = fit_plan(work, **ASKED, verify=False, malloc="fixed")
    assert plan.device.malloc == "fixed" and not process_memory.page_cache_serves()
    assert Plan.from_json(plan.to_json()).device.malloc == "fixed"
    Runner(work, fit_plan(work, **ASKED, verify=False))
    assert process_memory.page_cache_serves()
    Runner(work, plan)
    assert not process_memory.page_cache_serves()


# -- its library, and plans without it


def test_it_is_compiled_once_and_in_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    started = time.process_time(), sum(os.times()[2:4])
    library = page_cache.built_library()
    taken = time.process_time() - started[0] + sum(os.times()[2:4]) - started[1]
    assert taken < 2  # processor seconds, on any machine of today; 0.4 on this one
    before = library.stat().st_mtime_ns
    assert page_cache.built_library() == library and library.stat().st_mtime_ns == before
    library.write_bytes(b"another's")
    assert page_cache.built_library().stat().st_size > 10_000
    preload = (page_cache.environment("cached") or {})["LD_PRELOAD"]
    assert preload.split(":")[0] == str(library)


def without_compiler(folder: Path, *, jemalloc: bool) -> dict[str, Any]:
    """A plan by the command line's ways where nothing compiles, and what its process had."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder))
        patched.setenv("CC", "no-such-compiler")
        patched.delenv("LD_PRELOAD", raising=False)
        if not jemalloc:
            patched.setattr(page_cache, "find_jemalloc", lambda: None)
        env = page_cache.environment("cached")
        arguments = {"workload": f"{HERE / 'test_page_cache.py'}:wide", "request": {**ASKED, "sizes": []}}
        found = Plan.from_json(call("planning.tasks:plan", arguments, env=env)["plan"])
    return {"plan": found, "env": env}


@pytest.mark.slow
def test_without_a_compiler_the_threshold_is_fixed_and_the_plan_says_why(tmp_path: Path) -> None:
    found = without_compiler(tmp_path, jemalloc=False)
    plan: Plan = found["plan"]
    assert found["env"] is None and plan.device.malloc == "fixed" and plan.device.mmap_threshold_bytes == 131072
    assert any("there is no no-such-compiler on the PATH. Each is mapped anew" in note for note in plan.notes)


@pytest.mark.slow
@pytest.mark.skipif(page_cache.find_jemalloc() is None, reason="no jemalloc on this machine")
def test_without_a_compiler_jemalloc_is_preloaded_and_the_plan_says_why(tmp_path: Path) -> None:
    found = without_compiler(tmp_path, jemalloc=True)
    plan: Plan = found["plan"]
    assert "libjemalloc" in found["env"]["LD_PRELOAD"] and "dirty_decay_ms:-1" in found["env"]["MALLOC_CONF"]
    assert plan.device.malloc == "jemalloc" and plan.memory.malloc_overhead == 0.25
    assert any("libjemalloc.so.2 is preloaded in its place" in note for note in plan.notes)
    assert page_cache.environment("jemalloc") is not None


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
import torch
from autoaccum.devices.cpu import page_cache
setting = page_cache.apply("cached")
assert setting.name == "fixed" and "ulimit -v" in setting.reason, setting
assert float(torch.ones(1 << 20).sum()) == 1 << 20
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["preloaded", "joined"])
def test_under_a_limit_on_addresses_malloc_serves(how: str) -> None:
    env = page_cache.environment("cached") if how == "preloaded" else None
    subprocess.run([sys.executable, "-c", LIMITED], env=env, timeout=120, check=True)


def test_nothing_is_preloaded_beside_another_malloc_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    assert page_cache.environment("cached") is None
    assert page_cache.environment("fixed", {"A": "b"}) == {"A": "b"} and page_cache.environment("default") is None


def test_a_folder_with_a_space_and_one_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a b"))
    env = page_cache.environment("cached")
    assert env is not None and env["LD_PRELOAD"].startswith(process_memory.PAGE_CACHE)
    asks = "from autoaccum import process_memory as memory; raise SystemExit(0 if memory.page_cache_serves() else 3)"
    assert subprocess.run([sys.executable, "-c", asks], env=env, check=False).returncode == 0
    (tmp_path / "a:b").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
    assert process_memory.PAGE_CACHE not in (page_cache.environment("cached") or {}).get("LD_PRELOAD", "")


def test_a_childs_own_children_preload_nothing() -> None:
    entries = {"LD_PRELOAD": f"/x/{process_memory.PAGE_CACHE}:/y/libother.so"}
    process_memory.hide_page_cache(entries)
    assert entries == {"LD_PRELOAD": "/y/libother.so"}
    entries = {"LD_PRELOAD": process_memory.PAGE_CACHE}
    process_memory.hide_page_cache(entries)
    assert entries == {}


def test_a_plan_that_needs_it_warns_where_it_can_not_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = fit_plan(wide(), **ASKED, verify=False)
    monkeypatch.setattr(process_memory, "_joined", [])

    def fails() -> Path:
        raise UsageError("There is no compiler.")

    monkeypatch.setattr(page_cache, "built_library", fails)
    page_cache.apply_planned(plan.device)
    assert "this process has 'fixed' (There is no compiler.)" in caplog.text
