"""Compare plans with the truth on a virtual GPU: `python -m benchmarks.truth`.

The truth of a window is found by training it, in a process that never used the device before: the model
is built, and windows of that split follow as `step.train_window` trains them. It *fits* where, at the capacity and at
2 % less, nothing ran out of memory and the allocator did not give its cache back from the third window on; the rule
of `outlook_cuda.fits` and `training.TrainingReplay.fits`. A convolution that had to do without its workspace has run
out of memory, too (`num_ooms` counts it).

The smallest k is then found by trying every k, from the first whose largest micro-batch could be alive at all: live
bytes, measured with room, are a lower bound for any window that holds such a micro-batch. `largest_micro_batch`
likewise, by windows of two, from the largest possible down (`truth_search.py`).

Then `fit_plan` plans in another process, and the plan is trained there and in a fresh one (`truth_plans.py`).
Cases: `truth_cases.py`, `truth_models.py`, `generated.py`. With `--lines FILE` an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from autoaccum.devices import virtual

from .truth_cases import Case, cases
from .truth_plans import row
from .truth_report import report
from .truth_search import forked

TOGETHER = 16  # cases in a process: those of them whose virtual GPU is the same


Lines = dict[int, dict[str, Any]]  # by number


def inside(numbers: Sequence[int], count: int, known: Lines) -> None:
    """Cases by number, a line of JSON each; on the virtual GPU."""
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "torchvision", "transformers"):  # what a fork would import each time
        __import__(name)
    found = cases(count)
    for number in numbers:
        line = forked(functools.partial(_tried, found[number], known.get(number)))
        print(json.dumps({"number": number} | line), flush=True)


def _tried(case: Case, known: dict[str, Any] | None) -> dict[str, Any]:
    try:
        return row(case, known)
    except Exception as error:
        return {"case": case.label, "failed": f"{type(error).__name__}: {error}"[-1500:]}


def outside(numbers: Sequence[int], count: int, truths: Path | None) -> Iterator[str]:
    """Yield the lines of processes on virtual GPUs."""
    found = cases(count)
    for place in range(0, len(numbers), TOGETHER):
        together = numbers[place : place + TOGETHER]
        for workspace in sorted({found[n].workspace for n in together}, key=str):
            chosen = [n for n in together if found[n].workspace == workspace]
            command = [sys.executable, "-m", "benchmarks.truth", "--inside", "--cases", ",".join(map(str, chosen))]
            command += ["--truths", str(truths)] if truths else []
            environment = virtual.environment(found[chosen[0]].gpu) | {
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                "PYTHONWARNINGS": "ignore",
            }
            with subprocess.Popen(
                [*command, "--generated", str(count)], env=environment, stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                yield from process.stdout


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generated", type=int, default=100, help="generated models beside the combinations")
    parser.add_argument("--cases", default="", help="by number, like 0,3,28-40; left out, all")
    parser.add_argument("--lines", type=Path, help="keeps a line of JSON for each case; what is there isn't run again")
    parser.add_argument(
        "--truths", type=Path, help="lines of an earlier run: what trying found there isn't tried again"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    asked = args.generated + len(cases(0))
    numbers = [n for part in args.cases.split(",") if part for n in _range(part)] or list(range(asked))
    if args.inside:
        inside(numbers, args.generated, _read(args.truths))
        return
    known = {number: line for number, line in _read(args.lines).items() if number in numbers}
    for text in outside([n for n in numbers if n not in known], args.generated, args.truths):
        line = json.loads(text)
        known[line["number"]] = line
        print(_short(line), file=sys.stderr, flush=True)
        if args.lines:
            with args.lines.open("a") as file:
                file.write(text)
    lines = list(known.values())
    report(lines, asked=asked, write=args.write)


def _read(path: Path | None) -> Lines:
    """Read a file's last line for each case; leave out failed ones."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(text) for text in path.open()]
    return {line["number"]: line for line in lines if "failed" not in line}


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _short(line: dict[str, Any]) -> str:
    values = {key: line[key] for key in line if key not in ("case", "number")}
    return f"{line['number']:3} {line['case']}: " + ", ".join(f"{key} {value}" for key, value in values.items())


if __name__ == "__main__":
    main()
