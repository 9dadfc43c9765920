"""Compare tuned plans with untuned ones and a grid's best.

`python -m benchmarks.tuning`.

For each model: a tuning in a quarter of the grid's trials; the grid, all of it; then the plain configuration and both
winners once more, window by window in turn, in four processes, each opening another one first. The interval is a
bootstrap over the paired ratios' median. A quarter of an hour on two quiet cores; written to
benchmarks/results/DATE-tuning.{md,csv}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas

MODELS_FILE = Path(__file__).with_name("tuned_models.py")
TARGET_BATCH, MEMORY = 128, "2GiB"
PROCESSES, WINDOWS, WARM_UP = 4, 75, 3
RESAMPLES = 10_000

COMMON = {"precision": ("fp32", "bf16"), "micro_batch": ("largest", 8, 32), "checkpointing": (0, 1)}
QUICK: dict[str, Any] = {
    "precision": ("fp32",), "micro_batch": ("largest", 32), "checkpointing": (0,), "optimizer": ("loop", "fused"),
    "channels_last": (False,),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {**COMMON, "optimizer": ("loop", "foreach", "fused")},
    "cnn": {**COMMON, "micro_batch": ("largest", 16), "optimizer": ("loop", "fused"), "channels_last": (False, True)},
    "gpt": {**COMMON, "optimizer": ("loop", "foreach", "fused")},
    "vit": {**COMMON, "optimizer": ("loop", "foreach", "fused"), "channels_last": (False,)},
}


def interval(ratios: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """Return the median of paired ratios, and its 95 % interval.

    By a percentile bootstrap over the pairs.
    """
    pairs = numpy.asarray(ratios)
    drawn = numpy.random.default_rng(seed).choice(pairs, (resamples, len(pairs)))
    low, high = numpy.percentile(numpy.median(drawn, axis=1), [2.5, 97.5])
    return float(numpy.median(pairs)), float(low), float(high)


def tuned(model: str, choices: dict[str, Any], sampler: str, trials: int | None) -> Any:
    """Tune one model, in child processes."""
    import autoaccum

    space = autoaccum.SearchSpace(**choices)
    return autoaccum.tune(
        f"{MODELS_FILE}:{model}", target_batch=TARGET_BATCH, space=space, trials=trials, memory=MEMORY,
        sampler=sampler, progress=lambda message: say(f"{model}: {message['trial']}") if "trial" in message else None,
    )  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def alternate(model: str, contenders: dict[str, dict[str, Any]], windows: int = WINDOWS) -> dict[str, list[float]]:
    """Time windows of each contender in turn, the first one changing.

    With the malloc setting of plans.

    Args:
        model: Which one.
        contenders: By name, a configuration and the split of its window.
        windows: Of each, after three that aren't counted.
    """
    import tuned_models  # type: ignore[import-not-found]

    from autoaccum import configure, process_memory
    from autoaccum.data import split
    from autoaccum.tuning import Configuration
    from autoaccum.window import step

    process_memory.fix_mmap_threshold()
    ready = {}
    for name, contender in contenders.items():
        workload = configure(getattr(tuned_models, model)(), Configuration.from_values(contender["configuration"]))
        pieces = {size: split.tile(workload.sample, size) for size in set(contender["split"])}
        ready[name] = step.open_context(workload), [pieces[size] for size in contender["split"]], contender["split"]
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for number in range(WARM_UP + windows):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            context, batches, sizes = ready[name]
            started = time.perf_counter()
            step.train_window(context, batches, sizes)
            seconds[name].append(time.perf_counter() - started)
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def in_processes(model: str, contenders: dict[str, dict[str, Any]], windows: int) -> dict[str, list[float]]:
    """Run `alternate` in several processes, another contender first in each.

    Processes differ, too.
    """
    names = list(contenders)
    runs = []
    for number in range(PROCESSES):
        turn = number % len(names)
        runs.append(in_process(model, {name: contenders[name] for name in names[turn:] + names[:turn]}, windows))
    return {name: [seconds for run in runs for seconds in run[name]] for name in names}


def in_process(*arguments: object) -> dict[str, list[float]]:
    """Run `alternate` in a separate process."""
    command = [sys.executable, "-m", "benchmarks.tuning", "--one", json.dumps(arguments)]
    out = subprocess.run(command, capture_output=True, text=True)
    for line in out.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, list[float]] = json.loads(line.removeprefix("RESULT "))
            return found
    raise SystemExit(out.stderr)


def compared(model: str, choices: dict[str, Any], windows: int = WINDOWS) -> dict[str, Any]:
    """Compare one model's contenders; return a row of the table."""
    from autoaccum.simulation.solver import balanced
    from autoaccum.tuning.result import sentence

    started = time.monotonic()
    size = math.prod(len(options) for options in choices.values())
    quarter = tuned(model, choices, "tpe", size // 4)
    grid = tuned(model, choices, "grid", None)
    assert grid.space == size, f"the grid has {grid.space} configurations, not {size}"
    plain = next(trial for trial in quarter.trials if trial.number == quarter.plain)
    plain_split = balanced(TARGET_BATCH, plain.accumulation_steps)
    contenders = {
        "tuned": {"configuration": dict(quarter.best.configuration), "split": quarter.plan.split},
        "grid": {"configuration": dict(grid.best.configuration), "split": grid.plan.split},
        "plain": {"configuration": dict(plain.configuration), "split": plain_split},
    }
    seconds = in_processes(model, contenders, windows)
    against_grid = interval([g / t for g, t in zip(seconds["grid"], seconds["tuned"], strict=True)])
    against_plain = interval([p / t for p, t in zip(seconds["plain"], seconds["tuned"], strict=True)])

    def words(trial: Any) -> str:
        return f"{sentence(trial.configuration)}, {trial.micro_batch} x {trial.accumulation_steps}"

    return {
        "model": model,
        "grid": size,
        "trials": sum(trial.state != "same" for trial in quarter.trials),
        "tuned": words(quarter.best),
        "best of the grid": words(grid.best),
        **{f"{name} s": statistics.median(times) for name, times in seconds.items()},
        "windows": PROCESSES * windows,
        **dict(zip(("grid / tuned", "low", "high"), against_grid, strict=True)),
        **dict(zip(("plain / tuned", "plain low", "plain high"), against_plain, strict=True)),
        "above 0.95": "yes" if against_grid[1] > 0.95 else "no",
        "changes numbers": ", ".join(quarter.best.numerics) or "nothing",
        "took s": time.monotonic() - started,
    }


def written(rows: list[dict[str, Any]], folder: Path) -> str:
    """Write the table as Markdown and CSV; return the Markdown."""
    from .__main__ import machine
    from .tables import of_frame

    folder.mkdir(exist_ok=True)
    stem = folder / f"{datetime.date.today()}-tuning"
    if stem.with_suffix(".csv").exists():  # today's rows of the models that were not run now stay
        anew = {row["model"] for row in rows}
        kept = pandas.read_csv(stem.with_suffix(".csv")).to_dict("records")
        rows = [*(row for row in kept if row["model"] not in anew), *rows]
    pandas.DataFrame(rows).to_csv(stem.with_suffix(".csv"), index=False, float_format="%.5f")
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    short = [
        {
            "model": row["model"],
            "trials": f"{row['trials']} of {row['grid']}",
            "plain s": row["plain s"],
            "tuned s": row["tuned s"],
            "grid's best s": row["grid s"],
            "plain / tuned": f"{row['plain / tuned']:.2f} ({row['plain low']:.2f} to {row['plain high']:.2f})",
            "grid's best / tuned": f"{row['grid / tuned']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            "above 0.95": row["above 0.95"],
        }
        for row in rows
    ]
    winners = "\n".join(
        f"- {row['model']}: tuned: {row['tuned']} (changes numbers: {row['changes numbers']}); best of the grid: "
        f"{row['best of the grid']}"
        for row in rows
    )
    text = (
        f"# Tuning, {datetime.date.today()}\n\n*Measured on this CPU* by `python -m benchmarks.tuning`, in "
        f"{sum(row['took s'] for row in rows) / 60:.1f} minutes.\n\n{facts}\n\n"
        f"Effective batch {TARGET_BATCH}, {MEMORY} for the whole process. Seconds per optimizer step: medians of "
        f"{rows[0]['windows']} windows, the three in turn, in {PROCESSES} processes. Ratios: medians of paired "
        "windows, with the 95 % interval of a bootstrap over the pairs. *plain*: autoaccum's plan untuned. *grid*: the "
        "best of all configurations. Each was timed separately, the leading ones and the plain one then in turn.\n\n"
        f"{of_frame(pandas.DataFrame(short), 4)}\n\n## Winners\n\n{winners}\n"
    )
    stem.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="a grid of four: does it run?")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="in each of the processes")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.path.insert(0, str(MODELS_FILE.parent))
        print("RESULT", json.dumps(alternate(*json.loads(args.one))))
        return
    spaces = {model: QUICK if args.quick else MODELS[model] for model in args.models}
    print(written([compared(model, spaces[model], args.windows) for model in spaces], args.folder))


if __name__ == "__main__":
    main()
