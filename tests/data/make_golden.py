"""Records four small models and keeps the recordings for tests/golden.py: two on the CPU, two on the virtual GPU.

    python -m tests.data.make_golden

Made once: a later torch may allocate otherwise, and then every golden plan is another one. Each model has its first
optimizer step and windows of two micro-batches at three primes, by the package's own recorders.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autoaccum.devices import virtual
from autoaccum.devices.base import Device
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.devices.cuda.device import CudaDevice
from autoaccum.devices.cuda.model_blocks import model_blocks, reserved_bytes_of
from autoaccum.devices.registry import get_device
from autoaccum.planning.evidence import Evidence
from autoaccum.planning.record import add_recording, record_first_step
from autoaccum.planning.target import RecordingTarget
from autoaccum.window import step
from autoaccum.workload import Workload
from tests.golden import FOLDER, flat, flat_recording

MiB = 1 << 20


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(500, 128), nn.Sequential(Attention(128), Attention(128))
        self.head = nn.Linear(128, 500)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


def mlp() -> Workload:
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return Workload(model, (torch.rand(4, 64), torch.zeros(4, dtype=torch.long)))


def transformer() -> Workload:
    sample = torch.zeros(4, 64, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    return Workload(Transformer(), sample, optimizer=sgd)


def llama() -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_key_value_heads=4, use_cache=False, **sizes))
    tokens = torch.zeros(4, 128, dtype=torch.long)
    return Workload(model, {"input_ids": tokens, "labels": tokens})


def cnn() -> Workload:
    def layer(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*layer(3, 32), nn.MaxPool2d(2), *layer(32, 64), nn.MaxPool2d(2), *layer(64, 128)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100))
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    return Workload(model, (torch.rand(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)), optimizer=sgd)


MADE = {"mlp": (mlp, (53, 211, 431)), "transformer": (transformer, (5, 13, 29))}
MADE |= {"llama": (llama, (5, 11, 23)), "cnn": (cnn, (11, 37, 83))}


def record(name: str, device: Device) -> dict[str, Any]:
    make, sizes = MADE[name]
    torch.manual_seed(0)
    work = make()
    work.model.to(device.torch_device)
    threshold = device.prepare("fixed")
    subject = RecordingTarget(step.open_context(work), work, device, threshold, heap_before=device.read_heap())
    evidence = Evidence()
    record_first_step(subject, evidence)
    for n in sizes:
        add_recording(subject, evidence, n)
    assert evidence.first_step is not None and evidence.fallback_reason is None
    subject.context.model.zero_grad(set_to_none=True)
    found: dict[str, Any] = {
        "device": device.kind,
        "parameter_bytes": sum(tensor.nbytes for tensor in (*work.model.parameters(), *work.model.buffers())),
        "sample_bytes": subject.sample_bytes,
        "unrecorded_bytes": evidence.unrecorded_bytes,
        "mmap_threshold_bytes": threshold,
        "first_step": flat_recording(evidence.first_step),
        "recordings": [flat_recording(recording) for recording in evidence.recordings],
        "notes": [[n.micro_batch, n.passes, n.measured_bytes, n.predicted_bytes] for n in evidence.notes],
    }
    if isinstance(device, CpuDevice):
        assert subject.heap_before is not None
        base = device.read_baseline(subject.heap_before, evidence.heap_after_first_step)
        found |= {"base_bytes": base.bytes, "own_bytes": base.planning_bytes}
        return found | {"holes": [base.new_process.heap_free_bytes, base.this_process.heap_free_bytes]}
    assert isinstance(device, CudaDevice)
    build = model_blocks(work.model)
    device.clean()
    start = device.read_allocator()
    segments = [[s.address, s.stream, s.small, s.expandable, s.private, s.blocks] for s in start.segments]
    return found | {
        "base_bytes": reserved_bytes_of(build, device.read_rules()),
        "build": flat(build),
        "start": segments,
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    if not names:
        for name in ("mlp", "transformer"):
            subprocess.run([sys.executable, "-m", "tests.data.make_golden", name], check=True)
        for name in ("llama", "cnn"):
            command = [sys.executable, "-m", "tests.data.make_golden", name]
            assert virtual.launch(command, virtual.VirtualGpu(memory_bytes=16 << 30)).wait() == 0
    for name in names:
        text = json.dumps(
            record(name, get_device(torch.device("cpu" if name in ("mlp", "transformer") else "cuda"))),
            separators=(",", ":"),
        )
        out = FOLDER / f"{name}.json.gz"
        out.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{out.name}: {len(text):,} characters, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
