"""`python -m benchmarks.truth`: plans against the truth, on the real caching allocator of a virtual GPU.

The truth of a window is found by training it, in a process of its own that never used the device before: the model
is built, and windows of that split follow as `step.train_window` trains them. It *fits* where, at the capacity and
at 2 % less, nothing ran out of memory and the allocator did not give its cache back from the third window on; the rule
of `outlook_cuda.fits` and `training.TrainingReplay.fits`. A convolution that had to do without its workspace has run
out of memory, too (`num_ooms` counts it).

The smallest k is then found by trying every k, from the first whose largest micro-batch could be alive at all: live
bytes, measured with room, are a lower bound for any window that holds such a micro-batch. `largest_micro_batch`
likewise, by windows of two, from the largest possible down.

Processes are forked from one that has imported everything, built the model on the CPU and never touched CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoaccum import Workload, errors, fit, oom, step, virtual
from autoaccum import split as cutting
from autoaccum.outlook import CAPACITY_MARGIN
from autoaccum.solve import balanced
from autoaccum.training import MOST_WINDOWS
from autoaccum.virtual import control

from . import generated, truth_models

RESULTS = Path(__file__).parent / "results"
GiB = 2**30
DEVICE_BYTES = 256 * GiB  # of the virtual GPU; the capacity is what another process leaves of it
Split = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """What is trained, with how much memory.

    Attributes:
        name: What it is called.
        make: The model on the CPU, and a batch of two samples.
        optimizer: One of `truth_models.OPTIMIZERS`.
        precision: fp32, bf16 or fp16 (with a GradScaler).
        capacity_bytes: What the allocator may have.
        load: The target, as a multiple of the largest micro-batch that fits.
        workspace: The virtual GPU's convolution_workspace.
        clip: Whether gradients are clipped.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    optimizer: str
    precision: str
    capacity_bytes: int
    load: float
    workspace: str | None = None
    clip: bool = False

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.name}, {self.optimizer}, {self.precision}, {self.capacity_bytes / GiB:g} GiB"


@dataclass
class Tried:
    """What trying a split came to."""

    ooms: int
    retries: Split
    peak_bytes: int
    live_bytes: int

    @property
    def fits(self) -> bool:
        """`training.TrainingReplay.fits`."""
        return not self.ooms and not any(self.retries[2:])


# -- processes


def forked(run: Callable[[], Any]) -> Any:
    """What `run` returns, in JSON's terms, run in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = {"found": run()}
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(text) if text else {"failed": f"ended with status {status} and no answer"}
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    return answer["found"]


def limit(capacity_bytes: int | None) -> None:
    """Lets another process leave that much of the device; the context exists then."""
    free, _ = torch.cuda.mem_get_info()
    control.set_other(0, 0 if capacity_bytes is None else free - capacity_bytes)


def workload(case: Case, model: nn.Module, batch: Any) -> Workload:
    """The case as a workload."""
    return Workload(
        model,
        batch,
        optimizer=truth_models.OPTIMIZERS[case.optimizer],
        precision=case.precision,
        scaler=torch.amp.GradScaler("cuda") if case.precision == "fp16" else None,
        clip_grad_norm=1.0 if case.clip else None,
    )


def train(work: Workload, parts: step.Parts, split: Split, windows: int) -> Tried:
    """Trains windows until they are done, or it is clear that the split doesn't fit."""
    retries: list[int] = []
    before = _count("num_ooms")
    torch.cuda.reset_peak_memory_stats()
    pieces = {size: cutting.tile(work.sample, size) for size in set(split)}
    for index in range(windows):
        retried = _count("num_alloc_retries")
        try:
            step.train_window(parts, [pieces[size] for size in split], split)
        except RuntimeError as error:
            if not oom.is_out_of_memory(error):
                raise
            oom.drop_frames(error)
        retries.append(_count("num_alloc_retries") - retried)
        if _count("num_ooms") > before or (index >= 2 and retries[-1]):
            break
    stats = torch.cuda.memory_stats()
    return Tried(
        _count("num_ooms") - before,
        tuple(retries),
        stats["reserved_bytes.all.peak"],
        stats["requested_bytes.all.peak"],
    )


def _count(name: str) -> int:
    return int(torch.cuda.memory_stats().get(name, 0))


# -- the truth


class Truth:
    """Tries splits of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model, self.batch = case.make()
        self.known: dict[tuple[Split, int | None, int], Tried] = {}

    def tried(self, split: Split, capacity_bytes: int | None, windows: int = MOST_WINDOWS) -> Tried:
        """In a fresh process."""
        key = split, capacity_bytes, windows
        if key not in self.known:
            found = forked(functools.partial(self._try, *key))
            self.known[key] = Tried(found[0], tuple(found[1]), found[2], found[3])
        return self.known[key]

    def _try(self, split: Split, capacity_bytes: int | None, windows: int) -> Any:
        limit(capacity_bytes)
        work = workload(self.case, self.model.cuda(), self.batch)
        parts = step.open_parts(work)
        found = train(work, parts, split, windows)
        return found.ooms, found.retries, found.peak_bytes, found.live_bytes

    @property
    def usable_bytes(self) -> int:
        """2 % less."""
        return int(self.case.capacity_bytes * (1 - CAPACITY_MARGIN))

    @property
    def least(self) -> int:
        """The smallest micro-batch that can be trained."""
        return 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()) else 1

    def fits(self, split: Split) -> bool:
        """The rule."""
        return all(self.tried(split, size).fits for size in (self.usable_bytes, self.case.capacity_bytes))

    def possible(self, n: int, *, alone: bool) -> bool:
        """Whether a window with such a micro-batch can be alive at once."""
        split = (n,) if alone else (n, n - 1) if n > self.least else (n, n)
        found = self.tried(split, None, 2)
        return not found.ooms and found.live_bytes <= self.usable_bytes

    def bound(self, *, alone: bool, most: int = 1 << 20) -> int:
        """The largest micro-batch that can be alive: live bytes grow with it."""
        low, high = self.least - 1, 16
        while high < most and self.possible(high, alone=alone):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.possible(middle, alone=alone) else (low, middle)
        return low

    def largest(self) -> int:
        """The largest micro-batch whose window of two fits; 0 where none does."""
        n = self.bound(alone=False)
        while n >= self.least and not self.fits((n, n)):
            n -= 1
        return n if n >= self.least else 0

    def smallest_steps(self, target: int) -> Split:
        """The split of the smallest k that fits; () where none does."""
        if self.possible(target, alone=True) and self.fits((target,)):
            return (target,)
        bound = self.bound(alone=False)
        for k in range(max(2, -(-target // max(1, bound))), target // self.least + 1):
            if self.fits(balanced(target, k)):
                return balanced(target, k)
        return ()


# -- the plan


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts micro-batches and samples that are trained: `recording` before the first verification, and after it."""
    found = {"passes": 0, "samples": 0, "verifications": 0, "verified samples": 0}
    inner, verify = step.train_window, fit._run_for_real
    verifying = False

    def train_window(parts: Any, pieces: Any, sizes: Sequence[int], **how: Any) -> Any:
        if verifying:
            found["verified samples"] += sum(sizes)
        else:
            found["passes"] += len(sizes)
            found["samples"] += sum(sizes)
        return inner(parts, pieces, sizes, **how)

    def run_for_real(outlook: Any, split: Split) -> Any:
        nonlocal verifying
        verifying = True
        found["verifications"] += 1
        try:
            return verify(outlook, split)
        finally:
            verifying = False

    step.train_window, fit._run_for_real = train_window, run_for_real  # type: ignore[assignment]
    try:
        yield found
    finally:
        step.train_window, fit._run_for_real = inner, verify


def planned(truth: Truth, target: int, *, state: bool, less: bool, histories: bool = True) -> dict[str, Any]:
    """Plans in this process, then trains the plan here.

    Args:
        truth: The case.
        target: The target batch.
        state: Whether the optimizer has state before planning, which is kept.
        less: Whether the capacity turns out 2 % smaller after planning.
        histories: Whether the plan has to hold here; else only in a fresh process.
    """
    case = truth.case
    limit(case.capacity_bytes)
    work = workload(case, truth.model.cuda(), truth.batch)
    if state:
        parts = step.open_parts(work)
        work = replace(work, optimizer=parts.optimizer)
        step.train_window(parts, [cutting.tile(work.sample, 2)], (2,))
    started = time.perf_counter()
    try:
        with counted() as count:
            plan = fit.fit_plan(work, target_batch=target, headroom=0, elsewhere=not histories)
    except errors.AutoaccumError as error:
        return {"refused": f"{type(error).__name__}: {error}", "ooms": _count("num_ooms"), **count}
    seconds = time.perf_counter() - started
    ooms = _count("num_ooms")
    if less:
        control.set_other(0, control.stats(0).other_bytes + case.capacity_bytes - truth.usable_bytes)
    here = train(work, step.open_parts(work), plan.split, MOST_WINDOWS)
    return {
        "split": plan.split,
        "largest": plan.largest_micro_batch,
        "without retries": plan.largest_without_retries,
        "binds": plan.binds,
        "method": plan.method,
        "recordings": [note.micro_batch for note in plan.recordings],
        "predicted": plan.predicted_peak_bytes,
        "measured": plan.measured_peak_bytes,
        "budget": plan.budget.bytes,
        "seconds": seconds,
        "ooms": ooms,
        "holds here": here.fits,
        "here": [here.ooms, here.retries, here.peak_bytes],
        **count,
    }


# -- the table


def cases(generated_count: int) -> list[Case]:
    """All combinations, and so many generated models; every other one with workspaces that step."""
    found = [
        Case(
            name, truth_models.MODELS[name], optimizer, precision, int(size * GiB) - (512 << 20), load, workspace,
            clip=index % 3 == 0,
        )
        for index, (name, optimizer, precision, size, load, workspace) in enumerate(truth_models.COMBINATIONS)
    ]  # fmt: skip
    for seed in range(generated_count):
        chance = random.Random(f"case {seed}")
        stepping = seed % 2 == 1
        found.append(
            Case(
                f"generated {seed}" + (" (stepping)" if stepping else ""),
                functools.partial(generated.model, seed, stepping=stepping),
                chance.choice(list(truth_models.OPTIMIZERS)),
                chance.choice(["fp32", "bf16", "fp16"]),
                chance.choice([4, 6, 8, 12, 16]) * GiB - (512 << 20),
                round(chance.uniform(1.2, 6), 1),
                chance.choice([None, "8MiB", "0.25x", "1x"]) if stepping else None,
                clip=chance.random() < 0.3,
            )
        )
    return found


def row(case: Case) -> dict[str, Any]:
    """One line of the table."""
    started = time.perf_counter()
    truth = Truth(case)
    largest = truth.largest()
    target = max(truth.least, round(case.load * largest))
    split = truth.smallest_steps(target)
    searched = time.perf_counter() - started
    plan = forked(lambda: planned(truth, target, state=False, less=False))
    line = {"case": case.label, "workspace": case.workspace or "", "target": target}
    line |= {"true k": len(split), "true largest": largest}
    if "refused" in plan:
        line |= {"refused": plan["refused"], "exact": not split, "safe": True, "ooms": plan["ooms"]}
        return line | {"truth_seconds": searched}
    chosen = tuple(plan["split"])
    others = ((True, True),) if case.name.startswith("generated") else ((False, True), (True, False), (True, True))
    here = {
        (state, less): forked(lambda state=state, less=less: planned(truth, target, state=state, less=less))
        for state, less in others
    } | {(False, False): plan}
    fresh = truth.fits(chosen)
    line |= {
        "k": len(chosen),
        "largest": plan["largest"],
        "exact": chosen == split,
        "largest exact": plan["largest"] == largest or len(chosen) == 1,
        "safe": fresh and all(each.get("holds here", True) for each in here.values()),
        "fits fresh": fresh,
        "fits here": all(each.get("holds here", True) for (state, _), each in here.items() if not state),
        "fits here, state kept": all(each.get("holds here", True) for (state, _), each in here.items() if state),
        "k with state kept": len(here[True, True].get("split", ())),
        "ooms": sum(each["ooms"] for each in here.values()),
        "passes": plan["passes"],
        "samples / micro-batch": round(plan["samples"] / chosen[0], 2),
        "verifications": plan["verifications"],
        "predicted": plan["predicted"],
        "measured": plan["measured"],
        "binds": plan["binds"],
        "method": plan["method"],
        "recordings": " ".join(map(str, plan["recordings"])),
        "plan_seconds": round(plan["seconds"], 2),
        "truth_seconds": round(searched, 1),
        "tries": len(truth.known),
    }
    return line


def inside(numbers: Sequence[int], count: int) -> None:
    """Cases by number, a line of JSON each; on the virtual GPU."""
    torch.set_num_threads(1)
    for name in ("torchvision", "transformers"):
        __import__(name)
    found = cases(count)
    for number in numbers:
        line = forked(functools.partial(_tried, number, found[number]))
        print(json.dumps({"number": number} | line), flush=True)


def _tried(number: int, case: Case) -> dict[str, Any]:
    try:
        return row(case)
    except Exception as error:
        return {"case": case.label, "failed": f"{type(error).__name__}: {error}"[-1500:]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generated", type=int, default=100, help="generated models beside the combinations")
    parser.add_argument("--cases", default="", help="by number, like 0,3,28-40; left out, all")
    parser.add_argument("--lines", type=Path, help="where to keep a line of JSON for each case as it is done")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    found = cases(args.generated)
    numbers = [n for part in args.cases.split(",") if part for n in _range(part)] or list(range(len(found)))
    if args.inside:
        inside(numbers, args.generated)
        return
    lines = []
    for workspace in sorted({found[n].workspace for n in numbers}, key=str):
        gpu = virtual.VirtualGpu(
            memory_bytes=DEVICE_BYTES, convolution_workspace=workspace, convolution_fallback=False, copies="zero"
        )
        chosen = ",".join(str(n) for n in numbers if found[n].workspace == workspace)
        command = [sys.executable, "-m", "benchmarks.truth", "--inside", "--cases", chosen]
        command += ["--generated", str(args.generated)]
        environment = virtual.environment(gpu) | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for text in process.stdout:
                lines.append(json.loads(text))
                print(_short(lines[-1]), file=sys.stderr, flush=True)
                if args.lines:
                    with args.lines.open("a") as file:
                        file.write(text)
    report(lines, write=args.write)


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _short(line: dict[str, Any]) -> str:
    told = {key: line[key] for key in line if key not in ("case", "number")}
    return f"{line['number']:3} {line['case']}: " + ", ".join(f"{key} {value}" for key, value in told.items())


def report(lines: list[dict[str, Any]], *, write: bool) -> None:
    """Prints the table, and how many were exact."""
    import pandas

    table = pandas.DataFrame(sorted(lines, key=lambda line: int(line["number"])))
    done = table[table.get("failed", pandas.Series(index=table.index, dtype=object)).isna()]
    chosen = done["case"].str.startswith("generated")
    told = []
    for title, part in (("combinations", done[~chosen]), ("generated models", done[chosen])):
        if len(part):
            told.append(
                f"- {title}: {len(part)}; smallest k exact in {(part['exact'] == True).sum()}, "  # noqa: E712
                f"largest micro-batch in {(part['largest exact'] == True).sum()}; "  # noqa: E712
                f"too high: {(part['safe'] == False).sum()}; OOMs: {part['ooms'].sum():.0f}"  # noqa: E712
            )
    if len(done) < len(table):
        told.append(f"- failed: {', '.join(table[~table.index.isin(done.index)]['case'])}")
    text = (
        f"# Plans against the truth, {datetime.date.today()}\n\n*Real allocator on a virtual GPU*, torch "
        f"{torch.__version__}, by `python -m benchmarks.truth --write`: kernels compute nothing, the allocator is "
        "PyTorch's own. What each column means is in `benchmarks/truth.py`.\n\n" + "\n".join(told) + "\n"
    )
    columns = [name for name in table.columns if name not in ("number", "predicted", "measured", "fits fresh")]
    markdown = text + "\n" + _markdown(table[columns]) + "\n"
    print(markdown)
    if write:
        RESULTS.mkdir(exist_ok=True)
        stem = f"{datetime.date.today()}-virtual-gpu-truth"
        (RESULTS / f"{stem}.md").write_text(markdown)
        table.to_csv(RESULTS / f"{stem}.csv", index=False)


def _markdown(frame: Any) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:g}"
        return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)

    rows = [list(frame.columns), ["---"] * len(frame.columns), *([cell(v) for v in row] for row in frame.values)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


if __name__ == "__main__":
    main()
