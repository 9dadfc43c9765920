"""The cases of `truth.py`: what is trained, with how much memory."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoaccum import Workload
from autoaccum.devices.virtual import VirtualGpu, control

from . import generated, truth_models

GiB = 2**30
DEVICE_BYTES = 256 * GiB  # of the virtual GPU; the capacity is what another process leaves of it
CONTEXT_BYTES = 512 << 20  # of a card's memory; the allocator may have the rest


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

    @property
    def gpu(self) -> VirtualGpu:
        """The virtual GPU, without convolution fallback and without copies."""
        return VirtualGpu(
            memory_bytes=DEVICE_BYTES, convolution_workspace=self.workspace, convolution_fallback=False, copies="zero"
        )


def cases(generated_count: int) -> list[Case]:
    """Return all combinations, and this many generated models.

    Every other generated one has workspaces that step.
    """
    return [*combinations(), *(generated_case(seed) for seed in range(generated_count))]


def combinations() -> list[Case]:
    """Those of `truth_models`."""
    return [
        Case(
            name, truth_models.MODELS[name], optimizer, precision, int(size * GiB) - CONTEXT_BYTES, load, workspace,
            clip=index % 3 == 0,
        )
        for index, (name, optimizer, precision, size, load, workspace) in enumerate(truth_models.COMBINATIONS)
    ]  # fmt: skip


def generated_case(seed: int) -> Case:
    """Generate a model, and choose all else at random too."""
    chance = random.Random(f"case {seed}")
    stepping = seed % 2 == 1
    return Case(
        f"generated {seed}" + (" (stepping)" if stepping else ""),
        functools.partial(generated.model, seed, stepping=stepping),
        chance.choice(list(truth_models.OPTIMIZERS)),
        chance.choice(["fp32", "bf16", "fp16"]),
        chance.choice([4, 6, 8, 12, 16]) * GiB - CONTEXT_BYTES,
        round(chance.uniform(1.2, 6), 1),
        chance.choice([None, "8MiB", "0.25x", "1x"]) if stepping else None,
        clip=chance.random() < 0.3,
    )


def workload(case: Case, model: nn.Module, batch: Any) -> Workload:
    """Make the case's workload."""
    return Workload(
        model,
        batch,
        optimizer=truth_models.OPTIMIZERS[case.optimizer],
        precision=case.precision,
        scaler=torch.amp.GradScaler("cuda") if case.precision == "fp16" else None,
        clip_grad_norm=1.0 if case.clip else None,
    )


def limit(capacity_bytes: int | None) -> None:
    """Leave this much of the device free; create the context first."""
    free, _ = torch.cuda.mem_get_info()
    control.set_other(0, 0 if capacity_bytes is None else free - capacity_bytes)
