"""Read the memory budget of the CPU, with reasons.

A CPU budget is in committed bytes of the whole process, since that is what a limit limits.
"""

from __future__ import annotations

import resource
from pathlib import Path

from ...budget import DEFAULT_HEADROOM, Budget, BudgetItem
from ...errors import UsageError
from ...process_memory import PAGE_BYTES, available_bytes, committed_bytes, read_memory
from ...units import parse_bytes, parse_part, show_bytes

_NO_LIMIT_BYTES = 1 << 60  # version 1 of cgroups writes "no limit" as the largest multiple of a page


def read_cpu_budget(memory: str | int | None = None, headroom: str | int | None = None) -> Budget:
    """Read what this process may commit.

    Args:
        memory: What the whole process may use; left out: what limits and the machine leave.
        headroom: Bytes, or percent of the limit, to keep free. Left out: none where `memory` is given, else 10 %.

    Raises:
        UsageError: A size can't be read, or the headroom leaves nothing.
    """
    limits = _limits()
    if memory is not None:
        asked = parse_bytes(memory, what="an amount of memory")
        limits.insert(0, BudgetItem("asked", asked, "you named it; the whole process, its baseline included"))
    tightest = min(limits, key=lambda term: term.bytes)
    asked_for = tightest.name == "asked"
    if headroom is None:
        kept_bytes = 0 if asked_for else parse_part(DEFAULT_HEADROOM, tightest.bytes) or 0
        why = "none: the limit is one that you named" if asked_for else f"{DEFAULT_HEADROOM} of it, for others"
    else:
        kept_bytes = parse_part(headroom, tightest.bytes, what="a headroom") or 0
        why = f"you asked for {headroom}"
    if kept_bytes >= tightest.bytes:
        raise UsageError(
            f"A headroom of {show_bytes(kept_bytes)} leaves nothing of {show_bytes(tightest.bytes)}.",
            f"The limit that binds is {tightest.name}: {tightest.why}.",
            "Give a smaller headroom=.",
        )
    terms = (*limits, BudgetItem("headroom", kept_bytes, why))
    return Budget(tightest.bytes - kept_bytes, tightest.bytes, kept_bytes, terms, tightest.name)


def _limits() -> list[BudgetItem]:
    """List the limits on this process's committed bytes."""
    _, resident = read_memory()
    found = []
    data_limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if data_limit != resource.RLIM_INFINITY:
        found.append(BudgetItem("data limit", data_limit, "RLIMIT_DATA of this process (ulimit -d)"))
    space_limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space_limit != resource.RLIM_INFINITY:
        other = _address_space_bytes() - committed_bytes()
        why = f"RLIMIT_AS of this process (ulimit -v), less {show_bytes(other)} of mapped files"
        found.append(BudgetItem("address space limit", max(1, space_limit - other), why))
    group = _cgroup_bytes()
    if group is not None:
        limit, used = group
        why = f"the cgroup's limit of {show_bytes(limit)}, less what others in it use"
        found.append(BudgetItem("cgroup", max(1, limit - max(0, used - resident)), why))
    available = available_bytes()
    if available is None:
        raise UsageError("/proc/meminfo has no MemAvailable.", hint="Name what training may use: budget=8GiB.")
    why = f"MemAvailable, {show_bytes(available)}, and the {show_bytes(resident)} this process has in memory"
    found.append(BudgetItem("available", available + resident, why))
    return found


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES


def _cgroup_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """Return limit and use of the tightest memory cgroup.

    The file cache is not counted as used.

    Version 2's files (Documentation/admin-guide/cgroup-v2.rst), or version 1's (cgroup-v1/memory.rst).
    """
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if not controllers:
            found += _limits_above(root, path, "memory.max", "memory.current", "inactive_file ")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "
            found += _limits_above(root / "memory", path, *names)
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def _limits_above(root: Path, path: str, limit_name: str, used_name: str, cache_name: str) -> list[tuple[int, int]]:
    """List limit and use of a group and its parents."""
    found: list[tuple[int, int]] = []
    folder = root / path.strip().lstrip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(root):
            break
        try:
            limit = (place / limit_name).read_text().strip()
            if limit != "max" and int(limit) < _NO_LIMIT_BYTES:
                used = int((place / used_name).read_text())
                found.append((int(limit), max(0, used - _file_cache_bytes(place / "memory.stat", cache_name))))
        except (OSError, ValueError):
            continue
    return found


def _file_cache_bytes(stat: Path, name: str) -> int:
    """Return the file cache, which the kernel can drop.

    0 where it is not reported, on the safe side.
    """
    try:
        return next(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith(name))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
