"""What a search finds and costs, finder by finder, on a virtual GPU: `python -m benchmarks.search_cost`.

For each case the truth is found by training in fresh processes; then each finder (the real packages, one process each)
searches on the same model and the same virtual GPU; then a fresh process trains three windows at what it found. Needs
`pip install lightning accelerate toma batch-finder batch-probe autotrainer ultralytics`; what is missing is skipped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoaccum.virtual import environment

from .peers.cases import CASES, Case

STEPS = (2, 1)  # micro-batches of a window: accumulating, and not
LESS = 0.02  # a size is safe if it trains with that much less to reserve, too
BESIDE = 3  # sizes above the first that fails which have to fail too: fitting isn't monotone
TIMEOUT_SECONDS = 900

# -- in a process on the virtual GPU


def _trained(name: str, n: int, steps: int, less: float, *, by_lightning: bool = False) -> dict[str, Any]:
    """Whether three windows of n samples a micro-batch train here, and how often the cache was given back in each."""
    import torch

    from autoaccum import oom
    from autoaccum.step import open_parts
    from autoaccum.virtual import control

    from .peers import finders

    case = CASES[name]
    torch.cuda.init()
    free, _ = torch.cuda.mem_get_info()
    control.set_other(0, int(less * free))
    retries = [0]

    def windows() -> None:
        if by_lightning:
            return finders.train_by_lightning(case.make().cuda(), case, n, finders.WINDOWS, steps)
        parts = open_parts(case.workload())
        for _ in range(finders.WINDOWS):
            finders.train(parts, case, n, windows=1, steps=steps)
            retries.append(int(torch.cuda.memory_stats()["num_alloc_retries"]))

    try:
        windows()
    except RuntimeError as error:
        if not oom.is_out_of_memory(error):
            raise
        return {"trains": False}
    return {"trains": True, "retries": [after - before for before, after in zip(retries, retries[1:], strict=False)]}


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


def truth(name: str) -> dict[str, Any]:
    """The largest size that trains, by micro-batches of a window; and the largest that is safe as a plan means it.

    Safe: it trains with 2 % less as well, and in neither case does the third window make the allocator give its cache
    back.
    """
    import torch  # noqa: F401  forked processes find it loaded

    known: dict[tuple[int, int, float], dict[str, Any]] = {}

    def trained(n: int, steps: int, less: float) -> dict[str, Any]:
        key = n, steps, less
        if key not in known:
            known[key] = _forked(lambda: _trained(name, n, steps, less))
        return known[key]

    def trains(n: int, steps: int) -> bool:
        return bool(trained(n, steps, 0.0)["trains"])

    def safe(n: int, steps: int) -> bool:
        answers = (trained(n, steps, less) for less in (0.0, LESS))
        return all(answer["trains"] and not any(answer["retries"][2:]) for answer in answers)

    found: dict[str, Any] = {}
    for steps in STEPS:
        largest = _largest(lambda n, steps=steps: trains(n, steps))
        sure = largest
        while sure and not safe(sure, steps):
            sure -= 1
        found[str(steps)] = {"trains": largest, "safe": sure, "processes": len(known)}
    return found


def _largest(works: Callable[[int], bool]) -> int:
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


def search(name: str, finder: str) -> dict[str, Any]:
    """One finder's search, in this process."""
    import torch

    from autoaccum.step import open_parts

    from .peers import accounting, finders

    case = CASES[name]
    torch.manual_seed(0)
    workload = case.workload()
    parts = open_parts(workload)
    accounting.make_changes_real()
    accounting.watch(workload.model)
    before = accounting.state_of(workload.model, parts.optimizer)
    started = time.perf_counter()
    found = finders.FINDERS[finder].find(finders.Job(name, case, workload, parts))
    seconds = time.perf_counter() - started
    after = accounting.state_of(workload.model, parts.optimizer)
    return {"found": found, "seconds": seconds, "changed": after.changed_since(before)}


def check(name: str, n: int, by_lightning: bool) -> dict[str, Any]:
    """Whether what was found trains afresh, with accumulation and without, in the shared loop or in Lightning's."""
    import torch  # noqa: F401

    from .peers import finders  # noqa: F401

    return {
        str(steps): _forked(lambda steps=steps: _trained(name, n, steps, 0.0, by_lightning=by_lightning))  # type: ignore[misc]
        for steps in STEPS
    }


# -- the table


def _in_process(case: Case, *arguments: object) -> dict[str, Any]:
    """What a process on the case's virtual GPU answers, and what its log says."""
    from .peers.accounting import LOG, cost_of

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        told = environment(case.gpu, os.environ | {LOG: str(log)})
        command = [sys.executable, "-m", "benchmarks.search_cost", "--one", json.dumps(arguments)]
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


def row(name: str, finder: str, true: dict[str, Any]) -> dict[str, Any]:
    """One line: what a finder found in a case, and what that took."""
    case = CASES[name]
    answer = _in_process(case, "search", name, finder)
    found = answer.get("found")
    if not found:
        return {"finder": finder, "found": answer.get("failed", "not for this model"), **_costs(answer)}
    afresh = _in_process(case, "check", name, found, False)
    line = {
        "finder": finder,
        "found": found,
        "of truth, k=2": f"{found / true['2']['trains']:.3f}",
        "of truth, k=1": f"{found / true['1']['trains']:.3f}",
        "trains afresh, k=2": _verdict(afresh, "2"),
        "k=1": _verdict(afresh, "1"),
        **_costs(answer),
        "changed": ", ".join(answer["changed"]) or "nothing",
    }
    if "Lightning" in finder:
        own = _in_process(case, "check", name, found, True)
        line["trains afresh, k=2"] += f" (own loop: {_verdict(own, '2')})"
        line["k=1"] += f" (own loop: {_verdict(own, '1')})"
    return line


def _costs(answer: dict[str, Any]) -> dict[str, Any]:
    costs = {
        "passes": f"{answer.get('forward', 0)} / {answer.get('backward', 0)}",
        "samples": answer.get("samples", 0),
        "OOMs": answer.get("ooms", 0),
    }
    return costs | ({"host seconds": f"{answer['seconds']:.1f}"} if "seconds" in answer else {})


def _verdict(afresh: dict[str, Any], steps: str) -> str:
    if "failed" in afresh:
        return str(afresh["failed"])
    answer = afresh[steps]
    if not answer["trains"]:
        return "OOM"
    return "yes, retries in each window" if any(answer["retries"][2:]) else "yes"


def table(name: str, finders: list[str], say: Callable[[str], None]) -> str:
    """One case as a table in Markdown."""
    case = CASES[name]
    say(f"{name}: the truth")
    true = _in_process(case, "truth", name)
    if "failed" in true:
        raise SystemExit(f"{name}: the truth can't be found: {true['failed']}")
    lines = [f"### {name}", ""]
    for steps, words in (("2", "with k = 2 micro-batches a window"), ("1", "with one")):
        lines.append(
            f"Truth {words}: {true[steps]['trains']} train, {true[steps]['safe']} train with 2 % less too and never "
            "make the allocator retry once windows repeat."
        )
    heads = ["finder", "found", "of truth, k=2", "of truth, k=1", "trains afresh, k=2", "k=1", "passes", "samples"]
    heads += ["OOMs", "host seconds", "changed"]
    lines += ["", "| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for finder in finders:
        say(f"{name}: {finder}")
        found = row(name, finder, true)
        say(json.dumps(found))
        lines.append("| " + " | ".join(str(found.get(head, "")) for head in heads) + " |")
    return "\n".join(lines) + "\n"


def _installed(finders: list[str]) -> tuple[list[str], list[str]]:
    """Those whose package is there, and those that are left out."""
    from .peers.finders import FINDERS

    there = [name for name in finders if importlib.util.find_spec(FINDERS[name].package)]
    return there, [name for name in finders if name not in there]


def _versions(finders: list[str]) -> str:
    from .peers.finders import FINDERS

    packages = {FINDERS[name].package.replace("_", "-") for name in finders} - {"autoaccum"}
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ["torch", *sorted(packages)])


def main() -> None:
    """The command line."""
    from .peers.finders import FINDERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--finder", action="append", choices=list(FINDERS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        kind, *rest = json.loads(args.one)
        answer = {"truth": truth, "search": search, "check": check}[kind](*rest)
        print("RESULT", json.dumps(answer), flush=True)
        os._exit(0)  # libraries' threads may still be ending
    finders, missing = _installed(args.finder or list(FINDERS))
    for name in missing:
        print(f"{name}: skipped, since {FINDERS[name].package} isn't installed", file=sys.stderr)
    print("*Real allocator on a virtual GPU*; kernels take no time, so seconds are the host's.\n")
    print(f"{_versions(finders)}.\n", flush=True)
    for name in args.case or list(CASES):
        print(table(name, finders, lambda text: print(text, file=sys.stderr, flush=True)), flush=True)


if __name__ == "__main__":
    main()
