"""Prediction against measurement, on the CPU: `python -m benchmarks.prediction [--model NAME] [--sizes 8,32,128]`.

For each model one process records and predicts; for each size a fresh process measures (committed bytes, sampled),
and two more train the same windows under a data limit of 1.03 and of 0.97 times the predicted peak: the first has to
train, the second has to run out of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

SIZES = (8, 16, 32, 64, 128)
LIMITS = (1.03, 0.97)
STEPS = 2


def predict(name: str, sizes: list[int]) -> dict[str, Any]:
    """In a process of its own: records as planning does, and predicts each size's increment and whole peak."""
    from autoaccum import cpu, fit, observe, step

    from .models import make

    workload = make(name)
    threshold = cpu.prepare()
    cpu.clean()
    before = cpu.read_heap()
    with fit._as_it_was(workload) as snapshot:
        subject = observe.Subject(step.open_parts(workload), workload, cpu, threshold)
        observed = observe.observe(subject, lambda found: max(sizes), lambda found, n: True)
        snapshot.restore()
        subject.parts.optimizer.state.clear()
        cpu.clean()
        base = cpu.read_base(before)
        base_bytes = base.bytes - snapshot.host_bytes
        sample_bytes = fit.bytes_per_sample(subject)
        rows = {}
        for n in sizes:
            increment = observe.peak_of(subject, observed, (n,) * STEPS, base.fresh).peak_bytes
            increment += cpu.data_bytes(sample_bytes * n * STEPS)
            rows[n] = {"peak": base_bytes + increment, "increment": increment}
    recorded = [note.micro_batch for note in observed.notes]
    unrecorded = observed.unrecorded_bytes
    return {"rows": rows, "method": observed.method, "recorded": recorded, "unrecorded": unrecorded}


def measure(name: str, n: int) -> dict[str, Any]:
    """In a fresh process: what the first step and two windows of two micro-batches of n take.

    The base is read afterwards, as planning reads it: buffers that libraries allocate on first use belong to it, and so
    do the holes that the heap had before; those that training left in it don't.
    """
    from autoaccum import cpu, fit, observe, step
    from autoaccum.process_memory import committed_bytes

    from .models import make

    workload = make(name)
    threshold = cpu.prepare()
    parts = step.open_parts(workload)
    subject = observe.Subject(parts, workload, cpu, threshold)
    cpu.clean()
    before, before_bytes = cpu.read_heap(), committed_bytes()
    measured = fit._run_for_real(subject, (n,) * STEPS)
    parts.optimizer.state.clear()
    cpu.clean()
    base = cpu.read_base(before).bytes
    return {
        "base": base,
        "peak": measured.base_bytes + measured.increment_bytes,
        "grown by": base - before_bytes,
        "resident": measured.resident_bytes,
        "seconds": measured.seconds,
    }


def limited(name: str, n: int, limit_bytes: int) -> dict[str, Any]:
    """In a fresh process that may not commit more than `limit_bytes`: whether it trains those windows."""
    from autoaccum import cpu, oom, process_memory, step
    from autoaccum.observe import Subject

    from .models import make

    workload = make(name)
    subject = Subject(step.open_parts(workload), workload, cpu, cpu.prepare())
    process_memory.limit_data(limit_bytes)
    try:
        for steps in (1, STEPS, STEPS):
            pieces = [subject.tile(n) for _ in range(steps)]
            step.train_window(subject.parts, pieces, (n,) * steps)
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        return {"trains": False}
    return {"trains": True}


def _in_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prediction", "--one", json.dumps(arguments)]
    out = subprocess.run(command, capture_output=True, text=True)
    for line in out.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    return {"failed": (out.stderr.strip().splitlines() or [f"exit code {out.returncode}"])[-1]}


def row(
    name: str, n: int, measured: dict[str, Any], predicted: dict[str, Any], limits: tuple[float, ...] = LIMITS
) -> dict[str, Any]:
    """One line of the table."""
    increment, peak = predicted["rows"][str(n)]["increment"], predicted["rows"][str(n)]["peak"]
    taken = measured["peak"] - measured["base"]
    found = {
        "model": name,
        "micro-batch": n,
        "predicted increment MiB": increment / 2**20,
        "measured increment MiB": taken / 2**20,
        "error %": 100 * (increment / taken - 1),
        "predicted peak MiB": peak / 2**20,
        "measured peak MiB": measured["peak"] / 2**20,
        "resident peak MiB": measured["resident"] / 2**20,
        "seconds": measured["seconds"],
        "unrecorded MiB": predicted["unrecorded"] / 2**20,
        "method": predicted["method"],
    }
    for factor in limits:
        answer = _in_process("limited", name, n, int(factor * peak))
        found[f"trains at {factor:.2f}"] = answer.get("trains", answer.get("failed"))
    return found


def table(names: list[str], sizes: list[int], limits: tuple[float, ...] = LIMITS) -> list[dict[str, Any]]:
    """Every model at every size."""
    rows = []
    for name in names:
        measured = {n: _in_process("measure", name, n) for n in sizes}
        predicted = _in_process("predict", name, sizes)
        for n in sizes:
            rows.append(row(name, n, measured[n], predicted, limits))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, *rest = json.loads(args.one)
        print("RESULT", json.dumps({"predict": predict, "measure": measure, "limited": limited}[kind](*rest)))
        return
    import pandas

    from .models import MODELS

    rows = table(args.model or list(MODELS), [int(n) for n in args.sizes.split(",")])
    print(pandas.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
