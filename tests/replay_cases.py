"""Trains models on a virtual GPU and prints what the allocator's own statistics and a replay of the log say.

A program, not a test. Each model is recorded with room; then that log is replayed at capacities between what is alive
and what is reserved, where the real run has to give blocks back or runs out of memory.

    autoaccum virtual-gpu --memory 16GiB -- python tests/replay_cases.py [CASES [SETTINGS [PARTS]]]

Each chooses by number, like 0,3,5; left out, all. A line of JSON for each run.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from allocator_text import VERSION, has_large_segments, set_settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoaccum import Workload
from autoaccum.data import split
from autoaccum.devices import oom
from autoaccum.devices.cuda.allocator_rules import find_rules
from autoaccum.devices.cuda.recorder import record
from autoaccum.devices.virtual import control
from autoaccum.phases import OnPhase
from autoaccum.simulation.cuda_allocator.allocator import CachingAllocator
from autoaccum.simulation.cuda_allocator.settings import CudaRules as Rules
from autoaccum.simulation.cuda_allocator.settings import MiB
from autoaccum.simulation.recording import Recording
from autoaccum.window import step
from autoaccum.window.loss_form import LossForm, LossKind

sys.path.insert(0, __file__.rsplit("/tests/", 1)[0])
from benchmarks.models import Block, Recurrent, ViT

# -- models


class UNet(nn.Module):
    """Down, up, and a skip between."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.head = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.down(x)
        return self.head(torch.cat([wide, self.up(self.deep(wide))], 1)).mean((2, 3)).expand(-1, 4)


class Checkpointed(nn.Module):
    """A stack of blocks that are run again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(1000, 128), nn.Linear(128, 1000)
        self.blocks = nn.ModuleList(Block(128, 4) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class TwoStreams(nn.Module):
    """A side stream works on what the main one made, and the other way round, held by record_stream."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Linear(1024, 2048), nn.Linear(1024, 2048)
        self.head = nn.Linear(2048, 10)
        self.side = torch.cuda.Stream()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = 2 * x
        with torch.cuda.stream(self.side):
            far = self.far(doubled)
        doubled.record_stream(self.side)
        del doubled
        near = self.near(x)
        far.record_stream(torch.cuda.current_stream())
        return self.head(near * far)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 10))


def resnet(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)(num_classes=10)


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512
    )
    return transformers.BertForMaskedLM(config)


def gpt() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(vocab_size=1000, n_positions=128, n_embd=128, n_layer=3, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def images(n: int) -> Any:
    return torch.zeros(n, 3, 64, 64), torch.zeros(n, dtype=torch.long)


def tokens(n: int) -> Any:
    ids = torch.zeros(n, 128, dtype=torch.long)
    return ids, ids


def labelled(n: int) -> Any:
    ids = torch.zeros(n, 128, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def wide(n: int) -> Any:
    return torch.zeros(n, 1024), torch.zeros(n, dtype=torch.long)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], int]] = {
    "mlp": (mlp, wide, 4096),
    "resnet18": (lambda: resnet("resnet18"), images, 48),
    "resnet50": (lambda: resnet("resnet50"), images, 24),
    "vit": (ViT, images, 96),
    "lstm": (lambda: Recurrent(nn.LSTM, False), tokens, 24),
    "unet": (UNet, images, 48),
    "bert": (bert, labelled, 32),
    "gpt": (gpt, labelled, 32),
    "checkpointed": (Checkpointed, tokens, 64),
    "two streams": (TwoStreams, wide, 2048),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, foreach=False),
}
CASES = [
    ("mlp", "sgd", "fp32"), ("mlp", "adamw fused", "bf16"), ("mlp", "adamw loop", "fp16"),
    ("resnet18", "sgd", "fp32"), ("resnet18", "adamw foreach", "bf16"), ("resnet18", "adamw fused", "fp16"),
    ("resnet50", "adamw foreach", "fp32"), ("resnet50", "sgd", "bf16"),
    ("vit", "adamw foreach", "fp32"), ("vit", "adamw fused", "bf16"), ("vit", "sgd", "fp16"),
    ("lstm", "adamw foreach", "fp32"), ("lstm", "sgd", "bf16"),
    ("unet", "sgd", "fp32"), ("unet", "adamw foreach", "bf16"), ("unet", "adamw fused", "fp16"),
    ("bert", "adamw foreach", "fp32"), ("bert", "adamw fused", "bf16"), ("bert", "adamw loop", "fp16"),
    ("gpt", "adamw foreach", "fp32"), ("gpt", "adamw loop", "bf16"), ("gpt", "adamw fused", "fp16"),
    ("checkpointed", "adamw foreach", "fp32"), ("checkpointed", "sgd", "bf16"),
    ("checkpointed", "adamw fused", "fp16"), ("two streams", "adamw foreach", "fp32"),
]  # fmt: skip

# -- settings and surroundings


@dataclass(frozen=True)
class Setting:
    """How the allocator is set, what it holds before, and who sets the limit: the driver or the process' fraction."""

    text: str = ""
    start: bool = False
    fraction: bool = False


SETTINGS = [
    Setting(),
    Setting(start=True),
    Setting(fraction=True),
    Setting("max_split_size_mb:32"),
    Setting("max_split_size_mb:64,max_non_split_rounding_mb:32,roundup_power2_divisions:8", start=True),
    Setting("roundup_power2_divisions:[1:8,2:2,32:4,>:1]"),
    Setting("garbage_collection_threshold:0.7", fraction=True),
    Setting("expandable_segments:True"),
    Setting("expandable_segments:True", start=True),
    Setting("expandable_segments:True,roundup_power2_divisions:4", fraction=True),
    Setting("large_segment_size_mb:32"),
]
PARTS = (0.95, 0.8, 0.5)  # where between what is alive and what is reserved the tight capacities lie


def surroundings() -> list[torch.Tensor]:
    """Another model's parameters, and a cache in pieces: every third of some tensors is kept, on two streams."""
    held = [p.detach().cuda() for p in mlp().parameters()]
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            sizes = [300, 70_000, 700_000, 3 * MiB, 15 * MiB, 9 * MiB, 40 * MiB, 1_300_000, 1000] * 3
            made = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
            held += made[::3]
    del made
    return held


def train(case: tuple[str, str, str], on_phase: OnPhase) -> None:
    """Builds, and trains three windows of two micro-batches, the second one smaller by one."""
    model, optimizer, precision = case
    make, batch, n = MODELS[model]
    with on_phase("build"):
        built = make().cuda()
        context = step.open_context(
            Workload(
                built, batch(2), optimizer=OPTIMIZERS[optimizer], precision=precision,
                scaler=torch.amp.GradScaler("cuda") if precision == "fp16" else None, clip_grad_norm=1.0,
            )
        )  # fmt: skip
        if context.count is None:
            context.loss_form = LossForm(LossKind.SAMPLES)
        context.has_begun = True  # or the cache would be given back, in no event
    for _ in range(3):
        step.train_window(context, split.split(batch(2 * n - 1), (n, n - 1)), (n, n - 1), on_phase=on_phase)


def emptied() -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0, "something is left of the case before"


def one(case: tuple[str, str, str], setting: Setting, capacity: int | None = None, log: Recording | None = None) -> Any:
    """What the allocator counted, and what a replay comes to: of its own log, or of one that was recorded with room."""
    torch.backends.cudnn.enabled = case[0] != "lstm"
    failed = []

    def run(on_phase: OnPhase) -> None:
        try:
            train(case, on_phase)
        except RuntimeError as error:
            if not oom.is_out_of_memory(error):
                raise
            failed.append(oom.drop_frames(error))

    emptied()
    free, total = torch.cuda.mem_get_info()
    set_settings(setting.text or "expandable_segments:False")
    held = surroundings() if setting.start else []
    rules = Rules.from_settings(setting.text, device_bytes=total, capacity_bytes=free, version=VERSION)
    rules = replace(rules, tie_rule=find_rules(0).tie_rule, addresses_down=find_rules(0).addresses_down)
    if capacity is not None and setting.fraction:
        torch.cuda.set_per_process_memory_fraction(capacity / total)
        rules = replace(rules, allowed_bytes=int(capacity / total * total))
    elif capacity is not None:
        control.set_other(0, free - capacity)
        rules = replace(rules, capacity_bytes=capacity)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    recording = record(run, micro_batch=MODELS[case[0]][2])
    stats = torch.cuda.memory_stats()
    control.set_other(0, 0)
    torch.cuda.set_per_process_memory_fraction(1.0)
    set_settings("expandable_segments:False")
    del held
    log = log or recording
    assert (recording.start is not None and recording.start.reserved_bytes > 0) == setting.start
    allocator = CachingAllocator(rules, recording.start)
    results = []
    for phase in log.phases:
        results.append(allocator.run(phase))
        if allocator.out_of_memory:
            break
    retries = stats["num_alloc_retries"] - before["num_alloc_retries"]
    return recording, {
        "case": case,
        "setting": [setting.text, setting.start, setting.fraction],
        "capacity": capacity,
        "events": sum(len(phase.events) for phase in recording.phases),
        "held": sum(event.bytes == 0 for phase in recording.phases for event in phase.events),
        "streams": len({event.stream for phase in recording.phases for event in phase.events}),
        "given back": stats["segment.all.freed"] - before["segment.all.freed"],
        "ran out": [allocator.out_of_memory, bool(failed)],
        "allocated": [max(r.peak_allocated_bytes for r in results), stats["allocated_bytes.all.peak"]],
        "reserved": [max(r.peak_reserved_bytes for r in results), stats["reserved_bytes.all.peak"]],
        "reserved in the end": [allocator.reserved_bytes, stats["reserved_bytes.all.current"]],
        "retries": [allocator.retries, retries],
    }


def chosen(argument: int, things: Sequence[Any]) -> list[Any]:
    if len(sys.argv) <= argument:
        return list(things)
    return [things[int(number)] for number in sys.argv[argument].split(",")]


def main() -> None:
    """Every case in every setting, a line of JSON each."""
    import torch._dynamo  # noqa: F401  as the first optimizer does

    find_rules(0)  # before the first case: its test leaves nothing behind
    gc.collect()
    gc.freeze()  # or each case's collection would go through all that torch has
    for setting in chosen(2, SETTINGS):
        if "large_segment" in setting.text and not has_large_segments():
            continue
        for case in chosen(1, CASES):
            log, roomy = one(case, setting)
            print(json.dumps(roomy), flush=True)
            allocated, reserved = roomy["allocated"][1], roomy["reserved"][1]
            for part in chosen(3, PARTS):
                capacity = (allocated + int(part * (reserved - allocated))) // (2 * MiB) * 2 * MiB
                print(json.dumps(one(case, setting, capacity, log)[1]), flush=True)


if __name__ == "__main__":
    main()
