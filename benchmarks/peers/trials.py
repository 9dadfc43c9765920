"""What is done in processes on the virtual GPU: the truth, a finder's search, and the check of what it found."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoaccum.virtual import environment

from .cases import CASES, Case

WINDOWS = 6  # that a size has to train to be called one that trains; a plan replays as many
LESS = 0.02  # a size is safe if it trains with that much less to reserve, too
BESIDE = 3  # sizes above the first that fails which have to fail too: fitting isn't monotone
TIMEOUT_SECONDS = 900


def truth(name: str) -> dict[str, int]:
    """The largest micro-batch that trains in windows of two; and the largest that is safe as a plan means it.

    Safe: it trains with 2 % less as well, and in neither case does the allocator give its cache back from the third
    window on (`allow_retries=False`).
    """
    known: dict[tuple[int, float], dict[str, Any]] = {}

    def trained(n: int, less: float) -> dict[str, Any]:
        key = n, less
        if key not in known:
            known[key] = _forked(lambda: train_afresh(name, n, less))
        return known[key]

    def safe(n: int) -> bool:
        answers = (trained(n, less) for less in (0.0, LESS))
        return all(answer["trains"] and not any(answer["retries"][2:]) for answer in answers)

    _prepare(name)
    largest = sure = largest_that(lambda n: bool(trained(n, 0.0)["trains"]))
    while sure and not safe(sure):
        sure -= 1
    return {"trains": largest, "safe": sure}


def largest_that(works: Callable[[int], bool]) -> int:
    """By doubling and bisection; then upwards until several sizes in a row fail."""
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


def train_afresh(name: str, n: int, less: float, *, by_lightning: bool = False) -> dict[str, Any]:
    """Whether windows of n samples a micro-batch train here, and how often the cache was given back in each."""
    import torch

    from autoaccum import oom
    from autoaccum.step import open_parts
    from autoaccum.virtual import control

    from . import finders

    case = CASES[name]
    torch.cuda.init()
    free, _ = torch.cuda.mem_get_info()
    control.set_other(0, int(less * free))
    retries = [0]

    def windows() -> None:
        if by_lightning:
            return finders.train_by_lightning(case.model(), case, n, WINDOWS)
        parts = open_parts(case.workload())
        for _ in range(WINDOWS):
            finders.train(parts, case, n, windows=1)
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

    from autoaccum.step import open_parts

    from . import accounting, finders

    case, chosen = CASES[name], finders.FINDERS[finder]
    _prepare(name)
    torch.manual_seed(0)
    workload = case.workload() if chosen.given_model else None
    parts = open_parts(workload) if workload else None
    job = finders.Job(name, case, workload, parts)
    if chosen.given_model:
        accounting.watch(job.model)
    accounting.make_changes_real()
    before = accounting.state_of(workload.model if workload else None, parts.optimizer if parts else None)
    started = time.perf_counter()
    found = chosen.find(job)
    seconds = time.perf_counter() - started
    after = accounting.state_of(workload.model if workload else None, parts.optimizer if parts else None)
    return {"found": found, "seconds": seconds, "changed": after.changed_since(before)}


def check(name: str, n: int, by_lightning: bool) -> dict[str, Any]:
    """Whether what was found trains afresh, in the shared loop or in Lightning's."""
    from . import finders  # noqa: F401  the forked process finds it imported

    _prepare(name)
    return _forked(lambda: train_afresh(name, n, 0.0, by_lightning=by_lightning))


def _prepare(name: str) -> None:
    """Makes the model on the host once, and imports what that imports; the GPU isn't touched."""
    from .cases import made

    made(CASES[name])


def _forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of a process that is fresh as far as the GPU goes; it has only imported torch."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = work()
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(text or '{"failed": "no answer"}')
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    return answer


WORK = {"truth": truth, "search": search, "check": check}


def in_process(case: Case, kind: str, *arguments: object) -> dict[str, Any]:
    """What a process on the case's virtual GPU answers (`python -m benchmarks.peers.trials`), and its log's sums."""
    from .accounting import LOG, cost_of

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        told = environment(case.gpu, os.environ | {LOG: str(log)})
        command = [sys.executable, "-m", "benchmarks.peers.trials", json.dumps([kind, *arguments])]
        try:
            out = subprocess.run(
                command, env=told, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer within {TIMEOUT_SECONDS} s"}
        cost = vars(cost_of(log.read_text()))
    for line in out.stdout.splitlines():
        if line.startswith("RESULT "):
            answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return answer | cost
    return {"failed": (out.stderr.strip().splitlines() or [f"exit code {out.returncode}"])[-1]} | cost


def main() -> None:
    """One piece of work, in a process on the virtual GPU that another started."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    kind, *arguments = json.loads(sys.argv[1])
    answer = WORK[kind](*arguments)  # type: ignore[operator]
    print("RESULT", json.dumps(answer), flush=True)
    os._exit(0)  # libraries' threads may still be ending


if __name__ == "__main__":
    main()
