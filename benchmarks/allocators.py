"""Time windows under each allocator, in turn, process beside process.

One process for each way trains the same model; they take turns at single windows, so that noise affects all of them
equally. *As it comes* is a loop as tutorials write it under glibc's malloc: what people compare with. The Runner's
processes are those of `autoaccum run` (the page cache preloaded, the plan made in another process) and of a program of
one's own (joined, and planned in the same process).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from autoaccum import process_memory
from autoaccum.devices.cpu import page_cache
from autoaccum.processes.fork import in_copy

LOOP, RUN, JOINED = "loop, glibc as it comes", "Runner, cached", "Runner in Python, cached"
FIXED, JEMALLOC, TCMALLOC = "Runner, fixed", "loop, jemalloc", "loop, tcmalloc"
WAYS = (LOOP, RUN, JOINED, FIXED, JEMALLOC, TCMALLOC)
WARM_UP = 2
LEAST_WINDOWS = 8  # of a way: six show a median with 95 %
_TCMALLOC = "libtcmalloc_minimal.so.4"


def environment(way: str) -> dict[str, str] | None:
    """Return a way's environment; None where this machine lacks its allocator."""
    plain = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "MALLOC_CONF")}
    if way == RUN:
        return page_cache.environment(page_cache.CACHED, plain)
    if way == JEMALLOC:
        return page_cache.environment(page_cache.JEMALLOC, plain) if page_cache.find_jemalloc() else None
    if way == TCMALLOC:
        found = [path for folder in Path("/usr/lib").glob("*-linux-gnu") for path in folder.glob(_TCMALLOC)]
        return plain | {"LD_PRELOAD": str(found[0])} if found else None
    return plain


class Worker:
    """A process that trains one way, a window at a time.

    Attributes:
        seconds: Of each timed window.
    """

    def __init__(self, way: str, case: tuple[str, int, int], env: dict[str, str]) -> None:
        self.seconds: list[float] = []
        command = [sys.executable, "-m", "benchmarks.allocators", json.dumps([way, *case])]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Worker:
        """Wait until it is ready."""
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.communicate()

    def window(self) -> float:
        """Train one window and return its seconds."""
        return float(self._ask("window"))

    def usage(self) -> dict[str, float]:
        """Return its faults and processor seconds so far, and its memory.

        The resident peak is that since the call before.
        """
        found: dict[str, float] = self._ask("usage")
        return found

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("= "):
                return json.loads(line[2:])
        raise SystemExit(f"a worker ended with exit code {self._process.wait()}")


def compare(
    case: tuple[str, int, int], windows: int, most_seconds: float, ways: tuple[str, ...] = WAYS
) -> dict[str, dict[str, Any]]:
    """Return seconds, faults and memory of each way that this machine has.

    Args:
        case: The model, samples in a window, micro-batches.
        windows: Timed windows of each, at most.
        most_seconds: Seconds for all of them; at least 8 windows of each are timed.
        ways: What to compare.
    """
    with ExitStack() as stack:
        environments = {way: env for way in ways if (env := environment(way)) is not None}
        workers = {way: stack.enter_context(Worker(way, case, env)) for way, env in environments.items()}
        for _ in range(WARM_UP):
            for worker in workers.values():
                worker.window()
        before = {way: worker.usage() for way, worker in workers.items()}
        started = time.perf_counter()
        for turn in range(windows):
            order = list(workers.values())
            for worker in order[turn % len(order) :] + order[: turn % len(order)]:
                worker.seconds.append(worker.window())
            if turn + 1 >= LEAST_WINDOWS and time.perf_counter() - started > most_seconds:
                break
        return {way: _measured(worker, before[way]) for way, worker in workers.items()}


def _measured(worker: Worker, before: dict[str, float]) -> dict[str, Any]:
    after, windows = worker.usage(), len(worker.seconds)
    return {
        "seconds": worker.seconds,
        "median": statistics.median(worker.seconds),
        "faults": (after["faults"] - before["faults"]) / windows,
        "kernel": (after["kernel"] - before["kernel"]) / windows,
        "processor": (after["processor"] - before["processor"]) / windows,
        "resident": after["resident"],
        "committed": after["committed"],
    }


# -- a worker's own side


def _trained(way: str, name: str, samples: int, steps: int) -> Iterator[None]:
    """Train a window for each `next`."""
    from autoaccum import Plan, Runner, fit_plan
    from autoaccum.data import split
    from autoaccum.simulation.solver import balanced
    from autoaccum.window import step

    from .models import make
    from .speed import tutorial_loop

    workload = make(name)
    batch = split.tile(workload.sample, samples)
    if way in (RUN, JOINED, FIXED):
        asked: dict[str, Any] = {"target_batch": samples, "max_micro_batch": -(-samples // steps)}
        asked |= {"verify": False, "check": False, "malloc": "fixed" if way == FIXED else "cached"}
        apart = way != JOINED  # as `autoaccum run`'s process, which has planned nothing
        plan = Plan.from_json(in_copy(lambda: fit_plan(workload, **asked).to_json())) if apart else None
        plan = plan or fit_plan(workload, **asked)
        assert plan.device.malloc == asked["malloc"] and len(plan.split) == steps, plan.notes
        runner = Runner(workload, plan)
        while True:
            yield
            runner.step(batch)
    context = step.open_context(workload)
    pieces = split.split(batch, balanced(samples, steps))
    while True:
        yield
        tutorial_loop(context.model, context.optimizer, pieces)


def _work(out: TextIO, way: str, name: str, samples: int, steps: int) -> None:
    import resource

    train = _trained(way, name, samples, steps)
    next(train)
    print("= 0", file=out, flush=True)
    for line in sys.stdin:
        if line.strip() == "window":
            started = time.perf_counter()
            next(train)
            answer: Any = time.perf_counter() - started
        else:
            used = resource.getrusage(resource.RUSAGE_SELF)
            answer = {
                "faults": used.ru_minflt, "kernel": used.ru_stime, "processor": used.ru_stime + used.ru_utime,
                "resident": process_memory.resident_peak_bytes() / 2**20,
                "committed": process_memory.committed_bytes() / 2**20,
            }  # fmt: skip
            process_memory.begin_resident_peak()
        print("=", json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    _work(answers, *json.loads(sys.argv[1]))
