"""Read the memory budget of a CUDA device, with reasons.

A CUDA budget is in *reserved* bytes: what torch's caching allocator may come to hold on the device, in all, in this
process. What it holds already counts as available. `--memory` names the whole process,
so its context and its libraries, which no allocator of torch's sees, are taken off.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...budget import DEFAULT_HEADROOM, Budget, BudgetItem
from ...errors import UsageError
from ...units import parse_bytes, parse_part, show_bytes
from .nvml import NvmlInfo, Process, see_device

if TYPE_CHECKING:
    import torch

DEVICE, FRACTION, ASKED = "device", "memory fraction", "asked"  # limits
FREE, IN_USE, CACHED, CONTEXT, OTHERS, HIDDEN = "free", "in use", "cached", "context", "other processes", "unexplained"
_MOST_NAMED = 4  # processes
# What the driver keeps for a context and NVML counts for no process. On an H200 (driver 580.159, three models, alone on
# it) the device's used memory, less what it was before, exceeded NVML's figure for the process by 9,240,576 bytes.
_KEPT_FOR_CONTEXT_BYTES = 16 << 20
_BUS_ID = ("domain", "bus", "device")


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory at one moment, in bytes.

    Attributes:
        total_bytes: Of the device, as CUDA has it (nvidia-smi's total is larger by what the driver keeps).
        free_bytes: What the driver would still hand out (cudaMemGetInfo).
        reserved_bytes: Held by torch's caching allocator.
        active_bytes: The part of it that tensors use, or that a stream hasn't done with.
        stuck_bytes: In no use, but in segments where some is: `empty_cache` can't give it back.
        fraction: What `set_per_process_memory_fraction` allows, as a part of the total.
        seen: What NVML says.
        pid: This process's.
    """

    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    active_bytes: int
    stuck_bytes: int = 0
    fraction: float = 1.0
    seen: NvmlInfo = field(default_factory=NvmlInfo)
    pid: int = 0

    @property
    def own(self) -> Process | None:
        """This process in NVML's list.

        None where it is not listed, as in a container, or without its bytes.
        """
        return next((p for p in self.seen.processes if p.pid == self.pid and p.bytes is not None), None)

    @property
    def others(self) -> tuple[Process, ...]:
        """The other processes in NVML's list."""
        return tuple(process for process in self.seen.processes if process.pid != self.pid)

    @property
    def others_bytes(self) -> int:
        """What the other processes hold, as NVML lists it."""
        return sum(process.bytes or 0 for process in self.others)

    @property
    def _outside_bytes(self) -> int:
        """What is neither free nor torch's."""
        return max(0, self.total_bytes - self.free_bytes - self.reserved_bytes)

    @property
    def _listed_bytes(self) -> int | None:
        """What NVML lists here, less what torch reserved; else None."""
        if self.own is None or self.own.bytes is None:
            return None
        return min(self._outside_bytes, max(0, self.own.bytes - self.reserved_bytes))

    @property
    def context_bytes(self) -> int:
        """This process's context and libraries.

        With what the driver keeps for it and NVML lists for nobody, 16 MiB at most. An upper limit where NVML does not
        list this process.
        """
        rest = max(0, self._outside_bytes - self.others_bytes)
        listed = self._listed_bytes
        return rest if listed is None else max(listed, min(rest, listed + _KEPT_FOR_CONTEXT_BYTES))

    @property
    def hidden_bytes(self) -> int:
        """What is neither free nor held by a process that is listed."""
        taken = self.reserved_bytes + self.context_bytes + self.others_bytes
        return max(0, self.total_bytes - self.free_bytes - taken)

    @property
    def foreign_bytes(self) -> int:
        """What others may hold.

        All that is not known to be this process's own.
        """
        return max(0, self._outside_bytes - (self._listed_bytes or 0))


def read_cuda_budget(
    device: torch.device | int | str | None = None,
    memory: str | int | None = None,
    headroom: str | int | None = None,
    *,
    nvml: Any = None,
) -> Budget:
    """Read what torch's allocator may reserve on a device.

    Read it after something ran there: contexts and libraries load at their first use.

    Args:
        device: A CUDA device; left out, the current one.
        memory: What the whole process may use on it, its context included; left out: what the device has.
        headroom: Bytes, or percent of the limit, to keep free. Left out: see `cuda_budget`.
        nvml: The module pynvml; left out, the one that is installed.

    Raises:
        UsageError: A size can't be read, or nothing is left.
    """
    return cuda_budget(read_device(device, nvml=nvml), memory, headroom)


def read_device(device: torch.device | int | str | None = None, *, nvml: Any = None) -> DeviceMemory:
    """Read a device's memory.

    It creates this process's context there, if there is none yet.
    """
    import torch

    from ...torch_compat import memory_fraction

    at = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(_named(device))
    index = torch.cuda.current_device() if at.index is None else at.index
    free, total = torch.cuda.mem_get_info(index)
    found = torch.cuda.memory_stats(index)  # nothing in it before torch's first allocation
    properties = torch.cuda.get_device_properties(index)
    fraction = memory_fraction(index)
    place = [getattr(properties, f"pci_{part}_id") for part in _BUS_ID if hasattr(properties, f"pci_{part}_id")]
    bus_id = "{:08x}:{:02x}:{:02x}.0".format(*place) if place else ""  # torch 2.6 says none
    return DeviceMemory(
        total_bytes=total,
        free_bytes=free,
        reserved_bytes=found.get("reserved_bytes.all.current", 0),
        active_bytes=found.get("active_bytes.all.current", 0),
        stuck_bytes=found.get("inactive_split_bytes.all.current", 0),
        fraction=fraction / total if fraction > 1 else fraction,  # cudaMallocAsync's gives bytes
        seen=see_device(str(properties.uuid), bus_id, library=nvml),
        pid=os.getpid(),
    )


def _named(device: torch.device | int | str) -> torch.device | str:
    return f"cuda:{device}" if isinstance(device, int) else device


def cuda_budget(found: DeviceMemory, memory: str | int | None = None, headroom: str | int | None = None) -> Budget:
    """Compute what torch's allocator may reserve.

    The headroom, where none is named: nothing of a limit that a person named (`memory`, the memory fraction). Of what
    the device has: as much as others hold, or may hold, since they may come to twice that; 10 % at most. Alone on a
    device it is nothing, since a plan has a margin of its own.

    Args:
        found: The device now.
        memory: What the whole process may use on it.
        headroom: Bytes, or percent of the limit.

    Raises:
        UsageError: A size can't be read, or nothing is left.
    """
    limits = _limits(found, memory)
    kept = {limit.name: _headroom(found, limit, headroom) for limit in limits}
    binding = min(limits, key=lambda limit: limit.bytes - kept[limit.name].bytes)
    spared = kept[binding.name]
    if spared.bytes >= binding.bytes:
        kept_bytes, limit_bytes = show_bytes(spared.bytes), show_bytes(binding.bytes)
        raise UsageError(
            f"A headroom of {kept_bytes} leaves nothing of {limit_bytes}."
            if spared.bytes
            else "Nothing is left to use.",
            f"The limit that binds is {binding.name}: {binding.why}.",
            "Give a smaller headroom=, or end what else uses the device: `autoaccum doctor` names it.",
        )
    terms = (*limits, *_parts(found), spared)
    return Budget(binding.bytes - spared.bytes, binding.bytes, spared.bytes, terms, binding.name)


def _limits(found: DeviceMemory, memory: str | int | None) -> list[BudgetItem]:
    """List the limits, as bytes that torch may reserve."""
    free, reserved, total = (show_bytes(n) for n in (found.free_bytes, found.reserved_bytes, found.total_bytes))
    why = f"{free} that the driver says are free and {reserved} that torch has reserved, of {total}"
    limits = [BudgetItem(DEVICE, found.free_bytes + found.reserved_bytes, why)]
    if found.fraction < 1:
        # CUDACachingAllocator.cpp: a segment is refused where reserved would exceed a number of bytes, which
        # setMemoryFraction rounds down to, and getMemoryFraction divides by the total
        allowed = round(found.fraction * found.total_bytes)
        limits.insert(
            0, BudgetItem(FRACTION, allowed, f"set_per_process_memory_fraction({found.fraction:g}) of {total}")
        )
    if memory is not None:
        limits.insert(0, _asked(found, parse_bytes(memory, what="an amount of memory")))
    return limits


def _asked(found: DeviceMemory, memory_bytes: int) -> BudgetItem:
    context = show_bytes(found.context_bytes)
    if memory_bytes <= found.context_bytes:
        raise UsageError(
            f"{show_bytes(memory_bytes)} is not enough for this process: its context and libraries take {context}.",
            f"They are {_context(found).why}.",
            f"Name more than {context}, as budget=.",
        )
    why = f"you named {show_bytes(memory_bytes)} for the whole process; its context and libraries take {context} of it"
    return BudgetItem(ASKED, memory_bytes - found.context_bytes, why)


def _headroom(found: DeviceMemory, limit: BudgetItem, headroom: str | int | None) -> BudgetItem:
    if headroom is not None:
        asked = parse_part(headroom, limit.bytes, what="a headroom") or 0
        return BudgetItem("headroom", asked, f"you asked for {headroom}")
    if limit.name != DEVICE:
        return BudgetItem("headroom", 0, "none: the limit is one that you named")
    if not found.foreign_bytes:
        return BudgetItem("headroom", 0, "none: nobody else uses the device")
    most = parse_part(DEFAULT_HEADROOM, limit.bytes) or 0
    if found.foreign_bytes > most:
        return BudgetItem(
            "headroom", most, f"{DEFAULT_HEADROOM} of it: others use the device, and may come to use more"
        )
    if found.own is None:
        return BudgetItem("headroom", found.foreign_bytes, "as much as others may hold: NVML doesn't list this process")
    return BudgetItem("headroom", found.foreign_bytes, "as much as others hold: they may come to use more")


def _parts(found: DeviceMemory) -> tuple[BudgetItem, ...]:
    """List where the device's memory is.

    With what is free, the items add up to its total.
    """
    idle = max(0, found.reserved_bytes - found.active_bytes)
    stuck = min(found.stuck_bytes, idle)
    cached = (
        f"torch's own, in no use: {show_bytes(idle - stuck)} can be given back, {show_bytes(stuck)} only used again"
    )
    parts = [
        BudgetItem(FREE, found.free_bytes, "the driver hands it out to whoever asks first (cudaMemGetInfo)"),
        BudgetItem(IN_USE, found.active_bytes, "torch's own, in tensors"),
        BudgetItem(CACHED, idle, cached),
        _context(found),
        _others(found),
    ]
    if found.hidden_bytes:
        parts.append(BudgetItem(HIDDEN, found.hidden_bytes, "the driver's own, or of processes that NVML doesn't list"))
    return tuple(parts)


def _context(found: DeviceMemory) -> BudgetItem:
    if found.own is not None:
        why = (
            "this process's context and libraries: what NVML says it holds, less what torch reserved,"
            " and what the driver keeps for it"
        )
    else:
        reason = found.seen.note or "NVML doesn't list this process, as in a container"
        why = f"this process's context and libraries, and whatever others hold that cannot be distinguished: {reason}"
    return BudgetItem(CONTEXT, found.context_bytes, why)


def _others(found: DeviceMemory) -> BudgetItem:
    if not found.others:
        return BudgetItem(OTHERS, 0, found.seen.note or "NVML lists none")
    listed = sorted(found.others, key=lambda process: -(process.bytes or 0))
    named = ", ".join(show_process(process) for process in listed[:_MOST_NAMED])
    more = f", and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return BudgetItem(OTHERS, found.others_bytes, named + more)


def show_process(process: Process) -> str:
    """Return a process in words: `1.50 GiB of python (pid 4711)`."""
    size = "an unknown amount" if process.bytes is None else show_bytes(process.bytes)
    return f"{size} of {process.name or 'a process'} (pid {process.pid})"


def shrunk_since(planned: Budget, now: Budget, *, margin: float = 0.0) -> str | None:
    """Describe what is missing of a plan's budget, before training.

    A process that has just begun has loaded less of CUDA's libraries than the one that planned; what they will take
    still is counted as taken. The headroom is there to be used up by others, so it is not asked for again.

    Args:
        planned: The plan's budget.
        now: Read in the process that will run, with the same `memory`.
        margin: The part of the budget that the plan can do without.

    Returns:
        None where there is enough, else what happened, in a sentence or two.
    """
    before, after = ({term.name: term for term in budget.terms} for budget in (planned, now))
    to_come = 0
    if CONTEXT in before and CONTEXT in after and now.binding_constraint != FRACTION:
        to_come = max(0, before[CONTEXT].bytes - after[CONTEXT].bytes)
    there = max(0, now.limit_bytes - to_come)
    needed = int(planned.bytes * (1 - margin))
    if there >= needed:
        return None
    message = f"The plan is for {show_bytes(planned.bytes)}, and only {show_bytes(there)} is available now"
    if now.binding_constraint != planned.binding_constraint:
        return f"{message}: {now.binding_constraint} is the limit now, {after[now.binding_constraint].why}."
    grown = after[OTHERS].bytes - before[OTHERS].bytes if OTHERS in before and OTHERS in after else 0
    if grown > 0:
        return f"{message}. Other processes hold {show_bytes(grown)} more than then: {after[OTHERS].why}."
    return f"{message}: {after[now.binding_constraint].why}."
