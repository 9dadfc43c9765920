"""A tested batch, its gradients, and the tolerance that judges them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .compare import Gradients
from .loss_trace import ForwardTrace
from .test_batches import TestBatch


@dataclass(frozen=True, eq=False)
class CheckCase:
    """Hold one tested batch and its gradients.

    Attributes:
        test_batch: The batch.
        sample: The workload's own rows, before they were made hard.
        gradients: The gradients.
        tolerance: Relative difference that rounding may cause.
        counted: Whether the workload has a `count`.
        forward_trace: Trace of a forward of the sample.
        device: Device of the test.
        wide: Whether the last layer was enlarged.
        exact_unignored: Whether the gradient was found exact without ignored targets.
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
