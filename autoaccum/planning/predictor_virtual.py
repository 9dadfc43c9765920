"""Predict for a virtual GPU that stands in for a real one.

The device has any amount of memory, so recording never runs out, and "does not fit" is an answer. A run takes
milliseconds there, so the plan's window and one of a step fewer are run within the capacity of the real GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..data import tree
from ..devices import oom
from ..devices.cuda.allocator_rules import find_rules
from ..devices.cuda.device import CudaMeasurement
from ..devices.cuda.model_blocks import model_blocks, reserved_bytes_of
from ..devices.virtual.device import VirtualGpuDevice
from ..ranks.sharded import can_drop_unfinished
from ..simulation.cuda_allocator.allocator import EMPTY
from ..simulation.solver import Solution, Split, balanced, uniform_sizes
from ..workload import Batch
from . import cuda_words
from .cuda_budget import read_budget
from .evidence import Evidence
from .predictor import VERIFIED_STEPS
from .predictor_cuda import CudaPredictor
from .resolved_request import ResolvedRequest
from .target import RecordingTarget


@dataclass(frozen=True)
class UninitializedTarget(RecordingTarget):
    """A target whose batches are never written: no kernel reads them."""

    def tile(self, n: int) -> Batch:
        """Return an uninitialized batch of n samples."""
        one, two = super().tile(1), super().tile(2)
        shapes = {path: leaf.shape for path, leaf in tree.leaves(one) if isinstance(leaf, torch.Tensor)}

        def empty(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or path not in shapes or leaf.shape == shapes[path]:
                return leaf
            shape = [a + (b - a) * (n - 1) for a, b in zip(shapes[path], leaf.shape, strict=True)]
            return torch.empty(shape, dtype=leaf.dtype, device="cpu")

        return tree.map_leaves(two, empty)


@dataclass
class VirtualGpuPredictor(CudaPredictor):
    """Predict as for CUDA; record any size, and try fewer steps."""

    @property
    def device(self) -> VirtualGpuDevice:
        """The device, whose capacity can be limited."""
        device = self.subject.device
        assert isinstance(device, VirtualGpuDevice)
        return device

    def is_sure_to_fit(self, n: int) -> bool:
        """Return True: any size can be recorded."""
        return True

    def measure(self, train: Callable[..., None], split: Split) -> CudaMeasurement:
        """Run three windows within the budget."""
        with self.limited():
            return super().measure(train, split)

    @property
    def verified_within_bytes(self) -> int | None:
        """The budget; None where a failed window can't be dropped."""
        return self.budget.bytes if can_drop_unfinished(self.subject.context.model) else None

    def notes(self, split: Split) -> list[str]:
        """Return the notes, and that windows ran without a limit."""
        found = super().notes(split)
        if self.verified_within_bytes is None:
            found.append(
                f"The window was run without a limit on memory, since torch {torch.__version__} can't drop one of a "
                "sharded model that runs out of it (from 2.14 on it can): the measured peak may exceed the budget."
            )
        return found

    def limited(self) -> AbstractContextManager[None]:
        """Limit the device to the budget.

        Not where what a failed window leaves in a sharded model can't be dropped.
        """
        if self.verified_within_bytes is None:
            return contextlib.nullcontext()
        return self.device.capacity_limited_to(self.budget.bytes)

    def try_fewer_steps(
        self, solution: Solution, measured: Any, train: Callable[..., None], start_over: Callable[[], None]
    ) -> tuple[Solution, Any]:
        """Run a step fewer for as long as that fits."""
        if self.verified_within_bytes is None:
            return solution, measured
        while (fewer := self._with_fewer_steps(solution.split)) is not None:
            if fewer[0] > self.request.most or self.floor(fewer[0]) > self.usable_bytes:
                break
            if self.evidence.recorded_each(fewer) and not self.fits(fewer):
                break  # as it was recorded: a run shows the same
            found = self._measured_within_margin(fewer[:VERIFIED_STEPS], train, start_over)
            if found is None:
                break
            solution, measured = Solution(fewer, solution.tried + 1), found
        return solution, measured

    def _with_fewer_steps(self, split: Split) -> Split | None:
        """Return the next split to try; None if there is none."""
        samples = sum(split)
        if not self.request.uniform:
            return balanced(samples, len(split) - 1) if len(split) > 1 else None
        larger = [size for size in uniform_sizes(samples) if size > split[0]]
        return (larger[-1],) * (samples // larger[-1]) if larger else None

    def _measured_within_margin(
        self, split: Split, train: Callable[..., None], start_over: Callable[[], None]
    ) -> CudaMeasurement | None:
        """Measure a split within the budget and its margin, or return None."""
        found = None
        for capacity in (self.usable_bytes, self.budget.bytes):
            start_over()
            try:
                with self.device.capacity_limited_to(capacity):
                    found = super().measure(train, split)
            except RuntimeError as error:
                if not oom.is_out_of_memory(error):
                    raise
                oom.drop_frames(error)
                return None
            if any(found.retries[2:]):
                return None
        return found


def make_predictor(
    subject: RecordingTarget, request: ResolvedRequest, evidence: Evidence, sample_bytes: int, own_bytes: int
) -> VirtualGpuPredictor:
    """Make a predictor for the GPU that the device stands for."""
    device = subject.device
    assert isinstance(device, VirtualGpuDevice)
    model_events = subject.model_events or model_blocks(subject.context.model)
    rules = device.read_rules()
    return VirtualGpuPredictor(
        subject=subject,
        request=request,
        evidence=evidence,
        baseline_bytes=reserved_bytes_of(model_events, rules),
        budget=read_budget(device, request),
        sample_bytes=sample_bytes,
        model_events=model_events,
        start=device.read_allocator() if evidence.recordings else EMPTY,
        rules=rules,
        rules_remark=cuda_words.rules_remark(find_rules(device.index)),
    )
