"""Records small random torch models and keeps the recordings for tests/test_solve.py and tests/test_program.py.

    python tests/data/make_programs.py [OUT.json.xz]

Each model: the first optimizer step, and windows of two micro-batches at two primes, by the package's own recorder.
An event is one number: an allocation its bytes, a free minus the number of the allocation (counted from 1 within the
recording), a free of a block that was there before `[bytes]`.
"""

from __future__ import annotations

import json
import lzma
import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autoaccum.devices.registry import get_device
from autoaccum.planning.evidence import Evidence
from autoaccum.planning.record import record_first_step, record_window
from autoaccum.planning.target import RecordingTarget
from autoaccum.simulation.recording import Event, Recording
from autoaccum.window import step
from autoaccum.workload import Workload

MODELS, PRIMES = 200, (5, 7, 11, 13)
LENGTH, WIDTH, CLASSES = 24, 48, 10
OUT = Path(__file__).with_name("recorded_programs.json.xz")


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRU(width, width, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.cell(x)[0]
        return out


class Keeping(nn.Module):
    """Keeps its last activation, so that a block outlives each micro-batch."""

    last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x.detach() * 2
        return x


class Convolution(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x.transpose(1, 2)))).transpose(1, 2)


class Classifier(nn.Module):
    def __init__(self, kinds: Iterable[str], width: int) -> None:
        super().__init__()
        made: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
            "norm": lambda: nn.LayerNorm(width),
            "conv": lambda: Convolution(width),
            "attention": lambda: Attention(width),
            "gru": lambda: Recurrent(width),
            "keep": Keeping,
        }
        self.body = nn.Sequential(*(made[kind]() for kind in kinds))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x).mean(1))
        return out


def numbers(events: Iterable[Event]) -> list[Any]:
    named: dict[int, int] = {}
    found: list[Any] = []
    for event in events:
        if event.bytes > 0:
            named[event.block] = len(named) + 1
            found.append(event.bytes)
        else:
            found.append(-named[event.block] if event.block in named else [-event.bytes])
    return found


def phases(recording: Recording) -> list[list[Any]]:
    """Each phase's name and events, blocks numbered through the whole recording."""
    together = iter(numbers(event for phase in recording.phases for event in phase.events))
    return [[phase.name, [next(together) for _ in phase.events]] for phase in recording.phases]


def record(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kinds = [rng.choice(["linear", "norm", "conv", "attention", "gru"]) for _ in range(rng.randint(2, 5))]
    if seed % 4 == 3:
        kinds.insert(rng.randint(0, len(kinds)), "keep")
    width = rng.choice([32, WIDTH, 64])
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=rng.choice([0.0, 0.9]))
    optimizer = rng.choice([sgd, torch.optim.AdamW])
    sample = (torch.randn(4, LENGTH, width), torch.randint(CLASSES, (4,)))
    work = Workload(Classifier(kinds, width), sample, optimizer=optimizer)
    context = step.open_context(work)
    subject = RecordingTarget(context, work, get_device(context.device), None)
    evidence = Evidence()
    record_first_step(subject, evidence)
    recordings = [record_window(subject, n) for n in sorted(rng.sample(PRIMES, 2))]
    return {
        "name": f"{' '.join(kinds)}, width {width}, {type(context.optimizer).__name__}",
        "prelude": numbers(evidence.first_step_events),
        "recordings": [{"micro_batch": r.micro_batch, "phases": phases(r)} for r in recordings],
    }


def main(out: Path = OUT) -> None:
    torch.set_num_threads(1)
    found = [record(seed) for seed in range(MODELS)]
    text = json.dumps(found, separators=(",", ":"))
    out.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    for program in found:
        events = [sum(len(events) for _, events in r["phases"]) for r in program["recordings"]]
        print(f"{program['name']}: recorded at {[r['micro_batch'] for r in program['recordings']]}, {events} events")
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
