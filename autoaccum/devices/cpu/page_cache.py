"""Choose malloc's setting for a process.

The page cache is a library of C (source/cache.c), preloaded into the child processes of the command line, or joined by
a process that runs already. Where it can't be built, another allocator that keeps its pages (jemalloc) is preloaded,
and where there is none, malloc's mmap threshold is fixed. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ... import process_memory
from ...errors import UsageError
from ...files.private import cache_folder, private_folder
from ...plan import DeviceSection
from ..compiled_library import CompiledLibrary, put_first

log = logging.getLogger("autoaccum")

CACHED, FIXED, DEFAULT, JEMALLOC = "cached", "fixed", "default", "jemalloc"
MALLOCS = (CACHED, FIXED, DEFAULT)  # what can be asked for
HELP = "cached: fast, and predictable memory; fixed: predictable; default: as it comes, with a quarter kept free."

LIBRARY = CompiledLibrary(
    title="The page cache",
    user="The page cache for tensors",
    why="It is one small library of C, compiled at its first use.",
    name=process_memory.PAGE_CACHE,
)
_SOURCES = Path(__file__).parent / "source"
_FLAGS = ("-std=gnu11", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-builtin", "-Wall")
_JEMALLOC = "libjemalloc.so.2"
# It keeps what is freed, also where that is large: its documentation, opt.dirty_decay_ms and the following.
_JEMALLOC_SETTINGS = "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0"
_LIBRARY_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib")


@dataclass(frozen=True)
class MallocSetting:
    """Hold the setting that a process has.

    Attributes:
        name: "cached", "fixed", "default", or "jemalloc" where that was preloaded in the cache's place.
        mmap_threshold_bytes: malloc's fixed mmap threshold; None where it isn't fixed.
        reason: Why it isn't the one that was asked for; empty where it is.
    """

    name: str
    mmap_threshold_bytes: int | None
    reason: str = ""


def built_library() -> Path:
    """Return the page cache's library; compile it if needed.

    Raises:
        UsageError: It can't be built, or the user's cache isn't the user's own.
    """
    folder = private_folder(cache_folder(), "autoaccum", "pages") / _key()
    return LIBRARY.built(folder, _compile)


@functools.cache
def _key() -> str:
    digest = hashlib.sha256()
    sources = sorted(_SOURCES.glob("*.[ch]"))
    for path in (*sources, Path(__file__), Path(__file__).parent.parent / "compiled_library.py"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{platform.machine()}-{digest.hexdigest()[:12]}"


def _compile(making: Path) -> None:
    sources = map(str, sorted(_SOURCES.glob("*.c")))
    LIBRARY.compile(LIBRARY.compiler(), [*_FLAGS, f"-I{_SOURCES}", *sources], making)


def environment(malloc: str, base: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """Return the environment for a child process with a setting of malloc.

    Nothing is preloaded beside another allocator that the user preloads.

    Args:
        malloc: The setting.
        base: The environment to start from; None for this process's.

    Returns:
        The environment; None where it is this process's.
    """
    own = os.environ if base is None else base
    preload = own.get("LD_PRELOAD", "")
    if malloc not in (CACHED, JEMALLOC) or process_memory.replaces_malloc(preload):
        return None if base is None else dict(base)
    if malloc == CACHED:
        try:
            library = built_library()
            entry = LIBRARY.preloaded(library)
        except UsageError:
            pass
        else:
            variables = dict(own) | {"LD_PRELOAD": put_first(entry, preload)}
            if entry != str(library):
                variables["LD_LIBRARY_PATH"] = put_first(str(library.parent), own.get("LD_LIBRARY_PATH", ""))
            return variables
    jemalloc = find_jemalloc()
    if jemalloc is None:
        return None if base is None else dict(base)
    settings = own.get("MALLOC_CONF") or _JEMALLOC_SETTINGS
    return dict(own) | {"LD_PRELOAD": put_first(str(jemalloc), preload), "MALLOC_CONF": settings}


def environment_on(device: str, malloc: str) -> dict[str, str] | None:
    """Return the environment for a child process on a kind of device."""
    return environment(malloc) if device == "cpu" else None


def find_jemalloc() -> Path | None:
    """Return the machine's jemalloc; None where there is none."""
    for folder in map(Path, _LIBRARY_FOLDERS):
        for place in (folder, *sorted(folder.glob(f"{platform.machine()}*"))):
            if (place / _JEMALLOC).is_file():
                return place / _JEMALLOC
    return None


def apply(malloc: str) -> MallocSetting:
    """Give this process a setting of malloc, or the closest to it.

    Args:
        malloc: "cached", "fixed", "default", or a plan's "jemalloc".

    Raises:
        UsageError: The default is asked for, and the threshold was fixed before in this process.
    """
    if malloc == DEFAULT:
        if process_memory.fixed_threshold_bytes() is not None:
            raise UsageError(
                "malloc='default' is not possible in this process: its mmap threshold is fixed already.",
                "An earlier plan or Runner with another setting did that, and the C library cannot undo it.",
                "Plan in a new process (autoaccum plan --malloc default), or with malloc='fixed'.",
            )
        process_memory.serve_from_page_cache(False)
        return MallocSetting(DEFAULT, None)
    if malloc in (CACHED, JEMALLOC) and process_memory.malloc_name().startswith("libjemalloc"):
        return MallocSetting(JEMALLOC, None, reason_against() if malloc == CACHED else "")
    reason = _join() if malloc == CACHED else "jemalloc isn't preloaded" if malloc == JEMALLOC else ""
    is_cached = malloc == CACHED and not reason
    process_memory.serve_from_page_cache(is_cached)
    threshold = process_memory.MMAP_THRESHOLD_BYTES
    fixed = threshold if process_memory.fix_mmap_threshold(threshold) else None
    return MallocSetting(CACHED if is_cached else FIXED if fixed is not None else DEFAULT, fixed, reason)


def apply_planned(device: DeviceSection) -> None:
    """Give this process the setting that a plan was made for.

    Where only another is available, a warning says so. A plan for the default leaves the process alone.
    """
    if device.malloc not in (CACHED, FIXED, JEMALLOC):
        return
    setting = apply(device.malloc)
    if setting.reason:
        log.warning(
            "The plan is for malloc='%s', and this process has '%s' (%s): training is slower, and each large tensor "
            "may take a page more.", device.malloc, setting.name, setting.reason,
        )  # fmt: skip


def reason_against() -> str:
    """Return why the page cache's library can't be built, or ""."""
    try:
        built_library()
    except UsageError as error:
        return error.what
    return ""


def _join() -> str:
    """Have the page cache serve this process; return why not, or ""."""
    if process_memory.glibc() is None:
        return f"malloc is {process_memory.malloc_name()}, not the C library's"
    if not process_memory.has_page_cache():
        try:
            library = built_library()
        except UsageError as error:
            return error.what
        reason = process_memory.join_page_cache(library)
        if reason:
            return reason
    return "" if process_memory.reserve_page_cache() else "a limit on addresses (ulimit -v) forbids to reserve them"
