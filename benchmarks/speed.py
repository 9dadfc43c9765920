"""Time the Runner against a tutorial's loop: `python -m benchmarks.speed [--save]`.

Both train the same splits of the same model: the Runner as `autoaccum run` starts it, the loop in a process as it
comes, under glibc's malloc; and both under other allocators (benchmarks/allocators.py). Processes take turns, window by
window; a ratio is that of the medians. Nine minutes on two cores, and for nothing else to run beside it.

Writes benchmarks/results/<date>-speed.md and .csv with --save, and the table of docs/cpu.md.
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

from . import allocators, tables

# model, samples in a window, micro-batches
CASES = (
    ("char-GPT", 64, 2), ("CNN with BatchNorm", 64, 2), ("MLP", 512, 4), ("ViT", 64, 2), ("LSTM", 64, 2),
    ("GRU tagger", 64, 2),
)  # fmt: skip
WINDOWS, CASE_SECONDS = 24, 50.0


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
    for case in cases:
        found = allocators.compare(case, windows, CASE_SECONDS)
        loop = found[allocators.LOOP]
        ratios = [run / by_hand for run, by_hand in zip(found[allocators.RUN]["seconds"], loop["seconds"], strict=True)]
        rows.append(
            {
                "model": case[0],
                "window": f"{case[1]} in {case[2]}",
                "windows": len(loop["seconds"]),
                **{f"{way}, s": each["median"] for way, each in found.items()},
                "runner / loop": found[allocators.RUN]["median"] / loop["median"],
                **_spread(ratios),
                **{f"{way}, processor s": each["processor"] for way, each in found.items()},
                **{f"{way}, kernel s": each["kernel"] for way, each in found.items()},
                **{f"{way}, faults": each["faults"] for way, each in found.items()},
                **{f"{way}, resident MiB": each["resident"] for way, each in found.items()},
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


def page(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/cpu.md.

    Seconds and resident peak of each way, by model.
    """
    lines = []
    for row in rows:
        line = {"window": f"{row['model']}, {row['window']}"}
        for way in (way for way in allocators.WAYS if f"{way}, s" in row):
            line[way] = f"{row[f'{way}, s']:.3f} s, {row[f'{way}, resident MiB']:,.0f} MiB"
        ratio = f"{row['runner / loop']:.2f} ({row['ratio low']:.2f} to {row['ratio high']:.2f})"
        lines.append({**line, f"{allocators.RUN} / {allocators.LOOP}": ratio})
    return tables.markdown(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--model", action="append", help="one of the six; may be given several times")
    parser.add_argument("--save", action="store_true", help="write the results, and the table of docs/cpu.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = {"solving": solving}
    if args.one:
        kind, *rest = json.loads(args.one)
        print("RESULT", json.dumps(kinds[kind](*rest)))
        return
    rows = table([case for case in CASES if not args.model or case[0] in args.model], args.windows)
    text = page(rows)
    print(text)
    if args.save:
        tables.write_results("speed", f"# Windows under each allocator\n\n{text}", rows)
        tables.write_between_marks(tables.DOCS / "cpu.md", text)
    print("solving", _in_process("solving"))
    print("starting", starting())


if __name__ == "__main__":
    main()
