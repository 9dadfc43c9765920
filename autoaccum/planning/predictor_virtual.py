"""The outlook on a virtual GPU that stands in for a real one: recorded without a limit, then held to its capacity.

The device has any amount of memory, so no recording can run out, and "does not fit" is an answer. Where a try costs
milliseconds and harms nobody, the prediction is tried: the plan's window, and the one with a step fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..data import tree
from ..devices import oom
from ..devices.cuda.device import CudaMeasurement
from ..devices.cuda.model_blocks import model_blocks, reserved_bytes_of
from ..devices.virtual.device import VirtualGpuDevice
from ..simulation.cuda_allocator.allocator import EMPTY
from ..simulation.solver import Solution, Split, balanced
from ..workload import Batch
from .observe import Evidence, RecordingTarget
from .predictor import VERIFIED_STEPS
from .predictor_cuda import CudaPredictor
from .request import PlanRequest


@dataclass(frozen=True)
class EmptySubject(RecordingTarget):
    """A subject whose batches are never written to: nothing reads them there, and pages nobody touched cost nothing."""

    def tile(self, n: int) -> Batch:
        """A batch of n samples with the shapes of a real one; what is no tensor is as in one of two samples."""
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
    """As on a CUDA device, but for what a device without a limit allows."""

    @property
    def device(self) -> VirtualGpuDevice:
        """Return the device, which has controls of its own."""
        device = self.subject.device
        assert isinstance(device, VirtualGpuDevice)
        return device

    def is_sure_to_fit(self, n: int) -> bool:
        """Any size can be recorded."""
        return True

    def measure(self, train: Callable[..., None], split: Split) -> CudaMeasurement:
        """Three windows within the capacity."""
        with self.device.capacity_limited_to(self.budget.bytes):
            return super().measure(train, split)

    def nearer(
        self, solution: Solution, measured: Any, train: Callable[..., None], start_over: Callable[[], None]
    ) -> tuple[Solution, Any]:
        """Tries a step fewer for real, for as long as that fits."""
        samples = sum(solution.split)
        while len(solution.split) > 1:
            fewer = balanced(samples, len(solution.split) - 1)
            if fewer[0] > self.request.most or self.floor(fewer[0]) > self.usable_bytes:
                break
            found = self._tried(fewer[:VERIFIED_STEPS], train, start_over)
            if found is None:
                break
            solution, measured = Solution(fewer, solution.tried + 1), found
        return solution, measured

    def _tried(
        self, split: Split, train: Callable[..., None], start_over: Callable[[], None]
    ) -> CudaMeasurement | None:
        """What the windows took; None where they don't fit, as they are or with 2 % less."""
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


def look(
    subject: RecordingTarget, request: PlanRequest, evidence: Evidence, sample_bytes: int, own_bytes: int
) -> VirtualGpuPredictor:
    """Make a predictor for the GPU that the device stands in for."""
    device = subject.device
    assert isinstance(device, VirtualGpuDevice)
    build = subject.build or model_blocks(subject.context.model)
    settings = device.read_rules()
    budget = device.read_budget(request.budget, request.headroom)
    base = reserved_bytes_of(build, settings)
    start = device.read_allocator() if evidence.recordings else EMPTY
    return VirtualGpuPredictor(subject, request, evidence, base, budget, sample_bytes, 0.0, build, start, settings)
