"""Time the Runner against a tutorial's loop: `python -m benchmarks.speed`.

Both train the same splits.

Both train the same model in one process, window by window in turn, so that noise affects both equally; the
ratio is that of the medians. The tutorial's loop runs once more in a process with malloc's default setting: what
predictable memory costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from autoaccum.simulation.knee import interval

# model, samples in a window, micro-batches
CASES = (("char-GPT", 48, 3), ("CNN with BatchNorm", 48, 3), ("MLP", 512, 4), ("ViT", 48, 3))
WINDOWS = 24
WARM_UP = 3


def tutorial_loop(model: Any, optimizer: Any, pieces: Any) -> None:
    """Train as tutorials write it.

    Micro-batches are equal, so that dividing by their number is right.
    """
    import torch.nn.functional as F

    for inputs, classes in pieces:
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), classes.flatten()) / len(pieces)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def alternate(name: str, samples: int, steps: int, windows: int = WINDOWS) -> dict[str, Any]:
    """Time both, window by window in turn, with the plans' malloc setting."""
    from autoaccum import Runner, fit_plan
    from autoaccum.data import split
    from autoaccum.simulation.solver import balanced

    from .models import make

    workload = make(name)
    plan = fit_plan(workload, target_batch=samples, max_micro_batch=-(-samples // steps), verify=False)
    runner = Runner(workload, plan)
    batch = split.tile(workload.sample, samples)
    pieces = split.split(batch, balanced(samples, steps))
    seconds: dict[str, list[float]] = {"runner": [], "loop": []}
    for _ in range(WARM_UP + windows):
        for kind in seconds:
            started = time.perf_counter()
            if kind == "runner":
                runner.step(batch)
            else:
                tutorial_loop(runner.context.model, runner.context.optimizer, pieces)
            seconds[kind].append(time.perf_counter() - started)
    pairs = zip(seconds["runner"][WARM_UP:], seconds["loop"][WARM_UP:], strict=True)
    return {kind: statistics.median(times[WARM_UP:]) for kind, times in seconds.items()} | {
        "ratios": [runner / loop for runner, loop in pairs]
    }


def default_malloc(name: str, samples: int, steps: int, windows: int = WINDOWS) -> dict[str, Any]:
    """Time the tutorial's loop in a process with malloc's default."""
    from autoaccum.data import split
    from autoaccum.simulation.solver import balanced
    from autoaccum.window import step

    from .models import make

    workload = make(name)
    context = step.open_context(workload)
    pieces = split.split(split.tile(workload.sample, samples), balanced(samples, steps))
    seconds = []
    for _ in range(WARM_UP + windows):
        started = time.perf_counter()
        tutorial_loop(context.model, context.optimizer, pieces)
        seconds.append(time.perf_counter() - started)
    return {"loop": statistics.median(seconds[WARM_UP:])}


def recorded_program(blocks: int = 24) -> tuple[Any, Any, Any, int]:
    """Return a workload, its recording target, evidence and a budget.

    The budget is for some samples; 24 blocks make 10,000 events.
    """
    import torch
    from torch import nn

    from autoaccum import Workload
    from autoaccum.devices.registry import get_device
    from autoaccum.planning import schedule
    from autoaccum.planning.evidence import Evidence
    from autoaccum.planning.target import RecordingTarget
    from autoaccum.window import step

    from .models import Block

    model = nn.Sequential(*[Block(32, 2) for _ in range(blocks)])
    sample = torch.randn(2, 16, 32), torch.randn(2, 16, 32)
    workload = Workload(model, sample, loss=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
    device = get_device(torch.device("cpu"))
    subject = RecordingTarget(
        step.open_context(workload), workload, device, device.prepare(), heap_before=device.read_heap()
    )
    evidence = Evidence()
    schedule.record_towards_answer(subject, evidence, lambda found: schedule.Guess(0, 0), lambda found, n: True)
    device.clean()
    return workload, subject, evidence, device.read_baseline(subject.heap_before).bytes + 200 * 2**20


def solving() -> dict[str, Any]:
    """Seconds to solve for a recorded program of 10,000 events or more."""
    from autoaccum.planning import predictor_cpu
    from autoaccum.planning.request import PlanRequest
    from autoaccum.planning.resolved_request import resolve
    from autoaccum.planning.solution import solve

    workload, subject, evidence, budget = recorded_program()
    events = sum(len(steps) for steps in evidence.program().phases.values())
    request = resolve(PlanRequest(target_batch=512, budget=budget), workload, computes=True)
    predictor = predictor_cpu.make_predictor(subject, request, evidence, sample_bytes=4096, own_bytes=0)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        solution = solve(predictor)
        seconds.append(time.perf_counter() - started)
    assert solution is not None
    median, low, high = statistics.median(seconds), min(seconds), max(seconds)
    return {"events": events, "steps": len(solution.split), "seconds": median, "low": low, "high": high}


def start_seconds(repeats: int = 9) -> dict[str, list[float]]:
    """Time whole processes: Python alone, `import autoaccum` and `autoaccum --help`."""
    codes = {"python": "pass", "import": "import autoaccum", "help": "import sys; sys.argv = ['autoaccum', '--help']"}
    codes["help"] += "; from autoaccum.cli import main; main()"
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(repeats):
        for name, code in codes.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def starting() -> dict[str, Any]:
    """Their medians."""
    return {name: statistics.median(seconds) for name, seconds in start_seconds().items()}


def _in_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed", "--one", json.dumps(arguments)]
    out = subprocess.run(command, capture_output=True, text=True)
    for line in out.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    raise SystemExit(out.stderr)


def table(cases: Any = CASES, windows: int = WINDOWS) -> list[dict[str, Any]]:
    """Return one row for each case."""
    rows = []
    for name, samples, steps in cases:
        both = _in_process("alternate", name, samples, steps, windows)
        default = _in_process("default_malloc", name, samples, steps, windows)
        rows.append(
            {
                "model": name,
                "window": f"{samples} in {steps}",
                "windows": windows,
                "runner s": both["runner"],
                "loop s": both["loop"],
                "runner / loop": both["runner"] / both["loop"],
                **_spread(both["ratios"]),
                "loop, default malloc s": default["loop"],
                "fixed / default malloc": both["loop"] / default["loop"],
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _spread(ratios: list[float]) -> dict[str, Any]:
    """Return the 95 % interval of the median of the windows' ratios.

    The median of ratios, so that one window's noise doesn't count.
    """
    low, high = interval(ratios) or (min(ratios), max(ratios))
    return {"ratio low": low, "ratio high": high, "ratios": len(ratios)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = {"alternate": alternate, "default_malloc": default_malloc, "solving": solving}
    if args.one:
        kind, *rest = json.loads(args.one)
        print("RESULT", json.dumps(kinds[kind](*rest)))
        return
    import pandas

    print(pandas.DataFrame(table(windows=args.windows)).to_string(index=False, float_format="{:.3f}".format))
    print("solving", _in_process("solving"))
    print("starting", starting())


if __name__ == "__main__":
    main()
