"""Recording on the CPU, with and without the user's own profiler."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_process import run_forked
from torch import nn

from autoaccum import UsageError, Workload, fit_plan
from autoaccum.devices import oom
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.devices.cpu.recorder import record
from autoaccum.processes import fork
from autoaccum.simulation.recording import Recording
from autoaccum.window import step

OnPhase = Callable[[str], AbstractContextManager[Any]]
PARENT = os.getpid()


def make(loss: Any = None) -> step.TrainingContext:
    torch.manual_seed(0)
    layers = nn.Linear(64, 300), nn.Dropout(0.3), nn.ReLU(), nn.Linear(300, 10)
    sample = torch.randn(7, 64), torch.randint(10, (7,))
    optimizer = lambda p: torch.optim.AdamW(p)  # noqa: E731
    return step.open_context(Workload(nn.Sequential(*layers), sample, loss=loss, optimizer=optimizer))


def window_of(context: step.TrainingContext, n: int = 7) -> Callable[[OnPhase], None]:
    torch.manual_seed(1)
    piece = torch.randn(n, 64), torch.randint(10, (n,))
    return lambda on_phase: void(step.train_window(context, [piece] * 2, (n, n), on_phase=on_phase))


def void(_: object) -> None:
    return None


def sizes(recording: Recording) -> list[tuple[str, list[int]]]:
    return [(phase.name, [event.bytes for event in phase.events]) for phase in recording.phases]


def profiled() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
def test_what_mkl_keeps_from_a_window_is_part_of_its_recording() -> None:
    device, layer = CpuDevice(torch.device("cpu")), nn.Linear(1024, 2048)

    def run(on_phase: OnPhase) -> None:
        with on_phase("first"), torch.no_grad():
            layer(torch.ones(128, 1024))

    assert device.record(run, micro_batch=128).library_bytes > 2**20
    assert device.record(lambda on_phase: void(torch.ones(128, 1024)), micro_batch=128).library_bytes < 2**16


def test_with_the_users_profiler_on_the_same_is_recorded_and_the_same_is_trained() -> None:
    alone, watched = make(), make()
    expected = record(window_of(alone), micro_batch=7)
    with profiled() as theirs:
        with torch.profiler.record_function("before"):
            torch.ones(3)
        found = record(window_of(watched), micro_batch=7)
        with torch.profiler.record_function("after"):
            torch.ones(3)
    assert sizes(found) == sizes(expected) and found.passes == 2
    assert {"before", "after", "aten::addmm"} <= {event.name for event in theirs.events()}
    for mine, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert all(state["step"] == 1 for state in watched.optimizer.state.values())


def test_a_second_recording_finds_the_state_that_the_first_one_made() -> None:
    """The copy's optimizer state is lost with it: the window is run here as well."""
    context = make()
    with profiled():
        first, second = (record(window_of(context), micro_batch=7) for _ in range(2))
    grown = [sum(sum(events) for _, events in sizes(each)) for each in (first, second)]
    state = 2 * sum(p.nbytes for p in context.model.parameters())
    assert grown[0] == pytest.approx(state, rel=0.01) and abs(grown[1]) < 100


def test_a_plan_is_made_under_the_users_profiler() -> None:
    model = nn.Sequential(nn.Linear(64, 4000), nn.ReLU(), nn.Linear(4000, 10))
    work = Workload(model, (torch.randn(4, 64), torch.randint(10, (4,))))
    with profiled() as theirs:
        plan = fit_plan(work, target_batch=64, max_micro_batch=32, verify=False)
    assert plan.split == (32, 32) and plan.method == "replayed"
    without = fit_plan(work, target_batch=64, max_micro_batch=32, verify=False)
    peaks = [[row.later_bytes for row in each.memory.peaks if row.micro_batch >= 32] for each in (plan, without)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02) and min(peaks[0]) > 2**20
    assert "aten::addmm" in {event.name for event in theirs.events()}


def _only_in_the_copy(what: Callable[[], object]) -> Callable[[nn.Module, Any], torch.Tensor]:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if os.getpid() != PARENT:
            what()
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    return loss


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (lambda: _raise(ValueError("not in a fork")), "ValueError: not in a fork"),
        (lambda: os._exit(3), "it ended itself with exit code 3"),
        (lambda: void(held_lock().acquire()), "it did nothing for 2 s"),
    ],
)
def test_where_the_copy_cannot_do_it_the_error_says_why(
    monkeypatch: pytest.MonkeyPatch, what: Callable[[], object], text: str
) -> None:
    monkeypatch.setattr(fork, "STUCK_SECONDS", 2.0)
    context, before = make(_only_in_the_copy(what)), children()
    with profiled(), pytest.raises(UsageError) as caught:
        record(window_of(context), micro_batch=7)
    assert text in caught.value.what and "autoaccum plan" in caught.value.hint
    assert children() == before, "the copy is left behind"


def children() -> set[int]:
    """This process's children; torch's own are among them where a test before this one compiled."""
    path = Path("/proc/self/task")
    return {int(pid) for thread in path.iterdir() for pid in (thread / "children").read_text().split()}


def held_lock() -> threading.Lock:
    """A lock that a thread of the parent holds: in the copy that thread isn't there to release it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def test_out_of_memory_in_the_copy_is_out_of_memory_here() -> None:
    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."
    with pytest.raises(MemoryError, match="99 bytes") as caught:
        fork.in_copy(lambda: _raise(RuntimeError(message)), is_out_of_memory=oom.is_out_of_memory)
    assert oom.is_out_of_memory(caught.value)


def test_a_copy_changes_nothing_here() -> None:
    numbers = [1]
    assert fork.in_copy(lambda: numbers.append(2) or len(numbers)) == 2  # type: ignore[func-returns-value]
    assert numbers == [1]


def test_what_a_recording_does_not_show_is_the_graph_and_not_the_batch() -> None:
    """A chain of many small operations has many nodes; they are the same at any micro-batch."""
    device = CpuDevice(torch.device("cpu"))
    if device.prepare() is None:
        pytest.skip("needs glibc")
    context = {links: make(_chain(links)) for links in (20, 400)}
    found: dict[tuple[int, int], int] = {}
    for links, n in ((20, 7), (400, 7), (400, 61)):
        work = window_of(context[links], n)
        recording = record(work, micro_batch=n)
        # A sampler sees it, which on a loaded machine comes too late at times: the most of several looks.
        found[links, n] = max(device.unrecorded_bytes(work, recording, 131072) for _ in range(3))
    assert found[400, 7] > found[20, 7] + 380 * 200  # a node and its tensor take some hundred bytes
    assert found[400, 61] == pytest.approx(found[400, 7], rel=0.25)


def _chain(links: int) -> Callable[[nn.Module, Any], torch.Tensor]:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(batch[0])
        for _ in range(links):
            out = out * 1.01
        return torch.nn.functional.cross_entropy(out, batch[1])

    return loss


LOGGED = """
import os, tempfile, warnings, torch
from autoaccum.devices.cpu.native_log import native_warnings_left_out
def logged(blocks):
    before = [torch.zeros(4) for _ in range(blocks)]
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True):
                before.clear()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read().count(b"Memory block of unknown size")
assert logged(1001) > 0
with native_warnings_left_out(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert logged(1000) == 0
    warnings.warn("mine")
assert [str(warning.message) for warning in caught] == ["mine"], caught
assert logged(1001) > 0
"""


def test_torchs_own_log_is_silent_while_it_is_profiled() -> None:
    """Torch logs each thousandth of these blocks in a process. A warning of Python is seen all the same."""
    done = run_forked(LOGGED)
    assert done.returncode == 0, done.stderr
