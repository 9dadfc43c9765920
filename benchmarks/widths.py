"""Train windows of micro-batches that vary in width: `python -m benchmarks.widths`.

Sequences padded to the longest of their micro-batch, and pictures of five sizes. Each model is planned at its longest
samples on a virtual GPU, and then trained over hundreds of windows by that plan, within 2 % more than the plan says and
within twice as much, each in a process that never used the device before: with the planned segments reserved first and
the widest micro-batch of a window first ("after"), and without ("before"). What counts: the most that was reserved,
beside the plan's figure; out-of-memory errors; how often the allocator gave its cache back to make room (a retry), and
whether that ends. Real allocator on a virtual GPU: kernels compute nothing. Times are the host's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from autoaccum import Plan, Runner, Workload, fit_plan
from autoaccum.devices import virtual

from .truth_search import count, forked

MIB = 1 << 20
CONTEXT_BYTES = 512 * MIB
LONGEST, SHORTEST, SIDES = 512, 32, (96, 112, 128, 144, 160)
ROOMS = (1.02, 2.0)  # of the plan's peak
LARGE = "GPT-2's size, bf16"
GPU_BYTES = {  # of the virtual GPU, by model
    "GPT": 2048 * MIB,
    "GPT, bf16": 2048 * MIB,
    LARGE: 24 * 1024 * MIB,
    "ResNet-18": 2048 * MIB,
    "Llama, ExactTrainer": 2048 * MIB,
}
WIDTHS = ("shuffled", "in buckets")


@dataclass(frozen=True)
class Training:
    """A model and its windows.

    Attributes:
        workload: What is planned, at the longest samples.
        target: Samples in an optimizer step.
        windows: `windows(runner, number, widths)`, which trains so many.
    """

    workload: Workload
    target: int
    windows: Callable[[Runner, int, str], Iterator[Any]]


class Block(nn.Module):
    """A block of a GPT."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, then mix."""
        rows, length, hidden = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, hidden)
        x = x + self.out(attended)
        return x + self.mlp(self.norms[1](x))


class Gpt(nn.Module):
    """A GPT."""

    def __init__(self, longest: int, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, hidden), nn.Embedding(longest, hidden)
        self.blocks = nn.Sequential(*(Block(hidden, hidden // 64) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        found: torch.Tensor = self.head(self.blocks(self.tokens(ids) + self.places.weight[: ids.shape[1]]))
        return found


def language_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Cross-entropy in fp32."""
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1).float(), batch["ids"].flatten())


def collate(rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pad to the longest."""
    return {"ids": pad_sequence(list(rows), batch_first=True)}


def lengths(target: int, number: int, widths: str, most: int = LONGEST) -> list[int]:
    """Draw lengths: any, or alike within a window."""
    chance = random.Random(f"{widths} lengths")
    if widths == "shuffled":
        return [chance.randint(SHORTEST, most) for _ in range(target * number)]
    longest = [chance.randint(SHORTEST, most) for _ in range(number)]
    return [chance.randint(4 * each // 5, each) for each in longest for _ in range(target)]


def language_model(precision: str | None, longest: int, *sizes: int) -> Training:
    """Make a GPT on sequences, of no particular weights."""
    target = 64
    with torch.device("meta"):
        model = Gpt(longest, *sizes)
    ids = torch.ones(4, longest, dtype=torch.long)
    work = Workload(
        model.to_empty(device="cuda"), {"ids": ids}, loss=language_loss, optimizer=torch.optim.AdamW,
        precision=precision,
    )  # fmt: skip

    def windows(runner: Runner, number: int, widths: str) -> Iterator[Any]:
        drawn = lengths(target, number, widths, longest)
        data: Any = [torch.ones(length, dtype=torch.long) for length in drawn]
        yield from runner.epoch(torch.utils.data.DataLoader(data, batch_size=target, collate_fn=collate))

    return Training(work, target, windows)


def picture_model() -> Training:
    """Make a ResNet on pictures of five sizes."""
    import torchvision

    model = torchvision.models.resnet18(num_classes=100, norm_layer=lambda channels: nn.GroupNorm(8, channels))
    target, side = 128, SIDES[-1]
    sample = torch.zeros(4, 3, side, side), torch.zeros(4, dtype=torch.long)

    def windows(runner: Runner, number: int, widths: str) -> Iterator[Any]:
        chance = random.Random(f"sides {widths}")
        rows = target if widths == "in buckets" else target // 4
        sides = chance.choices(SIDES, k=number * target // rows)
        yield from runner.epoch(
            [(torch.zeros(rows, 3, side, side), torch.zeros(rows, dtype=torch.long)) for side in sides]
        )

    work = Workload(model, sample, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.AdamW)
    return Training(work, target, windows)


def make(name: str) -> Training:
    """Make a model by its name."""
    if name == "ResNet-18":
        return picture_model()
    if name == LARGE:
        return language_model("bf16", 1024, 32000, 768, 12)
    return language_model("bf16" if "bf16" in name else None, LONGEST, 8000, 256, 4)


def planned(name: str) -> str:
    """Plan a model; return the plan's JSON."""
    if "Llama" in name:
        return trainer_run("", 1, "shuffled", after=True)["plan"]
    training = make(name)
    training.workload.model.cuda()
    return fit_plan(training.workload, target_batch=training.target, check=False).to_json()


def limit(plan: Plan, room: float) -> None:
    """Let torch reserve so much more than the plan says."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (room * plan.predicted_peak_bytes + 0.5) / total))


class Watch:
    """Note what each window reserved, and its retries and errors."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before = count("num_alloc_retries"), count("num_ooms")
        self.reserved: list[int] = []
        self.retried: list[int] = []
        self.failed: list[int] = []
        self._started = time.process_time()

    def window(self) -> None:
        """Note one."""
        now = count("num_alloc_retries"), count("num_ooms")
        self.reserved.append(torch.cuda.max_memory_reserved())
        self.retried.append(now[0] - self._before[0])
        self.failed.append(now[1] - self._before[1])
        self._before = now
        torch.cuda.reset_peak_memory_stats()

    def result(self, micro_batch: int) -> dict[str, Any]:
        """Return it all."""
        half = len(self.retried) // 2
        return {
            "reserved": max(self.reserved), "retries": sum(map(bool, self.retried)), "ooms": sum(self.failed),
            "late": sum(map(bool, self.retried[half:])), "micro_batch": micro_batch,
            "ms": 1000 * (time.process_time() - self._started) / len(self.reserved), "windows": len(self.reserved),
        }  # fmt: skip


def trained(name: str, plan: str, number: int, widths: str, room: float, *, after: bool) -> dict[str, Any]:
    """Train windows by a plan; return what they reserved."""
    if "Llama" in name:
        return trainer_run(plan, number, widths, after=after, room=room)
    training, known = make(name), Plan.from_json(plan)
    training.workload.model.cuda()
    runner = Runner(training.workload, known)
    if not after:
        runner.context.widths = None
    limit(known, room)
    watch = Watch()
    for _ in training.windows(runner, number, widths):
        watch.window()
    return watch.result(runner.micro_batch)


def trainer_run(plan: str, number: int, widths: str, *, after: bool, room: float | None = None) -> dict[str, Any]:
    """Train by transformers' Trainer; return what windows reserved, and the plan."""
    import transformers

    from autoaccum.integrations.transformers import ExactTrainer

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=2000, **sizes))
    drawn = [*lengths(64, max(number, 4), widths), LONGEST]  # planned at the longest, which isn't trained
    data: Any = [{"ids": torch.ones(length, dtype=torch.long)} for length in drawn]
    found: dict[str, Any] = {}

    class Noting(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if not after:
                trainer._windows.context.widths = None
            if room is not None:
                limit(trainer.plan, room)
            found["watch"] = Watch()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["watch"].window()

    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, max_steps=number, remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_strategy="no", train_sampling_strategy="sequential", bf16=True,
        )  # fmt: skip
        trainer = ExactTrainer(
            model=model, args=args, train_dataset=data, data_collator=padded, target_batch=64, callbacks=[Noting()],
            plan=Plan.from_json(plan) if plan else None, check=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    return found["watch"].result(trainer._windows.sizing.limits.micro_batch) | {"plan": trainer.plan.to_json()}


def padded(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad to the longest, with a mask and labels."""
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def compared(name: str, plan: str, widths: str, room: float, number: int) -> Iterator[dict[str, Any]]:
    """Train before and after, each in a process of its own."""
    known = Plan.from_json(plan)
    for after in (False, True):
        found = forked(functools.partial(trained, name, plan, number, widths, room, after=after))
        found.pop("plan", None)
        yield found | {"planned": known.predicted_peak_bytes, "split": known.split}


def rows(name: str, widths: str, room: str, number: str) -> None:
    """Plan a model, and print both trainings as JSON."""
    torch.set_num_threads(1)
    for found in compared(name, forked(functools.partial(planned, name)), widths, float(room), int(number)):
        print(json.dumps(found), flush=True)


def inside(name: str, number: int) -> None:
    """Plan and train a model; print the table's rows."""
    torch.set_num_threads(1)
    plan = forked(functools.partial(planned, name))
    split, peak = Plan.from_json(plan).split, Plan.from_json(plan).predicted_peak_bytes
    for widths in WIDTHS:
        for room in ROOMS:
            cells = [name, f"{max(split)} x {len(split)}", widths, f"{room:g}", _mib(peak)]
            for found in compared(name, plan, widths, room, number):
                cells += [
                    _mib(found["reserved"]), f"{found['retries']} ({found['late']})", str(found["ooms"]),
                    str(found["micro_batch"]), f"{found['ms']:.0f}",
                ]  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)


def on_gpu(name: str) -> dict[str, str]:
    """Return the environment of a process on the model's virtual GPU."""
    gpu = virtual.VirtualGpu(memory_bytes=GPU_BYTES[name], context_bytes=CONTEXT_BYTES)
    return {**os.environ, **virtual.environment(gpu), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def _mib(size: int) -> str:
    return str(round(size / MIB))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--only", choices=list(GPU_BYTES))
    parser.add_argument("--inside")
    asked = parser.parse_args()
    if asked.inside:
        inside(asked.inside, asked.windows)
        return
    print("Before and after: MiB reserved at most, windows with retries (those in the second half), out-of-memory")
    print("errors, the largest micro-batch at the end, the host's milliseconds for a window.\n")
    figures = " | ".join(("reserved", "retries", "errors", "micro-batch", "ms"))
    print(
        f"| model | micro-batches | widths | room | plan | {figures} | after: {figures} |\n|{'---|' * 15}", flush=True
    )
    for name in (asked.only,) if asked.only else GPU_BYTES:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.widths", "--inside", name]
        subprocess.run([*command, "--windows", str(asked.windows)], env=on_gpu(name), check=True)


if __name__ == "__main__":
    main()
