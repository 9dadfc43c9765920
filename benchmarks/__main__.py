"""`python -m benchmarks [--quick]`: prediction and speed on this machine, written to benchmarks/results/."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import pandas
import torch

from . import prediction, speed
from .models import MODELS

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in processor if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": f"{model}, {len(os.sched_getaffinity(0))} usable cores, {memory / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, no GPU used",
        "load average": f"{os.getloadavg()[0]:.1f}",
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two models, two sizes, fewer windows: minutes, not hours")
    parser.add_argument("--name", default=platform.machine(), help="what to call this machine in the file's name")
    args = parser.parse_args()
    names = list(MODELS)[:2] if args.quick else list(MODELS)
    sizes = [8, 32] if args.quick else list(prediction.SIZES)
    predicted = pandas.DataFrame(prediction.table(names, sizes))
    timed = pandas.DataFrame(speed.table(speed.CASES[:2] if args.quick else speed.CASES))
    solved, started = speed._in_process("solving"), speed.starting()

    RESULTS.mkdir(exist_ok=True)
    stem = f"{datetime.date.today()}-{args.name}" + ("-quick" if args.quick else "")
    predicted.to_csv(RESULTS / f"{stem}-prediction.csv", index=False, float_format="%.4f")
    timed.to_csv(RESULTS / f"{stem}-speed.csv", index=False, float_format="%.5f")
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    text = (
        f"# Benchmarks, {datetime.date.today()}\n\nAll *measured on this CPU* by `python -m benchmarks"
        f"{' --quick' if args.quick else ''}`, except what is called *predicted*.\n\n{facts}\n\n"
        "## Predicted and measured memory (committed bytes; the increment is above the base)\n\n"
        "`trains at 1.03`: a process limited (RLIMIT_DATA) to 1.03 times the predicted peak trains its windows; "
        f"`at 0.97`: does one limited to 0.97 times?\n\n{_markdown(predicted, 2)}\n\n"
        "## Time of a window (medians, the two in turn in one process)\n\n"
        f"{_markdown(timed, 3)}\n\n"
        "## Solving and starting\n\n"
        f"- solving for a recorded program of {solved['events']:,} events, target 512: {solved['seconds']:.3f} s\n"
        f"- `import autoaccum`: {started['import']:.3f} s; `autoaccum --help`: {started['help']:.3f} s; "
        f"Python alone: {started['python']:.3f} s (whole processes)\n"
    )
    (RESULTS / f"{stem}.md").write_text(text)
    print(text)
    print(f"wrote {RESULTS / stem}.md and its two .csv files")


def _markdown(frame: pandas.DataFrame, digits: int) -> str:
    def cell(value: Any) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    rows = [list(frame.columns), ["---"] * len(frame.columns), *([cell(v) for v in row] for row in frame.values)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
