"""Notice micro-batches of several widths, and reserve the widest's segments before them.

A plan is made at the longest samples, whose segments serve all narrower ones (simulation/varied_widths.py says why the
others' don't serve these). A window of planned samples reserves them by itself; where the first window has none, they
are reserved before it, which runs nothing and takes milliseconds. Where all samples are as long as planned, nothing is
done.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..devices.base import CACHING_ALLOCATOR, Device
from ..devices.registry import get_device
from ..plan import Plan
from ..units import show_bytes
from ..workload import Batch
from .fingerprint import is_narrower

log = logging.getLogger("autoaccum")


class Widths:
    """The widths of one training's micro-batches.

    Args:
        device: Where they are trained; it has a caching allocator.
        plan: Their plan.

    Attributes:
        vary: Whether one was narrower than planned.
    """

    def __init__(self, device: Device, plan: Plan) -> None:
        self.vary = False
        self._device, self._plan = device, plan
        self._has_begun = False

    def begin_window(self, pieces: Sequence[Batch], sizes: Sequence[int]) -> None:
        """Look at a window's micro-batches.

        Before the first window, reserve what the widest need.

        Args:
            pieces: The micro-batches.
            sizes: Samples in each.
        """
        if self.vary and self._has_begun:
            return
        planned, is_first, self._has_begun = self._plan.provenance.signature, not self._has_begun, True
        narrower = [is_narrower(piece, planned, size) for piece, size in zip(pieces, sizes, strict=True)]
        self.vary = any(narrower)
        has_widest = any(
            size >= self._plan.micro_batch and not less for size, less in zip(sizes, narrower, strict=True)
        )
        if is_first and self.vary and not has_widest:
            self._reserve()

    def _reserve(self) -> None:
        segments = [(row.bytes, row.count) for row in self._plan.memory.segments]
        if not segments:
            return
        self._device.release_cache()
        reserved = self._device.reserve(segments, self._plan.predicted_peak_bytes)
        log.info(
            "Micro-batches vary in width: %s of segments are reserved as windows of the longest samples have them.",
            show_bytes(reserved),
        )


def watch_widths(device: torch.device, plan: Plan) -> Widths | None:
    """Return what notices a training's widths; None where they make no difference.

    Args:
        device: Where it is trained.
        plan: Its plan.
    """
    found = get_device(device)
    return Widths(found, plan) if found.memory_model == CACHING_ALLOCATOR else None
