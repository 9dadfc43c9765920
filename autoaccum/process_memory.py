"""This process's own memory, as Linux and the C library count it.

*Committed* bytes are the private writable pages of the process (VmData): what RLIMIT_DATA limits. *Resident* bytes are
those that are in memory now. *In use* are the bytes that malloc has handed out. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MMAP_THRESHOLD_BYTES = 128 * 1024  # glibc's own DEFAULT_MMAP_THRESHOLD_MIN, held fixed
PAGE_CACHE = "libautoaccum-pages.so"

_M_MMAP_THRESHOLD = -3  # malloc.h
_PROBE_BYTES = 1 << 20
_PROBES = 3  # another thread may free as much in between
_KNOWN_MALLOCS = ("jemalloc", "tcmalloc", "mimalloc", "hoard", "snmalloc")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def glibc() -> ctypes.CDLL | None:
    """Return the C library where it has mallinfo2, else None.

    It must be glibc 2.33 or newer, with its own malloc.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallinfo2") and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return None
    libc.mallinfo2.restype = _Mallinfo2
    return libc if any(_counts(libc) for _ in range(_PROBES)) else None


def _counts(libc: ctypes.CDLL) -> bool:
    """Return whether glibc's statistics count what malloc hands out.

    Not where another allocator replaces malloc.

    jemalloc and tcmalloc come by LD_PRELOAD or in the executable, and leave mallinfo2 and mallopt to glibc.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    before = libc.mallinfo2()
    block = libc.malloc(_PROBE_BYTES)
    if not block:
        return False
    after = libc.mallinfo2()
    libc.free(block)
    grown = after.uordblks + after.hblkhd - before.uordblks - before.hblkhd
    return bool(grown >= _PROBE_BYTES)


def malloc_name() -> str:
    """Return whose malloc this is: "glibc", the replacing file, or "another"."""
    if glibc() is not None:
        return "glibc"
    with contextlib.suppress(OSError):
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
        return next((Path(path).name for path in sorted(paths) if any(n in path for n in _KNOWN_MALLOCS)), "another")
    return "another"


def replaces_malloc(preload: str) -> bool:
    """Return whether LD_PRELOAD names an allocator or a sanitizer."""
    return any(name in preload for name in (*_KNOWN_MALLOCS, "libasan", "libtsan", "libmsan"))


def hide_page_cache(environment: MutableMapping[str, str]) -> None:
    """Take the page cache out of LD_PRELOAD, for processes yet to start."""
    entries = environment.get("LD_PRELOAD", "").split(":")
    if any(PAGE_CACHE in entry for entry in entries):
        environment["LD_PRELOAD"] = ":".join(entry for entry in entries if PAGE_CACHE not in entry)
        if not environment["LD_PRELOAD"]:
            del environment["LD_PRELOAD"]


@dataclass(frozen=True)
class PageCache:
    """What the page cache holds (devices/cpu/source/cache.h); all 0 where there is none.

    Attributes:
        live_bytes: In blocks that are in use.
        kept_bytes: Free, and committed all the same.
        peak_bytes: The most that was live since the start or the last trim.
        committed_bytes: Taken from the kernel since the start.
        returned_bytes: Given back to it since the start.
        moved_bytes: Free pages that were put side by side, in that many `pieces`.
    """

    live_bytes: int = 0
    kept_bytes: int = 0
    peak_bytes: int = 0
    committed_bytes: int = 0
    returned_bytes: int = 0
    moved_bytes: int = 0
    pieces: int = 0


class _PageCacheCounts(ctypes.Structure):
    _fields_ = [(each.name, ctypes.c_uint64) for each in fields(PageCache)]


_joined: list[ctypes.CDLL] = []


def _page_cache() -> ctypes.CDLL | None:
    """Return the page cache's library, preloaded or joined; else None."""
    if not _joined and hasattr(preloaded := ctypes.CDLL(None), "autoaccum_cache_counts"):
        _joined.append(preloaded)
    return _joined[0] if _joined else None


def has_page_cache() -> bool:
    """Return whether this process has a page cache, serving or not."""
    return _page_cache() is not None


def reserve_page_cache() -> bool:
    """Reserve the page cache's addresses, once; return whether it has them."""
    cache = _page_cache()
    return cache is not None and bool(cache.autoaccum_cache_reserve())


def page_cache_serves() -> bool:
    """Return whether large blocks come from the page cache."""
    cache = _page_cache()
    return cache is not None and bool(cache.autoaccum_cache_serves())


def join_page_cache(library: Path) -> str:
    """Have a page cache serve libc10.so; return why not, or "".

    Blocks that were taken before are freed as before. `serve_from_page_cache` switches it off.
    """
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        return f"its library can't be loaded ({error})"
    if not loaded.autoaccum_cache_join():
        return "the process has no libc10.so whose calls it could take"
    _joined.append(loaded)
    return ""


def serve_from_page_cache(serve: bool) -> None:
    """Take large blocks from the page cache, or from malloc again.

    Those that it handed out stay valid.
    """
    cache = _page_cache()
    if cache is not None:
        cache.autoaccum_cache_serve(ctypes.c_bool(serve))


def read_page_cache() -> PageCache:
    """Read what the page cache holds now."""
    cache, counts = _page_cache(), _PageCacheCounts()
    if cache is not None:
        cache.autoaccum_cache_counts(ctypes.byref(counts))
    return PageCache(*(getattr(counts, each.name) for each in fields(PageCache)))


_fixed: list[int] = []


def fix_mmap_threshold(threshold_bytes: int = MMAP_THRESHOLD_BYTES) -> bool:
    """Make malloc map every block of at least that size separately.

    By default the threshold moves up whenever a large block is freed, and large blocks then fragment the heap
    differently in each run: no prediction of committed or resident bytes holds to better than a quarter.

    Returns:
        Whether the C library took it. It can't be undone within the process.
    """
    libc = glibc()
    taken = libc is not None and libc.mallopt(_M_MMAP_THRESHOLD, threshold_bytes) == 1
    if taken:
        _fixed[:] = [threshold_bytes]
    return taken


def fixed_threshold_bytes() -> int | None:
    """Return the fixed threshold; None where it wasn't fixed."""
    return _fixed[0] if _fixed else None


@dataclass(frozen=True)
class Heap:
    """Malloc's heaps: bytes obtained from the system, without separate mappings.

    Attributes:
        taken_bytes: All of it.
        free_bytes: The part that isn't handed out: small blocks fill it before the heap grows.
        outside_bytes: What the process has committed beside malloc and the page cache: data of libraries, threads'
            stacks, the pools that Python keeps for its small objects.
        in_use_bytes: What both have handed out, blocks that are mappings of their own among it.
    """

    taken_bytes: int = 0
    free_bytes: int = 0
    outside_bytes: int = 0
    in_use_bytes: int = 0


def read_heap() -> Heap:
    """Malloc's heaps now; all is outside of them where unknown."""
    libc = glibc()
    if libc is None:
        return Heap(outside_bytes=committed_bytes())
    info, cache = libc.mallinfo2(), read_page_cache()
    arena, mapped = int(info.arena), int(info.hblkhd)
    outside = committed_bytes() - arena - mapped - cache.live_bytes - cache.kept_bytes
    return Heap(arena, int(info.fordblks), outside, int(info.uordblks) + mapped + cache.live_bytes)


def in_use_bytes() -> int | None:
    """Bytes handed out by malloc and the page cache; None where unknown."""
    libc = glibc()
    if libc is None:
        return None
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd) + read_page_cache().live_bytes


def trim() -> None:
    """Return the heap's top and the cache's free pages to the system."""
    cache = _page_cache()
    if cache is not None:
        cache.autoaccum_cache_trim()
    libc = glibc()
    if libc is not None:
        libc.malloc_trim(0)


def read_memory(statm: int | None = None) -> tuple[int, int]:
    """Read committed and resident bytes of this process.

    Args:
        statm: An open descriptor of /proc/self/statm, for who reads often.
    """
    text = os.pread(statm, 256, 0) if statm is not None else Path("/proc/self/statm").read_bytes()
    fields = text.split()
    return int(fields[5]) * PAGE_BYTES, int(fields[1]) * PAGE_BYTES


def committed_bytes() -> int:
    """Private writable bytes of this process: what a data limit limits."""
    return read_memory()[0]


def available_bytes() -> int | None:
    """Read the machine's MemAvailable, in bytes; None where it isn't reported."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return None


def begin_resident_peak() -> bool:
    """Have the kernel forget the highest resident size so far, for `resident_peak_bytes`.

    proc(5), /proc/pid/clear_refs: 5 sets VmHWM back to what is resident now. It is one for the whole process, so the
    last caller's moment counts. (`getrusage`'s ru_maxrss may also be of what the process was before its exec.)

    Returns:
        Whether the kernel did; where not, `resident_peak_bytes` counts from the process's start.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_peak_bytes() -> int:
    """Read the resident peak (VmHWM) since `begin_resident_peak`, or since the start.

    Exact: the kernel keeps it, no sampling. Committed bytes have no such mark.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_data(size: int) -> None:
    """Limit committed bytes: beyond, allocations fail, which can be recovered from.

    A lower limit that is there already stays.
    """
    present = resource.getrlimit(resource.RLIMIT_DATA)
    tightest = min([size, *(limit for limit in present if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (tightest, present[1]))


@contextlib.contextmanager
def data_limited(size: int) -> Iterator[None]:
    """Apply `limit_data` within a context; restore the previous limit.

    What goes over it raises the device's out-of-memory (see `oom.is_out_of_memory`) instead of having the kernel kill
    the process once the machine's memory is used up.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit_data(size)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
