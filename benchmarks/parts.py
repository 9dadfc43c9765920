"""The parts of `python -m benchmarks`: their tables and figures.

A part runs in a separate process: `python -m benchmarks.parts NAME [--quick]` prints it as JSON on its last line.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autoaccum.reporting.kinds import Kind
from benchmarks.figures import Figure, figure_of

CPU, VIRTUAL, PREDICTED, GPU = (kind.value for kind in (Kind.CPU, Kind.VIRTUAL, Kind.PREDICTED, Kind.GPU))
Row = dict[str, Any]


@dataclass
class Part:
    """A part's result.

    Attributes:
        name: Its name on the command line.
        title: Its heading.
        lead: What its table shows.
        kinds: How its figures were obtained.
        rows: The table; cells are text or numbers.
        figures: The figures that are compared between runs.
        notes: The names of skipped cases, and other remarks.
        skipped: Why the whole part was skipped; empty where it ran.
        seconds: Duration of the part.
    """

    name: str
    title: str
    lead: str
    kinds: list[str]
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0


def prediction(quick: bool) -> Part:
    from . import prediction as benchmark
    from .models import MODELS

    part = Part(
        "prediction", "Predicted and measured memory",
        "Committed bytes; increments are above the base. A process limited (RLIMIT_DATA) to 1.01 times the predicted "
        "peak has to train its windows, one limited to 0.97 times has to run out of memory.", [CPU, PREDICTED],
    )  # fmt: skip
    rows = benchmark.table(list(MODELS)[:2] if quick else list(MODELS), [8] if quick else list(benchmark.SIZES))
    part.rows = [_peaks_last(row) for row in rows]
    for row in rows:
        name, error = f"{row['model']}, {row['micro-batch']}: error of the increment", row["error %"]
        part.figures.append(Figure(name, error, "%", CPU, error, error))
    return part


def _peaks_last(row: Row) -> Row:
    """Reorder a row for a narrow page: peaks last, seconds left out."""
    last = [name for name in row if "peak" in name]
    return {name: row[name] for name in [*(n for n in row if n not in last and n != "seconds"), *last]}


def speed(quick: bool) -> Part:
    from . import speed as benchmark

    part = Part(
        "speed", "Time of a window: the Runner against the loop of a PyTorch tutorial",
        "Medians, seconds. The Runner as `autoaccum run` starts it, with the page cache; the loop under glibc's malloc "
        "as it comes; and other allocators. Processes take turns, window by window.", [CPU],
    )  # fmt: skip
    part.rows = benchmark.table(benchmark.CASES[:1] if quick else benchmark.CASES, 6 if quick else benchmark.WINDOWS)
    for row in part.rows:
        low, high, repeats = (row.pop(name) for name in ("ratio low", "ratio high", "ratios"))
        name, ratio = f"{row['model']}: Runner over loop", row["runner / loop"]
        part.figures.append(Figure(name, ratio, "x", CPU, low, high, repeats))
        row |= {"95 % of runner / loop": f"{low:.3f} to {high:.3f}"}
    return part


def starting(quick: bool) -> Part:
    from . import speed as benchmark

    part = Part("starting", "Starting", "Whole processes.", [CPU])
    for name, seconds in benchmark.start_seconds(3 if quick else 9).items():
        figure = figure_of(seconds, name, "s", CPU)
        part.figures.append(figure)
        part.rows.append({"what": name, "seconds": figure.value, "low": figure.low, "high": figure.high})
    return part


def scaling(quick: bool) -> Part:
    from . import scaling as benchmark

    part = Part(
        "scaling", "Planning time against the size of the model",
        f"Llama-like models in bf16 with AdamW, whole `autoaccum plan --gpu {benchmark.GPU}` commands. Seconds and "
        "memory held are this machine's; answers and peaks are the real allocator's on a virtual GPU.",
        [CPU, VIRTUAL],
    )  # fmt: skip
    names, repeats = (benchmark.QUICK, 1) if quick else (tuple(benchmark.SIZES), benchmark.PLANS)
    part.rows = benchmark.sizes_table(names, repeats)
    for row in part.rows:
        seconds = row.pop("all seconds")
        part.figures.append(figure_of(seconds, f"{row['model']}: planning", "s", CPU))
        if row["peak GiB"] is not None:
            part.figures.append(_single(f"{row['model']}: predicted peak", row["peak GiB"], "GiB", VIRTUAL))
    return part


def targets(quick: bool) -> Part:
    from . import scaling as benchmark

    part = Part(
        "targets", "Solving time against the target",
        "Solving for a recorded program of over 10,000 events on the CPU, replays forgotten each time; and whole plans "
        "of a small Llama for CUDA.", [CPU],
    )  # fmt: skip
    part.rows = benchmark.targets_table((512, 1_000_000) if quick else benchmark.TARGETS)
    for row in part.rows:
        low, high = row.pop("solving s low"), row.pop("solving s high")
        name = f"solving for {row['target']:,}"
        part.figures.append(Figure(name, row["solving s"], "s", CPU, low, high, benchmark.REPEATS))
        row |= {"lowest to highest s": f"{low:.3f} to {high:.3f}"}
    return part


def search_cost(quick: bool) -> Part:
    part = Part(
        "search_cost", "What a search finds and costs, finder by finder",
        "Each finder searches on the same model and the same virtual GPU; kernels take no time there, so seconds are "
        "the host's.", [VIRTUAL],
    )  # fmt: skip
    benchmark = _optional("benchmarks.search_cost", ("available", "compare"), part)
    if benchmark is None:
        return part
    from .peers.finders import FINDERS

    finders, missing = benchmark.available(list(FINDERS))
    part.notes += [f"{name}: skipped, {FINDERS[name].package} isn't installed" for name in missing]
    for case in list(benchmark.CASES)[: 1 if quick else None]:
        try:
            part.rows += benchmark.compare(case, finders, _say)
        except RuntimeError as error:  # the other cases are still run
            part.notes.append(f"{case}: skipped, {str(error).strip().splitlines()[-1]}")
    for row in part.rows:
        for column, unit in (("of_safe", "of the truth"), ("ooms", "OOMs"), ("samples", "samples")):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                name = f"{row['case']}, {row['finder']}: {unit}"
                part.figures.append(_single(name, float(row[column]), unit, VIRTUAL))
    return part


def peer_gradients(quick: bool) -> Part:
    part = Part(
        "peer_gradients", "The gradient that trainers accumulate, against one whole batch's",
        "Relative L2 distance of the window that is furthest off.", [CPU],
    )  # fmt: skip
    benchmark = _optional("benchmarks.peer_gradients", ("compare_all", "TRAINERS", "CASES"), part)
    if benchmark is None:
        return part
    installed = {name: importlib.util.find_spec(each.package) for name, each in benchmark.TRAINERS.items()}
    trainers = [name for name, found in installed.items() if found]
    part.notes += [
        f"{name}: skipped, {benchmark.TRAINERS[name].package} isn't installed"
        for name in installed
        if name not in trainers
    ]
    part.rows = benchmark.compare_all(benchmark.CASES[: 2 if quick else None], trainers, _say)
    for row in part.rows:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            name = f"{row['case']}, {row['trainer']}, {row['how']}: error"
            part.figures.append(_single(name, float(row["error"]), "relative L2", CPU))
    return part


def gpu(quick: bool) -> Part:
    """Predicted and measured memory on this GPU, where there is one."""
    part = Part(
        "gpu", "Predicted and measured on this GPU",
        "Part (a) of `python -m benchmarks.on_gpu` on the GPU that is here: reserved bytes, and the largest "
        "micro-batch against the truth around it.",
        [GPU, PREDICTED],
    )  # fmt: skip
    part.skipped = _why_no_gpu()
    if part.skipped:
        return part
    only = "a:resnet50-fp32,a:gpt2-bf16" if quick else "a"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.on_gpu", "--only", only, "--output", folder], stdout=sys.stderr
        )
        tables = list(Path(folder).glob("*.csv"))
        part.rows = list(csv.DictReader(tables[0].open(newline=""))) if tables else []
    for row in part.rows:
        if row["off %"]:
            part.figures.append(_single(f"{row['what']}: error of the peak", float(row["off %"]), "%", GPU))
    return part


def _why_no_gpu() -> str:
    """Why nothing can be measured here; empty where it can."""
    import torch

    from autoaccum.devices.virtual.control import is_virtual

    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    return "the GPU is a virtual one, which has no times" if is_virtual() else ""


PARTS: dict[str, Callable[[bool], Part]] = {
    "prediction": prediction,
    "speed": speed,
    "starting": starting,
    "scaling": scaling,
    "targets": targets,
    "search_cost": search_cost,
    "peer_gradients": peer_gradients,
    "gpu": gpu,
}


def _single(name: str, value: float, unit: str, kind: str) -> Figure:
    return Figure(name, value, unit, kind, value, value)


def _optional(module: str, needed: Sequence[str], part: Part) -> Any:
    """Import an optional benchmark; where missing, mark the part as skipped."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        part.skipped = f"{module} can't be imported: {error}"
        return None
    lacking = [name for name in needed if not hasattr(found, name)]
    if lacking:
        part.skipped = f"{module} lacks {', '.join(lacking)}"
        return None
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run one part's command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        part = PARTS[args.name](args.quick)
    part.seconds = time.perf_counter() - started
    print(json.dumps(asdict(part), default=str), flush=True)
    sys.stderr.flush()
    os._exit(0)  # libraries' threads may still be ending


if __name__ == "__main__":
    main()
