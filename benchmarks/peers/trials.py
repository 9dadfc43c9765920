"""Work in processes on the virtual GPU: truth, search and check.

Each is a fork of one process that has imported torch and made the model, so that nothing is paid for twice.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from autoaccum.devices.virtual import environment

from .accounting import LOG, cost_of
from .cases import CASES, made

WINDOWS = 6  # that a size has to train to be called one that trains; a plan replays as many
LESS = 0.02  # a size is safe if it trains with that much less to reserve, too
BESIDE = 3  # sizes above the first that fails which have to fail too: fitting isn't monotone
TIMEOUT_SECONDS = 900


def truth(name: str) -> dict[str, Any]:
    """Return the largest micro-batch that trains, and the largest safe one.

    In windows of two; safe is what a plan calls so.

    Safe: it trains with 2 % less as well, and in neither case does the allocator give its cache back from the third
    window on (`allow_retries=False`).
    """
    known: dict[tuple[int, float], dict[str, Any]] = {}

    def trained(n: int, less: float) -> dict[str, Any]:
        key = n, less
        if key not in known:
            known[key] = in_fork(lambda: train_afresh(name, n, less))
        if "failed" in known[key]:
            raise _NoTruth(known[key]["failed"])
        return known[key]

    def safe(n: int) -> bool:
        answers = (trained(n, less) for less in (0.0, LESS))
        return all(answer["trains"] and not any(answer["retries"][2:]) for answer in answers)

    try:
        largest = largest_that(lambda n: bool(trained(n, 0.0)["trains"]))
        sure = min(largest, largest_that(lambda n: bool(trained(n, LESS)["trains"])))
        while sure and not safe(sure):
            sure -= 1
    except _NoTruth as error:
        return {"failed": str(error)}
    return {"trains": largest, "safe": sure}


class _NoTruth(Exception):
    """A window failed for another reason than memory."""


def largest_that(works: Callable[[int], bool]) -> int:
    """Search by doubling and bisection, then upwards past several failures."""
    low, high = 0, 1
    while works(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    beyond = high
    while beyond - low <= BESIDE:
        beyond += 1
        if works(beyond):
            low = beyond
    return low


def train_afresh(name: str, n: int, less: float = 0.0, by_lightning: bool = False) -> dict[str, Any]:
    """Train windows of n samples a micro-batch; count cache flushes in each."""
    import torch

    from autoaccum.devices import oom
    from autoaccum.devices.virtual import control
    from autoaccum.window.step import open_context

    from . import finders

    case = CASES[name]
    torch.cuda.init()
    free, _ = torch.cuda.mem_get_info()
    control.set_other(0, int(less * free))
    retries = [0]

    def windows() -> None:
        if by_lightning:
            return finders.train_by_lightning(case.model(last=True), case, n, WINDOWS)
        context = open_context(case.workload(last=True))
        for _ in range(WINDOWS):
            finders.train(context, case, n, windows=1)
            retries.append(int(torch.cuda.memory_stats()["num_alloc_retries"]))

    try:
        windows()
    except RuntimeError as error:
        if not oom.is_out_of_memory(error):
            raise
        return {"trains": False}
    return {"trains": True, "retries": [after - before for before, after in itertools.pairwise(retries)]}


def search(name: str, finder: str) -> dict[str, Any]:
    """One finder's search, in this process."""
    import torch

    from autoaccum.window.step import open_context

    from . import accounting, finders

    case, chosen = CASES[name], finders.FINDERS[finder]
    torch.manual_seed(0)
    workload = case.workload() if chosen.given_model else None
    context = open_context(workload) if workload else None
    job = finders.Job(name, case, workload, context)
    if chosen.given_model:
        accounting.watch(job.model)
    accounting.make_changes_real()
    before = accounting.state_of(workload.model if workload else None, context.optimizer if context else None)
    started = time.perf_counter()
    found = chosen.find(job)
    seconds = time.perf_counter() - started
    after = accounting.state_of(workload.model if workload else None, context.optimizer if context else None)
    return {"found": found, "seconds": seconds, "changed": after.changed_since(before)}


def in_fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Answer in a fork that never used the GPU.

    Torch is imported and the model made before.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(TIMEOUT_SECONDS)  # whose default is to end the process
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            answer = work()
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)  # libraries' threads may still be ending
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"failed": f"no answer within {TIMEOUT_SECONDS} s" if status == signal.SIGALRM else f"status {status}"}
    answer: dict[str, Any] = json.loads(text)
    return answer


def _answer(kind: str, arguments: list[Any]) -> dict[str, Any]:
    """Do one piece of work and add the counters it logged."""
    with tempfile.NamedTemporaryFile("r", prefix="search-cost") as log:
        os.environ[LOG] = log.name
        answer = truth(*arguments) if kind == "truth" else in_fork(lambda: FORKED[kind](*arguments))
        return answer | vars(cost_of(log.read()))


FORKED: dict[str, Callable[..., dict[str, Any]]] = {"search": search, "check": train_afresh}


class Server:
    """A process on a case's virtual GPU that answers in forks.

    `with Server(name) as ask`.

    It has imported torch and made the model on the host, and never uses the GPU itself.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Callable[..., dict[str, Any]]:
        command = [sys.executable, "-m", "benchmarks.peers.trials", self.name]
        variables = environment(CASES[self.name].gpu)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=variables, text=True, **pipes)  # type: ignore[call-overload]
        return self._ask

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, kind: str, *arguments: object) -> dict[str, Any]:
        print(json.dumps([kind, self.name, *arguments]), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return answer
        raise RuntimeError(f"the process on the virtual GPU ended: exit code {self.process.wait()}")


def main() -> None:
    """Answer questions from stdin, in a process on a virtual GPU."""
    import torch  # imported once, before any fork

    from . import accounting, finders  # noqa: F401

    torch.set_num_threads(1)  # a fork has none of its parent's threads, and OpenMP would wait for them forever
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    made(CASES[sys.argv[1]])
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        print("\nRESULT", json.dumps(_answer(kind, arguments)), flush=True)


if __name__ == "__main__":
    main()
