"""Plan language models with small and large vocabularies, then train them.

`python -m benchmarks.language_models`.

The logits of such a model are one block of hundreds of MiB, so whether a window fits depends on where a few blocks are
placed by the caching allocator. Each model is planned on a virtual GPU of its own size, and then trained in the planned
split, each in a process that never used the device before: by the Runner's window, and by a loop written by hand. What
counts: no out-of-memory while planning or training; what was predicted is what was reserved; and the Runner reserves no
more than the loop, where both compute the same. Real allocator on a virtual GPU: kernels compute nothing.

With `--lines FILE` an interrupted run goes on where it was; `--write` writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from autoaccum import Workload, fit_plan
from autoaccum.data import tree
from autoaccum.data.split import tile
from autoaccum.devices import virtual
from autoaccum.errors import DoesNotFit
from autoaccum.planning.predictor_virtual import UninitializedTarget
from autoaccum.planning.record import FIRST_STEP_SAMPLES
from autoaccum.simulation.solver import CAPACITY_MARGIN
from autoaccum.window import step

from .truth_search import count, forked

MIB, GIB = 1 << 20, 1 << 30
CASES = 40
SECONDS = 300  # for one case
CONTEXT_BYTES = 512 * MIB
WINDOWS = 5
OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@dataclass(frozen=True)
class Case:
    """A language model and how it is trained.

    Attributes:
        seed: What all else was drawn with.
        padded: Whether rows are padded, with an attention mask and labels that are ignored.
        own_loss: Whether the loss is a function of ours, of the logits; else the model's.
        precision: "fp32"; "autocast" to bf16; or "bf16" parameters, whose gradients add up in fp32 or as they are.
        memory_bytes: The device's, the context included.
        target: Samples in an optimizer step.
    """

    seed: int
    vocabulary: int
    hidden: int
    layers: int
    tokens: int
    padded: bool
    own_loss: bool
    precision: str
    optimizer: str
    clips: bool
    accumulate: str
    memory_bytes: int
    target: int

    @property
    def label(self) -> str:
        """In words."""
        loss = "own loss" if self.own_loss else "its loss, padded" if self.padded else "its loss"
        return (
            f"{self.layers} x {self.hidden}, vocabulary {self.vocabulary:,}, {self.tokens} tokens, {loss}, "
            f"{self.precision}{', sums as parameters' if self.accumulate != 'fp32' else ''}, {self.optimizer}"
            f"{', clips' if self.clips else ''}, {self.memory_bytes / GIB:g} GiB"
        )

    @property
    def same_numbers(self) -> bool:
        """Whether a plain loop computes the same sums.

        It doesn't where parameters are in bf16, whose sums it keeps in bf16.
        """
        return self.precision != "bf16" or self.accumulate != "fp32"


def case(seed: int) -> Case:
    """Return a seed's language model; the first ones once had faults."""
    if seed < len(FOUND):
        return FOUND[seed]
    chance = random.Random(f"language model {seed}")
    vocabulary = int(8_000 * 32 ** chance.random()) // 64 * 64
    hidden = chance.choice([128, 256, 320, 384, 512])
    layers, tokens = chance.randint(2, 12), chance.choice([64, 128, 192, 256, 512])
    memory = chance.choice([2, 3, 4, 6, 8, 12, 16, 24]) * GIB
    own_loss = chance.random() < 0.5
    precision = chance.choice(["fp32", "autocast", "bf16"])
    parameters = 2 * vocabulary * hidden + layers * 12 * hidden * hidden
    row = tokens * (13 * vocabulary + 50 * layers * hidden)  # roughly a sample's bytes
    most = max(2, int((memory - CONTEXT_BYTES - 16 * parameters) / row))
    return Case(
        seed, vocabulary, hidden, layers, tokens, not own_loss and chance.random() < 0.5, own_loss, precision,
        chance.choice(list(OPTIMIZERS)), chance.random() < 0.4, chance.choice(["fp32", "as_parameters"]), memory,
        max(2, int(most * chance.uniform(1.3, 5))),
    )  # fmt: skip


FOUND = (
    Case(0, 24_000, 320, 3, 192, False, False, "autocast", "AdamW fused", True, "fp32", 4 * GIB, 64),
    Case(1, 32_000, 256, 4, 256, True, False, "fp32", "AdamW", False, "fp32", 4 * GIB, 64),
    Case(2, 5_000, 128, 2, 128, False, False, "autocast", "AdamW", False, "fp32", 2 * GIB, 512),
)


def workload(of: Case, model: torch.nn.Module) -> Workload:
    """Return the case as a workload with a sample of eight rows."""
    ids = torch.ones(8, of.tokens, dtype=torch.long)
    batch: Any = (ids, ids.clone()) if of.own_loss else {"input_ids": ids, "labels": ids.clone()}
    if of.padded:
        batch["attention_mask"] = (
            torch.arange(of.tokens) < torch.linspace(of.tokens / 2, of.tokens, 8)[:, None]
        ).long()
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return Workload(
        model,
        batch,
        loss=own_loss if of.own_loss else None,
        optimizer=OPTIMIZERS[of.optimizer],
        precision="bf16" if of.precision == "autocast" else None,
        clip_grad_norm=1.0 if of.clips else None,
        accumulate=of.accumulate,
    )


def own_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Cross-entropy of the logits in fp32, as tutorials have it."""
    ids, goal = batch
    return F.cross_entropy(model(ids).logits.flatten(0, 1).float(), goal.flatten())


def make(of: Case) -> torch.nn.Module:
    """Make the model on the CPU, in pages that nobody writes to."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=of.vocabulary,
        hidden_size=of.hidden,
        intermediate_size=int(2.7 * of.hidden) // 8 * 8,
        num_hidden_layers=of.layers,
        num_attention_heads=4,
        max_position_embeddings=max(of.tokens, 512),
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    found: torch.nn.Module = model
    return found.to(torch.bfloat16 if of.precision == "bf16" else torch.float32).to_empty(device="cpu")


def planned(of: Case, model: torch.nn.Module) -> dict[str, Any]:
    """Plan the case; return the plan and the allocator's counters."""
    started = time.perf_counter()
    try:
        plan = fit_plan(workload(of, model.cuda()), target_batch=of.target, check=False)
    except DoesNotFit as error:
        least = (1,) * min(of.target, 2)
        return {"split": least, "keeps": False, "refused": str(error).splitlines()[0], "ooms": count("num_ooms")}
    return {
        "split": plan.split,
        "predicted": plan.predicted_peak_bytes,
        "predicted here": plan.evidence.this_process_peak_bytes,
        "measured": plan.measured_peak_bytes,
        "by hand": plan.memory.plain_loop_peak_bytes,
        "keeps": plan.device.keeps_workspaces,
        "foreseen retries": sum(plan.memory.retries),
        "method": plan.method,
        "ooms": count("num_ooms"),
        "seconds": round(time.perf_counter() - started, 1),
        "passes": sum(note.passes for note in plan.evidence.recordings),
    }


def trained(of: Case, model: torch.nn.Module, split: Sequence[int], keeps: bool, *, by_hand: bool) -> dict[str, Any]:
    """Train windows of a split in a fresh process; return their memory."""
    work = workload(of, model.cuda())
    context = step.open_context(work)
    context.keeps_workspaces = keeps
    if by_hand:
        pieces = [tile(work.sample, size) for size in split]
        for _ in range(WINDOWS):
            _loop(context, pieces)
    else:
        subject = UninitializedTarget(context, work, None, None)  # type: ignore[arg-type]
        for _ in range(WINDOWS):
            step.train_window(context, [subject.tile(size) for size in split], split)
    return {
        "reserved": torch.cuda.max_memory_reserved(),
        "ooms": count("num_ooms"),
        "retries": count("num_alloc_retries"),
    }


def _loop(context: step.TrainingContext, pieces: Sequence[Any]) -> None:
    """Train a window as a loop written by hand does."""
    for piece in pieces:
        batch = tree.to_device(piece, context.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=context.autocast_dtype is not None):
            loss = context.loss(context.model, batch)
        (loss / len(pieces)).backward()
    if context.clip_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(context.model.parameters(), context.clip_grad_norm)
    context.optimizer.step()
    context.optimizer.zero_grad()


def row(of: Case) -> dict[str, Any]:
    """All of a case; on its virtual GPU."""
    torch.set_num_threads(1)
    model = make(of)
    found = {"seed": of.seed, "case": of.label, **forked(functools.partial(planned, of, model))}
    for name, by_hand in (("Runner", False), ("loop", True)):
        try:
            found[name] = forked(functools.partial(trained, of, model, found["split"], found["keeps"], by_hand=by_hand))
        except RuntimeError as error:
            found[name] = {"failed": str(error).strip().splitlines()[-1][:300]}
    return found | {"faults": faults(of, found)}


def faults(of: Case, found: Mapping[str, Any]) -> list[str]:
    """Return a case's faults, in words."""
    runner, loop = found["Runner"], found["loop"]
    if "refused" in found:
        trains = "failed" not in runner and runner["reserved"] <= (1 - CAPACITY_MARGIN) * (
            of.memory_bytes - CONTEXT_BYTES
        )
        return ["out of memory"] * bool(found["ooms"]) + ["refused, and trains"] * trains
    if "failed" in runner:
        return [f"the Runner fails: {runner['failed']}"]
    wrong = []
    if found["ooms"] or runner["ooms"]:
        wrong.append("out of memory")
    if (
        found["method"] != "replayed" and max(found["split"]) > FIRST_STEP_SAMPLES
    ):  # two sizes tell more, where there are two
        wrong.append(found["method"])
    if abs(found["measured"] - found["predicted here"]) > 0.005 * found["measured"]:
        wrong.append("not measured as predicted")
    if abs(runner["reserved"] - found["predicted"]) > 0.005 * runner["reserved"]:
        wrong.append("not trained as predicted")
    if runner["retries"] > found["foreseen retries"]:
        wrong.append("unforeseen retries")
    if "failed" in loop or loop["retries"] or loop["ooms"]:
        return wrong  # the loop fills the device: nothing to compare
    if of.same_numbers and runner["reserved"] > 1.005 * loop["reserved"]:
        wrong.append("hungrier than the loop")
    if found["by hand"] is not None and abs(found["by hand"] - loop["reserved"]) > 0.005 * loop["reserved"]:
        wrong.append("loop not as predicted")
    return wrong


def outside(of: Case) -> dict[str, Any]:
    """Run a case in a process on its virtual GPU, time limited."""
    gpu = virtual.VirtualGpu(memory_bytes=of.memory_bytes, context_bytes=CONTEXT_BYTES, copies="zero")
    environment = os.environ | virtual.environment(gpu) | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.language_models", "--inside", str(of.seed)]
    try:
        out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"seed": of.seed, "case": of.label, "faults": [f"took more than {SECONDS} s"]}
    if out.returncode:
        lines = out.stderr.strip().splitlines()
        return {"seed": of.seed, "case": of.label, "faults": [lines[-1][:300] if lines else "ended without a word"]}
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each case, in MiB."""
    rows = []
    for line in lines:
        runner, loop = line.get("Runner", {}), line.get("loop", {})
        rows.append(
            {
                "seed": line["seed"],
                "model": line["case"],
                "steps": len(line.get("split", ())),
                "micro-batch": max(line.get("split", ()), default=None),
                "predicted": _mib(line.get("predicted")),
                "verified": _mib(line.get("measured")),
                "Runner": _mib(runner.get("reserved")),
                "loop": _mib(loop.get("reserved")) if not loop.get("retries") else None,
                "loop, predicted": _mib(line.get("by hand")),
                "ooms": line.get("ooms"),
                "retries": runner.get("retries"),
                "faults": "; ".join(line["faults"]) or ("refused: one sample is too many" if "refused" in line else ""),
            }
        )
    return rows


def _mib(size: int | None) -> int | None:
    return None if size is None else round(size / MIB)


def write(lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the table as CSV and as Markdown."""
    rows = table(lines)
    path = Path(__file__).parent / "results" / f"{datetime.date.today():%Y-%m-%d}-language-models"
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    cells = [[("" if value is None else str(value)) for value in each.values()] for each in rows]
    text = [
        "# Language models: planned, verified, trained (*real allocator on a virtual GPU*)",
        "",
        "`python -m benchmarks.language_models --write`; MiB reserved. A loop that ran full has no figure.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + " --- |" * len(rows[0]),
        *("| " + " | ".join(each) + " |" for each in cells),
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(text))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES, help="how many models")
    parser.add_argument("--only", default="", help="seeds, like 0,3")
    parser.add_argument("--lines", type=Path, help="keeps a line of JSON for each case; what is there isn't run again")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        print(json.dumps(row(case(args.inside))))
        return
    seeds = [int(seed) for seed in args.only.split(",") if seed] or list(range(args.cases))
    known = {}
    if args.lines and args.lines.exists():
        known = {line["seed"]: line for line in map(json.loads, args.lines.open())}
    for seed in seeds:
        if seed in known:
            continue
        line = known[seed] = outside(case(seed))
        print(f"{seed:3} {line['case']}: {'; '.join(line['faults']) or 'as it should be'}", file=sys.stderr, flush=True)
        if args.lines:
            with args.lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
    lines = [known[seed] for seed in seeds]
    wrong = sum(bool(line["faults"]) for line in lines)
    print(f"{len(lines)} models, {wrong} with a fault")
    if args.write:
        write(lines)


if __name__ == "__main__":
    main()
