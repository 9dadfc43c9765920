"""Trace one forward: calls, readers of the batch, spread of outputs.

A margin, a hinge or a threshold has no effect while all samples lie on one side of it, as with the small outputs of an
untrained model. So a gradient is also tested with outputs spread like a trained model's, by a larger last layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data import tree
from .determinism import RandomOps
from .value_uses import Uses

TARGET_SPREAD = 3.0  # standard deviation of the outputs: logits of a classifier that is sure of its classes
MAX_LAYER_SCALE = 64.0  # times the last layer is made larger at most
MAX_OUTPUT_COLUMNS = 1 << 12  # of the outputs of a sample that are looked at
MAX_LAYER_ENTRIES = 1 << 24  # of a layer that is copied for that: 64 MiB in single precision


@dataclass(eq=False)
class ForwardTrace:
    """Hold what a forward showed.

    Attributes:
        draws: What was drawn at random, and the calls of cross-entropy.
        uses: The operators that read the batch.
        layer: The last called module that has parameters and is small enough to copy.
        spread: Standard deviation of its outputs over samples, averaged; NaN without outputs.
        outputs: Its outputs of shape (samples, columns), truncated; None if rows aren't samples.
        target_spread: The standard deviation to reach.
    """

    draws: RandomOps = field(default_factory=RandomOps)
    uses: Uses = field(default_factory=Uses)
    layer: nn.Module | None = None
    spread: float = float("nan")
    outputs: torch.Tensor | None = None
    target_spread: float = TARGET_SPREAD

    @property
    def layer_scale(self) -> float:
        """The last layer's factor; 1 if outputs are wide or unknown."""
        if self.layer is None or not 0 < self.spread < self.target_spread:
            return 1.0
        return min(self.target_spread / self.spread, MAX_LAYER_SCALE)

    def keys(self, seed: int | None = None) -> torch.Tensor | None:
        """Return a number for each sample by which outputs differ."""
        if self.outputs is None or seed is None:
            return None if self.outputs is None else self.outputs.mean(1)
        direction = torch.randn(self.outputs.shape[1], generator=torch.Generator().manual_seed(seed))
        return self.outputs.cpu() @ direction


@contextlib.contextmanager
def tracing_layers(model: nn.Module, forward_trace: ForwardTrace, rows: int) -> Iterator[None]:
    """Record the last called layer and its outputs until exit."""

    def after(module: nn.Module, args: Any, out: Any) -> None:
        given = [leaf for _, leaf in tree.leaves(out) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if not given or not given[0].numel():
            return
        with contextlib.suppress(RuntimeError):  # inside vmap no number can be read; a jagged tensor has no rows
            first = given[0].detach()
            are_rows = first.dim() and len(first) % rows == 0
            by_sample = (
                first.reshape(rows, -1)[:, :MAX_OUTPUT_COLUMNS].float() if are_rows else first.reshape(-1, 1).float()
            )
            spread = float(by_sample.std(0).mean())
            forward_trace.layer, forward_trace.spread = module, spread
            forward_trace.outputs = by_sample if are_rows else None

    handles = [
        module.register_forward_hook(after)
        for module in model.modules()
        if 0 < sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad) <= MAX_LAYER_ENTRIES
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
