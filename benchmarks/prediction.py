"""Check predicted against measured memory on the CPU.

`python -m benchmarks.prediction [--model NAME] [--sizes 8,32,128]`.

For each model and size one process plans, a fresh one measures (committed bytes, sampled), and two more train the same
windows under a data limit of 1.01 and of 0.98 times the predicted peak: the first has to train, the second has to run
out of memory. All have the page cache preloaded, as `autoaccum run` has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from autoaccum.devices.cpu import page_cache

SIZES = (8, 16, 32, 64, 128)
LIMITS = (1.01, 0.98)
STEPS = 2


def predict(name: str, n: int) -> dict[str, Any]:
    """Plan a window of micro-batches of n in a separate process.

    It isn't verified.
    """
    from autoaccum import fit_plan

    from .models import make

    asked = {"target_batch": n * STEPS, "max_micro_batch": n, "min_micro_batch": n}
    plan = fit_plan(make(name), **asked, train_in_new_process=True, verify=False, check=False)
    return {
        "peak": plan.predicted_peak_bytes,
        "increment": plan.predicted_peak_bytes - plan.memory.baseline_bytes,
        "method": plan.method,
    }


def measure(name: str, n: int) -> dict[str, Any]:
    """Measure the first step and two windows in a fresh process.

    Windows of two micro-batches of n.

    The base is read afterwards, as planning reads it: buffers that libraries allocate on first use belong to it, and so
    do the holes that the heap had before; those that training left in it don't.
    """
    import torch

    from autoaccum.devices.registry import get_device

    device = get_device(torch.device("cpu"))
    subject = _subject(name)
    device.clean()
    before = device.read_heap()
    measured = device.measure(lambda split: _train(subject, n), [(n,)])
    subject.context.optimizer.state.clear()
    device.clean()
    return {
        "base": device.read_baseline(before).bytes,
        "peak": measured.baseline_bytes + measured.increment_bytes,
        "resident": measured.resident_bytes,
        "seconds": measured.seconds,
    }


def limited(name: str, n: int, limit_bytes: int) -> dict[str, Any]:
    """Train those windows in a fresh process limited to `limit_bytes`.

    Returns whether it trained.
    """
    from autoaccum import process_memory
    from autoaccum.devices import oom

    subject = _subject(name)
    process_memory.limit_data(limit_bytes)
    try:
        _train(subject, n)
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        return {"trains": False}
    return {"trains": True}


def _subject(name: str) -> Any:
    import torch

    from autoaccum.devices.registry import get_device
    from autoaccum.planning.target import RecordingTarget
    from autoaccum.window import step

    from .models import make

    workload = make(name)
    device = get_device(torch.device("cpu"))
    return RecordingTarget(step.open_context(workload), workload, device, device.prepare())


def _train(subject: Any, n: int) -> None:
    """Train the first optimizer step and two windows."""
    from autoaccum.window import step

    for steps in (1, STEPS, STEPS):
        step.train_window(subject.context, [subject.tile(n) for _ in range(steps)], (n,) * steps)


def _in_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prediction", "--one", json.dumps(arguments)]
    env = page_cache.environment(page_cache.CACHED)
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    for line in out.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    raise RuntimeError(f"{arguments}: {(out.stderr.strip().splitlines() or [f'exit code {out.returncode}'])[-1]}")


def row(
    name: str, n: int, measured: dict[str, Any], predicted: dict[str, Any], limits: tuple[float, ...] = LIMITS
) -> dict[str, Any]:
    """One line of the table."""
    increment, peak = predicted["increment"], predicted["peak"]
    taken = measured["peak"] - measured["base"]
    found = {
        "model": name,
        "micro-batch": n,
        "predicted MiB": increment / 2**20,
        "measured MiB": taken / 2**20,
        "error %": 100 * (increment / taken - 1),
        "predicted peak MiB": peak / 2**20,
        "measured peak MiB": measured["peak"] / 2**20,
        "peak's error %": 100 * (peak / measured["peak"] - 1),
        "resident peak MiB": measured["resident"] / 2**20,
        "seconds": measured["seconds"],
        "method": predicted["method"],
    }
    for factor in limits:
        found[f"trains at {factor:.2f}"] = _in_process("limited", name, n, int(factor * peak))["trains"]
    return found


def table(names: list[str], sizes: list[int], limits: tuple[float, ...] = LIMITS) -> list[dict[str, Any]]:
    """Every model at every size."""
    rows = []
    for name in names:
        for n in sizes:
            measured, predicted = _in_process("measure", name, n), _in_process("predict", name, n)
            rows.append(row(name, n, measured, predicted, limits))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Run the command line."""
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
