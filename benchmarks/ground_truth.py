"""Predict on a virtual GPU what others measured on real ones.

`python -m benchmarks.ground_truth DATA.csv`.

The file has a row for each run of a benchmark of milabench (`gpu`, `bench`, `batch_size`, `memory_mib_median`,
`near_capacity`): the most memory that NVML counted as used. Each benchmark's own training loop (`benchmarks.ground`) is
run on a virtual GPU, where PyTorch's real allocator says what it reserves. The prediction is that and one constant,
taken from one benchmark and applied to all others as it is: the driver's own memory, CUDA's context and libraries.

The packages should be those that were measured (docs/ground-truth.md): other versions reserve other memory.

Rows that were looked at while the loops were written are kept apart from those that were held out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas

from autoaccum.devices import virtual
from autoaccum.devices.cuda.gpu_specs import Gpu, find_gpu
from autoaccum.devices.virtual.stand_in import virtual_settings

from .tables import of_frame

RESULTS = Path(__file__).parent / "results"
DATE = "2026-11-28"
MIB = 2**20
LARGE_BYTES = 10 * 10**9
NEAR_MIB = 400
CONSTANT_FROM = ("H100", "bert-fp32")
# benchmarks/LOG.md, before the first run; two were moved there after it: lightning's, to find which convolutions turn
# tensors, and Reformer's, to find that the order of addresses counts
DEVELOPMENT = (CONSTANT_FROM, *(("H100", bench) for bench in ("resnet50", "regnet_y_128gf", "lightning", "reformer")))
# milabench's pins at dc0617d1 (benchmarks/*/requirements.cuda.txt, benchmarks/timm/benchfile.py)
MEASURED_WITH = {
    "torch": "2.6.0",
    "torchvision": "0.21.0",
    "transformers": "4.49.0",
    "timm": "1.0.3",
    "lightning": "2.5.0.post0",
}


@dataclass(frozen=True)
class Device:
    """A GPU of the data.

    Attributes:
        gpu: As in `autoaccum.devices.cuda.gpu_specs`.
        nvml_total_mib: NVML's total. What it is above CUDA's is the driver's own, which NVML's first memory info
            counts as used (docs.nvidia.com/deploy/nvml-api, nvmlMemory_t); milabench asks that one.
    """

    gpu: Gpu
    nvml_total_mib: int

    @property
    def driver_mib(self) -> float:
        """The driver's own."""
        return self.nvml_total_mib - self.gpu.total_bytes / MIB


# nvidia-smi's totals: 81559MiB, 143771MiB (words to search for)
DEVICES = {"H100": Device(find_gpu("h100-80gb"), 81_559), "H200": Device(find_gpu("h200"), 143_771)}


def reserved(data: pandas.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield what PyTorch's allocator reserves for each row.

    Each row is trained in a separate process on the virtual GPU.
    """
    for name, rows in data.groupby("gpu", sort=False):
        settings = replace(virtual_settings(DEVICES[str(name)].gpu), copies="zero", addresses="down")
        asked = [json.dumps([row.bench, int(row.batch_size)]) for row in rows.itertuples()]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ground.run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=virtual.environment(settings),
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n".join(asked))
        process.stdin.close()
        for done, line in enumerate(process.stdout, 1):
            bench, batch_size, answer = json.loads(line)
            print(f"\r{name}: {done} of {len(asked)}: {bench} {batch_size}".ljust(70), end="", file=sys.stderr)
            if "failed" in answer:
                print(f"\n{answer['failed']}", file=sys.stderr)
            yield {"gpu": name, "bench": bench, "batch_size": batch_size, **_compared(answer)}
        if process.wait():
            raise SystemExit(f"The runs on the virtual {name} ended with exit code {process.returncode}.")
    print(file=sys.stderr)


def _compared(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer with its replay's difference from the allocator."""
    replayed = answer.pop("replayed", None)
    if replayed is None:
        return answer
    same = all(answer[figure] == value for figure, value in replayed.items())
    return {**answer, "replay_error_bytes": replayed["reserved"] - answer["reserved"], "replay_is_same": same}


def predict(data: pandas.DataFrame) -> tuple[pandas.DataFrame, float, str]:
    """Each row with its prediction and error.

    Returns:
        The rows; the constant on an H100 in MiB; where it comes from.
    """
    keys = ["gpu", "bench", "batch_size"]
    answers = pandas.DataFrame(list(reserved(data)))
    if "reserved" not in answers or answers.reserved.isna().any():
        raise SystemExit("Some benchmarks failed to run: see above.")
    found = data.merge(answers.astype({"out": bool}), on=keys, validate="one_to_one")
    found["reserved_mib"] = found["reserved"] / MIB
    gpu, bench = CONSTANT_FROM
    source = found[(found.gpu == gpu) & (found.bench == bench) & ~found.near_capacity]
    if len(source):
        differences = source.memory_mib_median - source.reserved_mib
        constant = float(differences.median())
        spread = f"{differences.min():.0f} to {differences.max():.0f}"
        origin = f"the median of {len(source)} rows of {bench} on {gpu} ({spread} MiB), applied to all others as it is"
    else:
        device = DEVICES[gpu]
        constant = device.driver_mib + (device.gpu.context_bytes + device.gpu.library_bytes) / MIB
        origin = f"`autoaccum.devices.cuda.gpu_specs`, since no row is of {bench} on {gpu}"
    driver = found.gpu.map(lambda name: DEVICES[name].driver_mib - DEVICES[gpu].driver_mib)
    found["predicted_mib"] = found.reserved_mib + constant + driver
    found["error_mib"] = found.predicted_mib - found.memory_mib_median
    found["error_percent"] = 100 * found.error_mib / found.memory_mib_median
    found["set"] = ["development" if (row.gpu, row.bench) in DEVELOPMENT else "held out" for row in found.itertuples()]
    return found, constant, origin


def summary(found: pandas.DataFrame) -> pandas.DataFrame:
    """Errors by set and size."""
    large = found.memory_mib_median * MIB >= LARGE_BYTES
    rows = []
    for name, chosen in (("development", found.set == "development"), ("held out", found.set == "held out")):
        for size, of_size in (("10 GB and more", large), ("smaller", ~large)):
            rows.append({"rows": f"{name}, {size}", **_errors(found[chosen & of_size & ~found.near_capacity])})
    for size, of_size in (("10 GB and more", large), ("smaller", ~large)):
        rows.append({"rows": f"all, {size}", **_errors(found[of_size & ~found.near_capacity])})
    rows.append({"rows": "near capacity", **_errors(found[found.near_capacity])})
    return pandas.DataFrame(rows)


def by_benchmark(found: pandas.DataFrame) -> pandas.DataFrame:
    """Errors of each benchmark."""
    rows = []
    for (gpu, bench), group in found.groupby(["gpu", "bench"], sort=False):
        away = group[~group.near_capacity]
        label = f"{bench}, {gpu}" + (" (development)" if (gpu, bench) in DEVELOPMENT else "")
        rows.append({"rows": label, **_errors(away if len(away) else group)})
    return pandas.DataFrame(rows)


def _errors(rows: pandas.DataFrame) -> dict[str, Any]:
    percent, mib = rows.error_percent.abs(), rows.error_mib.abs()
    return {
        "number": len(rows),
        "median %": percent.median(),
        "90th percentile %": percent.quantile(0.9),
        "worst %": percent.max(),
        "median MiB": mib.median(),
        f"within {NEAR_MIB} MiB": f"{100 * (mib <= NEAR_MIB).mean():.0f} %" if len(rows) else "",
        "too low": int((rows.error_mib < 0).sum()),
    }


def versions() -> str:
    """Return the versions that ran, and the measured ones where they differ."""
    from importlib.metadata import PackageNotFoundError, version

    texts = []
    for package, measured in MEASURED_WITH.items():
        try:
            found = version(package)
            texts.append(f"{package} {found}" + ("" if found == measured else f" (measured with {measured})"))
        except PackageNotFoundError:
            texts.append(f"{package} is not installed")
    return ", ".join(texts)


def replays(found: pandas.DataFrame) -> str:
    """Return in how many rows the replay equals the real allocator."""
    if "replay_is_same" not in found:
        return "not asked"
    worst = int(found.replay_error_bytes.abs().max())
    return (
        f"in {int(found.replay_is_same.sum())} of {len(found)} rows reserved, allocated, retries and whether it ran "
        f"out are the real allocator's to the byte (the largest difference in reserved: {worst:,} B)"
    )


def report(found: pandas.DataFrame, constant: float, origin: str, left_out: str) -> str:
    """Write the result as text and tables."""
    misses = found[~found.near_capacity & (found.error_percent.abs() > 4) & (found.error_mib.abs() > NEAR_MIB)]
    columns = ["gpu", "bench", "batch_size", "memory_mib_median", "predicted_mib", "error_mib", "error_percent"]
    near = found[found.near_capacity]
    return (
        f"# Memory measured on real GPUs by others, predicted on a virtual GPU, {DATE}\n\n"
        "By `python -m benchmarks.ground_truth DATA.csv`. *Measured on a GPU* by others: milabench "
        "(mila-iqia/milabench, config/scaling, MIT), NVML's used memory, torch 2.6.0, spring 2025. *Predicted*: what "
        "its training loops reserve of the *real allocator on a virtual GPU*, and a constant.\n\n"
        f"- run with {versions()}\n"
        f"- the constant: {constant:.0f} MiB on H100: {origin}; on H200 it differs by what NVML's totals differ from "
        f"CUDA's ({DEVICES['H200'].driver_mib - DEVICES['H100'].driver_mib:+.0f} MiB)\n"
        f"- development: {', '.join(f'{bench} on {gpu}' for gpu, bench in DEVELOPMENT)}; all else was held out\n"
        f"- left out: {left_out or 'none'}\n"
        f"- near capacity, where the allocator gives cached blocks back: {len(near)} rows, of which "
        f"{int((~near.out).sum())} ran to their end on a virtual GPU of the real one's size (all on the real one)\n"
        f"- the same steps' allocations and frees, replayed by autoaccum's own rules: {replays(found)}\n\n"
        f"## Errors by size (without rows near capacity, but for the last line)\n\n{of_frame(summary(found), 2)}\n\n"
        f"## By benchmark\n\n{of_frame(by_benchmark(found), 2)}\n\n"
        f"## Rows that miss by more than 4 % and {NEAR_MIB} MiB\n\n"
        f"{of_frame(misses[columns], 1) if len(misses) else 'None.'}\n"
    )


def read(path: Path) -> tuple[pandas.DataFrame, str]:
    """Read the rows; return those that can be predicted, and the rest."""
    from .ground import models

    data = pandas.read_csv(path)
    data["near_capacity"] = data.near_capacity.astype(bool)
    missing = {name: models.missing_package(name) for name in data.bench.unique()}
    known = data.gpu.isin(DEVICES) & data.bench.map(lambda name: missing[name] is None)
    rest = data[~known].groupby("bench", sort=False).size()
    left_out = ", ".join(f"{count} rows of {name} ({missing[name] or 'unknown GPU'})" for name, count in rest.items())
    return data[known].reset_index(drop=True), left_out


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the measurements: a csv file")
    parser.add_argument("--bench", action="append", help="of these benchmarks only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    args = parser.parse_args()
    reason = virtual.available()
    if reason is not None:
        raise SystemExit(f"The virtual GPU is not available here: {reason}")
    if not args.data.is_file():
        raise SystemExit(f"There is no file {args.data}: name a csv file of measurements.")
    data, left_out = read(args.data)
    if args.bench:
        data = data[data.bench.isin(args.bench)].reset_index(drop=True)
    if not len(data):
        raise SystemExit(f"None of its rows can be predicted: {left_out or 'it has none'}.")
    found, constant, origin = predict(data)
    text = report(found, constant, origin, left_out)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{DATE}-ground-truth"
    columns = ["gpu", "bench", "batch_size", "set", "near_capacity", "memory_mib_median", "reserved_mib"]
    columns += ["predicted_mib", "error_mib", "error_percent", "retries", "out", "replay_error_bytes", "replay_is_same"]
    found[columns].to_csv(f"{stem}.csv", index=False, float_format="%.2f")
    Path(f"{stem}.md").write_text(text)
    print(text)
    print(f"wrote {stem}.md and .csv")


if __name__ == "__main__":
    main()
