"""Test autoaccum on this machine's GPU: `python -m benchmarks.on_gpu` (docs/on-gpu.md).

It ends with one table, and with <date>-<card>-on-gpu.md, .csv and .jsonl in --output. Exit code 0 where all is as
predicted, 1 where something isn't, and 130 where it was interrupted: --resume then goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.tables import RESULTS

from . import card, earlier, report
from .drive import ROOT, Driver
from .rows import Rows, read
from .schedule import trials

MINUTES = 8.0  # on a real card, all together
REPORT_SECONDS = 3.0


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, help=f"in all; left out: {MINUTES:g}, and any on a virtual GPU")
    parser.add_argument("--workers", type=int, help="trials side by side; left out: by cores, 6 at most")
    parser.add_argument("--only", default="", help="parts, models or PART:MODEL, like a,d:gpt2-bf16")
    parser.add_argument("--resume", action="store_true", help="go on with the card's newest rows in --output")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the rows and tables")
    parser.add_argument("--report", type=Path, metavar="ROWS", help="print the table of a run's .jsonl; run nothing")
    parser.add_argument("--virtual", metavar="GPU", help="start on a virtual GPU like h100-80gb (doctor --gpus)")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = options()
    if args.report:
        print(report.as_text(read(args.report)))
        return
    if args.virtual:
        _start_on_virtual(args.virtual)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    facts = card.facts()
    rows = _rows(args, facts)
    minutes = args.minutes or (float("inf") if facts["virtual"] else MINUTES)
    workers = args.workers or max(1, min(6, len(os.sched_getaffinity(0)) // 2))
    driver = Driver(rows, facts, workers, started + 60 * minutes - REPORT_SECONDS)
    code = 0
    try:
        wanted = trials(facts, [each for each in args.only.split(",") if each])
        known = [] if facts["virtual"] else earlier.real_rows({RESULTS, args.output})
        driver.run(earlier.in_order(wanted, known) if known else wanted)
    except KeyboardInterrupt:
        print("interrupted: --resume goes on with what is left", file=sys.stderr)
        code = 130
    print(report.write(rows.path, rows.rows, time.monotonic() - started))
    sys.exit(code or (1 if report.faults(rows.rows) else 0))


def _rows(args: argparse.Namespace, facts: dict[str, Any]) -> Rows:
    """Open a file of rows: new, or resumed."""
    args.output.mkdir(parents=True, exist_ok=True)
    name = f"{slug(facts)}-on-gpu.jsonl"
    earlier = sorted(args.output.glob(f"????-??-??-{name}"))
    beside = {key: facts[key] for key in ("card", "kind", "virtual", "driver", "torch", "cuda", "cudnn", "python")}
    if args.resume and earlier:
        return Rows(earlier[-1], beside, read(earlier[-1]))
    path = args.output / f"{time.strftime('%Y-%m-%d')}-{name}"
    if path.exists():
        raise SystemExit(f"{path} is there already: go on with it by --resume, or name another --output")
    return Rows(path, beside)


def slug(facts: dict[str, Any]) -> str:
    """Return card and torch's version, for a file's name."""
    words = re.sub(r"[^a-z0-9]+", "-", facts["card"].lower()).strip("-")
    version = facts["torch"].partition("+")[0]
    return f"{'virtual-' if facts['virtual'] else ''}{words}-torch-{version}"


def _start_on_virtual(name: str) -> None:
    """Start this command anew on a virtual GPU."""
    from autoaccum.devices import virtual
    from autoaccum.devices.cuda.gpu_specs import find_gpu
    from autoaccum.devices.virtual.stand_in import virtual_settings

    gpu = replace(virtual_settings(find_gpu(name)), copies="zero", addresses="down")
    place = sys.argv.index("--virtual") if "--virtual" in sys.argv else -1
    rest = sys.argv[1:place] + sys.argv[place + 2 :] if place > 0 else [a for a in sys.argv[1:] if "--virtual" not in a]
    path = os.environ.get("PYTHONPATH", "")
    variables = virtual.environment(gpu) | {"PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT)}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.on_gpu", *rest], variables)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
