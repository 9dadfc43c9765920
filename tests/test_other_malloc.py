"""Another malloc than glibc's (jemalloc, tcmalloc by LD_PRELOAD) is known for another, by a real allocation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from autoaccum import Workload, fit_plan, process_memory

# Hands out pieces of one mapping, takes nothing back, and leaves mallinfo2 and mallopt to glibc, as jemalloc does.
SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
static char *next, *end;
static int lock;
void *memalign(size_t alignment, size_t size) {
    while (__sync_lock_test_and_set(&lock, 1)) {}
    if (!next) {
        next = mmap(0, 1UL << 36, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        end = next + (1UL << 36);
    }
    char *at = (char *)(((size_t)next + 16 + alignment - 1) / alignment * alignment);
    next = at + size;
    ((size_t *)at)[-1] = size;
    __sync_lock_release(&lock);
    return next < end ? at : 0;
}
void *malloc(size_t size) { return memalign(16, size); }
void free(void *block) {}
void *calloc(size_t n, size_t size) { return malloc(n * size); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void **block, size_t alignment, size_t size) {
    return (*block = memalign(alignment, size)) ? 0 : ENOMEM;
}
void *realloc(void *block, size_t size) {
    void *made = malloc(size);
    if (block && made) memcpy(made, block, ((size_t *)block)[-1] < size ? ((size_t *)block)[-1] : size);
    return made;
}
"""
ASKS = """
import json
from autoaccum import process_memory as memory
print(json.dumps([memory.malloc_name(), memory.fix_mmap_threshold(), memory.in_use_bytes()]))
"""


def asked(preload: str) -> list[object]:
    env = {**os.environ, "LD_PRELOAD": preload}
    done = subprocess.run([sys.executable, "-c", ASKS], env=env, capture_output=True, text=True, timeout=60, check=True)
    found: list[object] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_malloc_that_takes_the_name_is_not_taken_for_glibc(tmp_path: Path) -> None:
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", library, source], check=True)
    assert asked(str(library)) == ["another", False, None]


@pytest.mark.parametrize("name", ["libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libmimalloc.so.2"])
def test_known_ones_are_named(name: str) -> None:
    found = [path for folder in Path("/usr/lib").glob("*-linux-gnu") for path in folder.glob(name)]
    if not found:
        pytest.skip(f"{name} is not installed")
    said, taken, in_use = asked(str(found[0]))
    assert str(said).startswith(name.split(".so")[0]) and (taken, in_use) == (False, None)


def test_glibc_is_known_for_itself() -> None:
    assert process_memory.malloc_name() == "glibc" and process_memory.in_use_bytes()


def test_a_plan_with_another_malloc_has_no_threshold_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "glibc", lambda: None)
    work = Workload(nn.Linear(64, 10), (torch.randn(4, 64), torch.zeros(4, dtype=torch.long)))
    plan = fit_plan(work, target_batch=64, check=False, timing_seconds=0)
    assert (plan.device.mmap_threshold_bytes, plan.memory.malloc_overhead, plan.split) == (None, 0.25, (64,))
    assert any(note.startswith("malloc is another, not the C library's") for note in plan.notes)
