"""What a CUDA device's budget counts, what NVML's view of it adds, and what is said where NVML can't be asked."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_process import run_forked

from autoaccum.budget import Budget, BudgetItem
from autoaccum.devices.cuda import nvml
from autoaccum.devices.cuda.budget import CONTEXT, FREE, HIDDEN, OTHERS, DeviceMemory, cuda_budget, shrunk_since
from autoaccum.devices.cuda.nvml import NvmlInfo, Process, see_device
from autoaccum.devices.virtual import VirtualGpu, available
from autoaccum.errors import UsageError

MIB, GIB = 2**20, 2**30
HERE = Path(__file__).parent
REASON = available()
usable = pytest.mark.skipif(REASON is not None, reason=REASON or "")
OWN = Process(7, "python", 3 * GIB)  # 2.5 GiB reserved and half a GiB of context
ALONE = DeviceMemory(
    16 * GIB,
    13 * GIB,
    reserved_bytes=5 * GIB // 2,
    active_bytes=2 * GIB,
    seen=NvmlInfo("GPU-a", processes=(OWN,)),
    pid=7,
)


def shared(*others: Process, free_bytes: int = 13 * GIB) -> DeviceMemory:
    """As ALONE, with others, who took what is not free any more."""
    return replace(ALONE, free_bytes=free_bytes, seen=replace(ALONE.seen, processes=(OWN, *others)))


def terms(found: Budget) -> dict[str, BudgetItem]:
    return {term.name: term for term in found.terms}


# -- what is counted


def test_alone_all_that_is_free_and_all_that_torch_has_is_to_be_had() -> None:
    found = cuda_budget(ALONE)
    assert (found.bytes, found.limit_bytes, found.headroom_bytes, found.binding_constraint) == (31 * GIB // 2,) * 2 + (
        0,
        "device",
    )
    assert {name: term.bytes for name, term in terms(found).items()} == {
        "device": 31 * GIB // 2,
        "free": 13 * GIB,
        "in use": 2 * GIB,
        "cached": GIB // 2,
        "context": GIB // 2,
        "other processes": 0,
        "headroom": 0,
    }
    assert "nobody else uses the device" in terms(found)["headroom"].why
    assert all(term.why for term in found.terms)


def test_what_the_cache_can_give_back_is_distinguished_from_what_it_cannot() -> None:
    why = terms(cuda_budget(replace(ALONE, stuck_bytes=100 * MIB)))["cached"].why
    assert "412.0 MiB can be given back, 100.0 MiB only used again" in why


def test_memory_that_was_named_is_the_whole_process() -> None:
    found = cuda_budget(ALONE, memory="4GiB")
    assert (found.bytes, found.headroom_bytes, found.binding_constraint) == (7 * GIB // 2, 0, "asked")
    assert "512.0 MiB of it" in terms(found)["asked"].why


def test_memory_that_was_named_beyond_what_is_there_does_not_make_it_more() -> None:
    assert cuda_budget(ALONE, memory="40GiB").binding_constraint == "device"


def test_memory_that_not_even_the_context_fits() -> None:
    with pytest.raises(UsageError, match=r"200\.0 MiB is not enough .* take 512\.0 MiB") as error:
        cuda_budget(ALONE, memory="200MiB")
    assert "what NVML says it holds" in error.value.why and "budget=" in error.value.hint


def test_the_memory_fraction_binds_without_headroom() -> None:
    found = cuda_budget(replace(shared(Process(9, "x", GIB), free_bytes=12 * GIB), fraction=0.5))
    assert (found.bytes, found.headroom_bytes, found.binding_constraint) == (8 * GIB, 0, "memory fraction")
    assert "set_per_process_memory_fraction(0.5) of 16.00 GiB" in terms(found)["memory fraction"].why


def test_the_device_binds_where_its_headroom_leaves_less_than_the_fraction() -> None:
    found = cuda_budget(replace(shared(Process(9, "x", GIB), free_bytes=12 * GIB), fraction=0.89))
    assert (
        found.binding_constraint == "device" and found.bytes == 27 * GIB // 2 < int(0.89 * 16 * GIB) < found.limit_bytes
    )


# -- others, and the headroom


def test_others_may_come_to_twice_what_they_hold() -> None:
    found = cuda_budget(shared(Process(9, "notebook", 500 * MIB), free_bytes=13 * GIB - 500 * MIB))
    assert found.headroom_bytes == 500 * MIB and found.limit_bytes == 31 * GIB // 2 - 500 * MIB
    assert terms(found)[OTHERS] == BudgetItem(OTHERS, 500 * MIB, "500.0 MiB of notebook (pid 9)")


def test_for_others_no_more_than_a_tenth_is_kept() -> None:
    found = cuda_budget(shared(Process(9, "", 6 * GIB), free_bytes=7 * GIB))
    assert found.headroom_bytes == found.limit_bytes // 10
    assert terms(found)[OTHERS].why == "6.00 GiB of a process (pid 9)"


@pytest.mark.parametrize(("headroom", "kept"), [("10%", 31 * GIB // 20), ("1GiB", GIB), (0, 0), ("0%", 0), (5, 5)])
@pytest.mark.parametrize("others", [0, GIB])
def test_a_headroom_is_bytes_or_a_part_of_the_limit(headroom: str | int, kept: int, others: int) -> None:
    device = shared(Process(9, "x", others), free_bytes=13 * GIB) if others else ALONE
    found = cuda_budget(device, headroom=headroom)
    assert found.headroom_bytes == kept and found.bytes == 31 * GIB // 2 - kept


def test_a_headroom_that_leaves_nothing() -> None:
    with pytest.raises(UsageError, match="leaves nothing") as error:
        cuda_budget(ALONE, headroom="16GiB")
    assert "device" in error.value.why and "headroom=" in error.value.hint


def test_a_device_that_others_have_filled() -> None:
    full = replace(shared(Process(9, "x", 16 * GIB), free_bytes=0), reserved_bytes=0, active_bytes=0)
    with pytest.raises(UsageError, match="Nothing is left to use") as error:
        cuda_budget(full)
    assert "autoaccum doctor" in error.value.hint


def test_in_a_container_nobody_can_be_distinguished() -> None:
    hidden = replace(ALONE, seen=NvmlInfo("GPU-a"))
    found = cuda_budget(hidden)
    assert terms(found)[CONTEXT].bytes == GIB // 2 and "doesn't list this process" in terms(found)[CONTEXT].why
    assert found.headroom_bytes == GIB // 2  # it may all be another's


def test_without_nvml_the_reason_stands_in_the_budget() -> None:
    found = cuda_budget(replace(ALONE, seen=NvmlInfo(note="NVML can't be asked: no permission")))
    assert terms(found)[OTHERS].why == "NVML can't be asked: no permission"
    assert "no permission" in terms(found)[CONTEXT].why


def test_what_the_driver_keeps_for_a_context_is_the_contexts() -> None:
    """An H200 (driver 580.159) after training ResNet-50: NVML lists 760 MiB for the process, and 8.8 more are gone."""
    total, reserved, listed, taken = 150_109_945_856, 12_540_968_960, 796_917_760, 806_158_336
    own = Process(7, "python", listed + reserved)
    device = DeviceMemory(
        total, total - reserved - taken, reserved, reserved, seen=NvmlInfo("GPU-a", processes=(own,)), pid=7
    )
    assert (device.context_bytes, device.hidden_bytes) == (taken, 0)
    asked = cuda_budget(device, "16GiB")
    assert asked.bytes == 16 * GIB - taken  # it was 9,240,576 bytes more
    assert cuda_budget(device).bytes == total - taken - (taken - listed)  # what isn't known to be ours may grow


def test_a_process_whose_bytes_nvml_does_not_say() -> None:
    found = cuda_budget(shared(Process(9, "game", None), free_bytes=12 * GIB))
    assert terms(found)[OTHERS].why == "an unknown amount of game (pid 9)"
    assert terms(found)[HIDDEN].bytes == GIB - 16 * MIB  # as much may be the driver's, for this process
    assert found.headroom_bytes == GIB


def test_nvmls_bytes_are_not_more_than_what_is_taken() -> None:
    """NVML can count what a process shares with others."""
    device = replace(ALONE, seen=NvmlInfo("GPU-a", processes=(replace(OWN, bytes=9 * GIB),)))
    assert device.context_bytes == GIB // 2 and device.hidden_bytes == 0


@given(
    total=st.integers(1, 2**38),
    parts=st.lists(st.integers(0, 2**36), min_size=5, max_size=5),
    listed=st.booleans(),
    shown=st.booleans(),
)
def test_the_parts_add_up_to_the_device(total: int, parts: list[int], listed: bool, shown: bool) -> None:
    free, active, idle, context, others = (part % (total // 5 + 1) for part in parts)
    processes = [Process(9, "x", others)] * shown + [Process(7, "python", active + idle + context)] * listed
    rest = total - free - active - idle - context - others
    seen = NvmlInfo("GPU-a", processes=tuple(processes))
    device = DeviceMemory(total, free, active + idle, active, seen=seen, pid=7)
    budget = cuda_budget(device, headroom=0) if free + active + idle else None
    if budget is None:
        return
    found = {term.name: term.bytes for term in budget.terms}
    places = ("free", "in use", "cached", "context", "other processes", "unexplained")
    assert sum(found.get(name, 0) for name in places) == total
    assert budget.bytes == free + active + idle
    assert device.foreign_bytes == (others + rest if listed else total - free - active - idle)


# -- NVML, of many makes


class Gone(Exception):
    """What pynvml raises, by another name."""


class Library:
    """A module pynvml: two GPUs, whose order is its own; the second may be divided by MIG."""

    def __init__(self, cut: int = 0, **replaced: Any) -> None:
        self.uuids = ["GPU-aaaa", "GPU-bbbb"]
        self.instances = [f"MIG-{i}{i}{i}" for i in range(cut)]
        self.running = {"GPU-aaaa": [(1, 10)], "GPU-bbbb": [(2, 20), (7, 70)], "MIG-111": [(7, 71)]}
        for name, value in replaced.items():
            setattr(self, name, value)

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in [*self.uuids, *self.instances]:
            raise Gone("Not Found")
        return uuid

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        return self.uuids[int(bus_id.split(":")[1], 16) - 1]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return self.uuids.index(handle)

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if handle not in self.uuids:
            raise Gone("Invalid Argument")
        return [1, 1] if self.instances and handle == "GPU-bbbb" else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index >= len(self.instances):
            raise Gone("Not Found")
        return self.instances[index]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.running.get(handle, [])]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=2, usedGpuMemory=25)] if handle == "GPU-bbbb" else []


def held(seen: NvmlInfo) -> dict[int, int | None]:
    return {process.pid: process.bytes for process in seen.processes}


def test_a_device_is_found_by_uuid_and_computing_and_drawing_is_one_process() -> None:
    seen = see_device("bbbb", library=Library())
    assert (seen.uuid, seen.index, seen.driver, seen.note) == ("GPU-bbbb", 1, "580.1", "")
    assert held(seen) == {2: 25, 7: 70}


def test_processes_are_named_where_their_numbers_are_this_machines() -> None:
    others = [(os.getppid(), 10), (2**22 + 1, 20)]  # the second number is beyond any
    foreign = see_device("aaaa", library=Library(running={"GPU-aaaa": others}))
    assert [process.name for process in foreign.processes] == ["", ""]
    listed = Library(running={"GPU-aaaa": [*others, (os.getpid(), 5)]})
    named = {process.pid: process.name for process in see_device("aaaa", library=listed).processes}
    assert named == {
        os.getpid(): Path("/proc/self/comm").read_text().strip(),
        os.getppid(): Path(f"/proc/{os.getppid()}/comm").read_text().strip(),
        2**22 + 1: "",
    }


def test_a_client_of_mps_is_listed_too() -> None:
    library = Library(nvmlDeviceGetMPSComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=5, usedGpuMemory=9)])
    assert held(see_device("aaaa", library=library)) == {1: 10, 5: 9}


def test_a_device_is_found_by_its_place_on_the_bus_where_the_uuid_names_nothing() -> None:
    seen = see_device("0000", "00000000:01:00.0", library=Library())
    assert (seen.uuid, held(seen)) == ("GPU-aaaa", {1: 10})


def test_a_device_that_nvml_does_not_know() -> None:
    seen = see_device("0000", library=Library())
    assert seen.processes == () and "doesn't know a device 0000" in seen.note


@pytest.mark.parametrize("visible", ["MIG-111", "MIG-111,MIG-000", "MIG-1", "1", ""])
@pytest.mark.parametrize("uuid", ["bbbb", "111"])
def test_a_mig_instance_is_found_under_every_form(visible: str, uuid: str) -> None:
    """CUDA gives the instance's own UUID, or, in its older versions, that of the GPU around it."""
    seen = see_device(uuid, library=Library(cut=3), environ={"CUDA_VISIBLE_DEVICES": visible})
    if uuid == "111" or visible.startswith("MIG"):
        assert (seen.uuid, held(seen)) == ("MIG-111", {7: 71})
    else:
        assert seen.processes == () and "divided by MIG" in seen.note


def test_a_beginning_that_several_mig_instances_share_names_none() -> None:
    seen = see_device("bbbb", library=Library(cut=3), environ={"CUDA_VISIBLE_DEVICES": "MIG-"})
    assert seen.processes == () and "divided by MIG" in seen.note


def test_the_only_mig_instance_needs_no_name() -> None:
    library = Library(cut=1, running={"MIG-000": [(7, 70)]})
    assert held(see_device("bbbb", library=library, environ={})) == {7: 70}


def raising(text: str, kind: str = "NVMLError") -> Any:
    error = type(kind, (Exception,), {})

    def call(*_: Any) -> None:
        raise error(text)

    return call


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (SimpleNamespace(), "another package, without nvmlInit (pip install nvidia-ml-py)"),
        (SimpleNamespace(nvmlInit=None, nvmlShutdown=None), "another package, without nvmlDeviceGetHandleByUUID"),
        (Library(nvmlInit=raising("Driver/library version mismatch")), "the driver was updated"),
        (Library(nvmlInit=raising("NVML Shared Library Not Found", "NVMLError_LibraryNotFound")), "libnvidia-ml.so.1"),
        (Library(nvmlInit=raising("Insufficient Permissions", "NVMLError_NoPermission")), "no permission"),
        (Library(nvmlInit=raising("Driver Not Loaded")), "can't be asked: Driver Not Loaded"),
        (Library(nvmlInit=raising("")), "can't be asked: NVMLError"),
    ],
)
def test_where_nvml_cannot_be_asked_there_is_a_note(library: Any, message: str) -> None:
    seen = see_device("aaaa", library=library)
    assert message in seen.note and seen.processes == () and seen.uuid == ""


def test_without_permission_to_list_the_rest_is_still_known() -> None:
    library = Library(nvmlDeviceGetComputeRunningProcesses=raising("Insufficient Permissions"))
    seen = see_device("aaaa", library=library)
    assert (seen.uuid, seen.driver, seen.note) == ("GPU-aaaa", "580.1", "NVML can't list processes: no permission")


def test_no_pynvml_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml is not installed (pip install nvidia-ml-py)" in see_device("aaaa").note


def test_the_installed_pynvml_has_what_is_needed() -> None:
    assert all(hasattr(nvml._loaded(), name) for name in nvml._NEEDED)


# -- shrunk between plan and run


def test_nothing_is_said_where_nothing_shrank() -> None:
    assert shrunk_since(cuda_budget(ALONE), cuda_budget(ALONE)) is None


def test_others_may_use_up_the_headroom() -> None:
    planned = cuda_budget(shared(Process(9, "x", GIB), free_bytes=12 * GIB))
    now = cuda_budget(shared(Process(9, "x", 2 * GIB), free_bytes=11 * GIB))
    assert planned.headroom_bytes == GIB and shrunk_since(planned, now) is None


def test_others_that_grew_are_named() -> None:
    planned = cuda_budget(ALONE)
    now = cuda_budget(shared(Process(9, "notebook", 3 * GIB), free_bytes=10 * GIB))
    message = shrunk_since(planned, now)
    assert message is not None and "15.50 GiB" in message and "12.50 GiB" in message
    assert "hold 3.00 GiB more than then: 3.00 GiB of notebook (pid 9)" in message


def test_the_plans_margin_is_let_go_first() -> None:
    planned, now = cuda_budget(ALONE), cuda_budget(replace(ALONE, free_bytes=13 * GIB - 200 * MIB))
    assert shrunk_since(planned, now) is not None
    assert shrunk_since(planned, now, margin=0.02) is None


def test_libraries_that_a_fresh_process_has_yet_to_load_are_counted() -> None:
    """The one that planned had loaded 300 MiB of them; a neighbour took 100 MiB since."""
    fresh = replace(
        ALONE,
        free_bytes=15 * GIB + 700 * MIB,
        reserved_bytes=0,
        active_bytes=0,
        seen=NvmlInfo("GPU-a", processes=(Process(7, "python", 212 * MIB), Process(9, "x", 112 * MIB))),
    )
    message = shrunk_since(cuda_budget(ALONE), cuda_budget(fresh))
    assert message is not None and "only 15.39 GiB is available now" in message


def test_a_limit_that_was_set_since_is_named() -> None:
    message = shrunk_since(cuda_budget(ALONE), cuda_budget(replace(ALONE, fraction=0.25)))
    assert message is not None and "memory fraction is the limit now, set_per_process_memory_fraction(0.25)" in message


def test_a_cpu_budget_can_shrink_too() -> None:
    budgets = [
        Budget(n - 10, n, 10, (BudgetItem("available", n, "MemAvailable"),), "available") for n in (2 * GIB, GIB)
    ]
    assert "MemAvailable" in (shrunk_since(*budgets) or "")
    assert shrunk_since(*reversed(budgets)) is None


# -- on the virtual GPU

LOOK = """
import json, sys, torch
from autoaccum.devices.cuda.budget import read_cuda_budget, read_device, shrunk_since
from autoaccum.devices.virtual import control
"""


@given(total=st.integers(1, 2**40), fraction=st.floats(0.01, 0.999))
def test_a_memory_fraction_is_reported_to_the_byte(total: int, fraction: float) -> None:
    """By the allocator's own way: a whole number of bytes, which it tells as a part of the total."""
    allowed = int(fraction * total)
    if allowed:
        found = cuda_budget(DeviceMemory(total, total, 0, 0, fraction=allowed / total))
        assert found.bytes == allowed


def on_the_virtual_gpu(body: str, gpu: VirtualGpu, **env: str) -> Any:
    """Runs that in a process of its own; what it prints last is JSON."""
    done = run_forked(LOOK + body, gpu=gpu, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


TORCHS_LIMIT = """
gone, held = torch.empty(100 << 20, dtype=torch.uint8, device="cuda"), torch.empty(300 << 20, device="cuda").byte()
del gone
def budget(**wanted):
    found = read_cuda_budget("cuda", **wanted)
    parts = {term.name: [term.bytes, term.why] for term in found.terms}
    return found.bytes, found.headroom_bytes, found.binding_constraint, parts
def most(limit):
    # the most that torch comes to reserve: what is asked for is a multiple of 2 MiB, as segments are
    torch.cuda.empty_cache()
    more = (limit - torch.cuda.memory_reserved()) // (2 << 20) * (2 << 20)
    try:
        torch.empty(more + (2 << 20), dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        torch.empty(more, dtype=torch.uint8, device="cuda")
        return torch.cuda.memory_reserved()
found = {"plain": budget(headroom=0), "default": budget(), "asked": budget(memory="3GiB")}
found["most"] = most(found["plain"][0])
torch.cuda.set_per_process_memory_fraction(0.333)
found["fraction"] = budget()
found["most by fraction"] = most(found["fraction"][0])
torch.cuda.set_per_process_memory_fraction(1.0)
planned = read_cuda_budget(headroom=0)
control.set_other(2, 2 << 30)
devices = read_device(0), read_device(1)
found["numbers"], found["others"] = [d.seen.index for d in devices], [d.others_bytes for d in devices]
unseen = read_cuda_budget(headroom=0, nvml=object())
found["unseen"] = unseen.bytes, {term.name: [term.bytes, term.why] for term in unseen.terms}
found["shrunk"] = shrunk_since(planned, read_cuda_budget(headroom=0))
print(json.dumps(found))
"""


@cache
def torchs_limit() -> dict[str, Any]:
    gpu = VirtualGpu(memory_bytes=6 * GIB, context_bytes=400 * MIB, other_bytes=700 * MIB, devices=3)
    return dict(on_the_virtual_gpu(TORCHS_LIMIT, gpu, CUDA_VISIBLE_DEVICES="2,0"))


@usable
@pytest.mark.parametrize(("asked", "reached"), [("plain", "most"), ("fraction", "most by fraction")])
def test_torch_comes_to_reserve_the_budget_and_not_a_segment_more(asked: str, reached: str) -> None:
    found = torchs_limit()
    assert 0 <= found[asked][0] - found[reached] < 2 * MIB
    assert found["fraction"][2] == "memory fraction" and found["fraction"][0] == int(0.333 * 6 * GIB)


@usable
def test_context_and_others_are_what_the_virtual_gpu_was_given() -> None:
    found = torchs_limit()
    size, _, binds, parts = found["plain"]
    assert (size, binds) == ((6144 - 400 - 700) * MIB, "device")
    assert parts[CONTEXT][0] == 400 * MIB and parts[OTHERS][0] == 700 * MIB and "(pid 1)" in parts[OTHERS][1]
    assert parts[FREE][0] + parts["in use"][0] + parts["cached"][0] == size and HIDDEN not in parts
    assert parts["cached"][0] >= 100 * MIB
    assert found["default"][1] == size // 10
    assert found["asked"][:3] == [(3072 - 400) * MIB, 0, "asked"]


@usable
def test_without_nvml_what_torch_may_have_is_the_same() -> None:
    size, parts = torchs_limit()["unseen"]
    assert size == (6144 - 400 - 2048) * MIB and parts[CONTEXT][0] == (400 + 2048) * MIB
    assert "another package, without nvmlInit" in parts[OTHERS][1] and "cannot be distinguished" in parts[CONTEXT][1]


@usable
def test_a_neighbour_that_grew_is_named() -> None:
    assert "Other processes hold 1.32 GiB more than then: 2.00 GiB of" in torchs_limit()["shrunk"]


@usable
def test_devices_are_matched_by_uuid_where_their_order_is_swapped() -> None:
    """As for UUIDs in CUDA_VISIBLE_DEVICES: see test_doctor.py."""
    found = torchs_limit()
    assert found["numbers"] == [2, 0] and found["others"] == [2 * GIB, 700 * MIB]
