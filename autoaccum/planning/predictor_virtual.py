"""The outlook on a virtual GPU that stands in for a real one: recorded without a limit, then held to its capacity.

The device has any amount of memory, so no recording can run out, and "does not fit" is an answer. Where a try costs
milliseconds and harms nobody, the prediction is tried: the plan's window, and the one with a step fewer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..budget import Budget, BudgetItem
from ..data import tree
from ..devices import oom
from ..devices.cuda import device
from ..devices.cuda.gpu_specs import Gpu
from ..devices.virtual import control
from ..errors import UsageError
from ..simulation.cuda_allocator.allocator import EMPTY
from ..simulation.solver import Solution, Split, balanced
from ..units import parse_bytes, parse_part, show_bytes
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

    def is_sure_to_fit(self, n: int) -> bool:
        """Any size can be recorded."""
        return True

    def measure(self, train: Callable[..., None], split: Split) -> device.Measured:
        """Three windows within the capacity."""
        with limited_to(self.budget.bytes):
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
    ) -> device.Measured | None:
        """What the windows took; None where they don't fit, as they are or with 2 % less."""
        found = None
        for capacity in (self.usable_bytes, self.budget.bytes):
            start_over()
            try:
                with limited_to(capacity):
                    found = super().measure(train, split)
            except RuntimeError as error:
                if not oom.is_out_of_memory(error):
                    raise
                oom.drop_frames(error)
                return None
            if any(found.retries[2:]):
                return None
        return found


@contextlib.contextmanager
def limited_to(capacity_bytes: int) -> Iterator[None]:
    """Lets another process take what is beyond the capacity, for a while."""
    before = control.stats()
    room = max(0, capacity_bytes - before.used_bytes)
    control.set_other(0, before.other_bytes + max(0, before.free_bytes - room))
    try:
        yield
    finally:
        control.set_other(0, before.other_bytes)


def budget_of(gpu: Gpu, memory: str | int | None, headroom: str | int | None) -> Budget:
    """What torch's allocator may reserve on that GPU, where nobody else uses it.

    Raises:
        UsageError: A size can't be read, or leaves nothing.
    """
    outside = gpu.context_bytes + gpu.library_bytes
    total = BudgetItem(
        "device", gpu.total_bytes - outside, f"{show_bytes(gpu.total_bytes)}, less context and libraries"
    )
    limits = [total]
    if memory is not None:
        asked = parse_bytes(memory, what="an amount of memory")
        limits.append(
            BudgetItem("asked", asked - outside, f"you named {show_bytes(asked)}, context and libraries included")
        )
    tightest = min(limits, key=lambda term: term.bytes)
    kept = parse_part(headroom, max(1, tightest.bytes), what="a headroom") or 0 if headroom is not None else 0
    if tightest.bytes - kept <= 0:
        raise UsageError(
            f"Nothing is left to train with: {tightest.why}, less {show_bytes(kept)} headroom.",
            f"Context and libraries of a {gpu.device_name} take about {show_bytes(outside)}.",
            "Name more memory, or less headroom.",
        )
    terms = (
        *limits,
        BudgetItem("context", gpu.context_bytes, gpu.sources.context),
        BudgetItem("libraries", gpu.library_bytes, gpu.sources.library),
        BudgetItem(
            "headroom", kept, f"you asked for {headroom}" if headroom is not None else "none: nobody else is there"
        ),
    )
    return Budget(tightest.bytes - kept, tightest.bytes, kept, terms, tightest.name)


def look(
    subject: RecordingTarget, request: PlanRequest, evidence: Evidence, sample_bytes: int, own_bytes: int, *, gpu: Gpu
) -> VirtualGpuPredictor:
    """What that GPU has to be used."""
    build = subject.build or device.model_blocks(subject.context.model)
    settings = device.rules(device_bytes=gpu.total_bytes)
    budget = budget_of(gpu, request.budget, request.headroom)
    base = device.reserved_by(build, settings)
    start = device.read_start(subject.context.device) if evidence.recordings else EMPTY
    return VirtualGpuPredictor(subject, request, evidence, base, budget, sample_bytes, 0.0, build, start, settings)
