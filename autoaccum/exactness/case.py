"""A tested batch, its gradients, and the tolerance that judges them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .compare import Gradients
from .loss_trace import ForwardTrace
from .test_batches import TestBatch


@dataclass(frozen=True, eq=False)
class CheckCase:
    """A batch and what it gave.

    Attributes:
        test_batch: The batch.
        sample: The workload's own rows, as they were before they were made hard.
        gradients: The gradients.
        tolerance: How far they may differ for rounding.
        counted: Whether the workload says `count=`.
        forward_trace: What a forward of the sample showed.
        device: Where it was tried.
        wide: Whether the last layer was larger.
        exact_unignored: Whether the gradient is the whole batch's where no target is ignored, which was tried.
    """

    test_batch: TestBatch
    sample: TestBatch
    gradients: Gradients
    tolerance: float
    counted: bool
    forward_trace: ForwardTrace
    device: torch.device
    wide: bool = False
    exact_unignored: bool = False

    @property
    def holds(self) -> bool:
        """Whether the window's gradient is the whole batch's, up to rounding."""
        return self.gradients.agrees(self.tolerance)
