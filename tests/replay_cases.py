"""Trains models on a virtual GPU and prints what the allocator's own statistics and a replay of the log say.

A program, not a test: `python -m autoaccum.virtual --memory 16GiB -- python tests/replay_cases.py`.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoaccum import Workload, oom, split, step
from autoaccum.caching_allocator import CudaRules, replay_cuda
from autoaccum.record_cuda import record
from autoaccum.recording import Recording
from autoaccum.virtual import control

sys.path.insert(0, __file__.rsplit("/tests/", 1)[0])
from benchmarks.models import Block, Recurrent, ViT

torch.backends.cudnn.enabled = True


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


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 10))


def convnet() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 64, 10))


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512
    )
    return transformers.BertForMaskedLM(config)


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
    "convnet": (convnet, images, 64),
    "vit": (ViT, images, 96),
    "lstm": (lambda: Recurrent(nn.LSTM, False), tokens, 24),
    "unet": (UNet, images, 48),
    "bert": (bert, labelled, 32),
    "checkpointed": (Checkpointed, tokens, 64),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, foreach=False),
}
CASES = [
    ("mlp", "sgd", "fp32"), ("mlp", "adamw foreach", "fp32"), ("mlp", "adamw fused", "bf16"),
    ("mlp", "adamw loop", "fp16"), ("convnet", "sgd", "fp32"), ("convnet", "adamw foreach", "bf16"),
    ("convnet", "adamw fused", "fp16"), ("vit", "adamw foreach", "fp32"), ("vit", "adamw fused", "bf16"),
    ("vit", "sgd", "fp16"), ("lstm", "adamw foreach", "fp32"), ("lstm", "sgd", "bf16"), ("unet", "sgd", "fp32"),
    ("unet", "adamw foreach", "bf16"), ("unet", "adamw fused", "fp16"), ("bert", "adamw foreach", "fp32"),
    ("bert", "adamw fused", "bf16"), ("bert", "adamw loop", "fp16"), ("checkpointed", "adamw foreach", "fp32"),
    ("checkpointed", "sgd", "bf16"), ("checkpointed", "adamw fused", "fp16"),
]  # fmt: skip


def train(model: str, optimizer: str, precision: str, on_phase: step.OnPhase) -> None:
    """Builds, and trains three windows of two micro-batches, the second one smaller by one."""
    make, batch, n = MODELS[model]
    with on_phase("build"):
        built = make().cuda()
        parts = step.open_parts(
            Workload(
                built, batch(2), optimizer=OPTIMIZERS[optimizer], precision=precision,
                scaler=torch.amp.GradScaler("cuda") if precision == "fp16" else None, clip_grad_norm=1.0,
            )
        )  # fmt: skip
        parts.loss_is_mean = True
    for _ in range(3):
        step.train_window(parts, split.split(batch(2 * n - 1), (n, n - 1)), (n, n - 1), on_phase=on_phase)


def one(
    model: str, optimizer: str, precision: str, rules: CudaRules, other: int = 0, log: Recording | None = None
) -> Any:
    """What the allocator counted, and what a replay comes to: of its own log, or of one that was recorded with room."""
    torch.backends.cudnn.enabled = model != "lstm"
    failed = []

    def run(on_phase: step.OnPhase) -> None:
        try:
            train(model, optimizer, precision, on_phase)
        except RuntimeError as error:
            if not oom.is_out_of_memory(error):
                raise
            failed.append(oom.drop_frames(error))

    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0, "something is left of the case before"
    control.set_other(0, other)
    assert torch.cuda.mem_get_info()[0] == rules.capacity_bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["num_alloc_retries"]
    recording: Recording = record(run, micro_batch=MODELS[model][2])
    stats = torch.cuda.memory_stats()
    control.set_other(0, 0)
    found = replay_cuda((log or recording).phases, rules)
    return recording, {
        "case": [model, optimizer, precision],
        "events": sum(len(p.events) for p in recording.phases),
        "ran out": [found.out_of_memory is not None, bool(failed)],
        "allocated": [found.peak_allocated_bytes, stats["allocated_bytes.all.peak"]],
        "reserved": [found.peak_reserved_bytes, stats["reserved_bytes.all.peak"]],
        "retries": [sum(found.retries), stats["num_alloc_retries"] - before],
    }


def main() -> None:
    """Every case, a line of JSON each."""
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    free, total = torch.cuda.mem_get_info()
    rules = CudaRules.from_settings(settings["PYTORCH_CUDA_ALLOC_CONF"], capacity_bytes=free, device_bytes=total)
    for case in CASES:
        log, roomy = one(*case, rules)
        print(json.dumps(roomy), flush=True)
        for part in (0.75, 0.5, 0.25):  # between what is alive and what is reserved: it has to give blocks back
            allocated, reserved = roomy["allocated"][1], roomy["reserved"][1]
            capacity = allocated + int(part * (reserved - allocated)) // 2**21 * 2**21
            tight = replace(rules, capacity_bytes=capacity)
            print(json.dumps(one(*case, tight, other=free - capacity, log=log)[1]), flush=True)


if __name__ == "__main__":
    assert F is not None
    main()
