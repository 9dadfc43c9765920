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

_GRAINS = 64  # of the plan's peak: growth by less, and room for more, is nothing to act on


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
        self._segments = [(row.bytes, row.count) for row in plan.memory.segments]
        self._has_begun = False
        self._releases = self._least_bytes = self._usual_bytes = 0

    def begin_window(self, pieces: Sequence[Batch], sizes: Sequence[int]) -> None:
        """Look at a window's micro-batches.

        Before the first window, reserve what the widest need; later on again where it was given back.

        Args:
            pieces: The micro-batches.
            sizes: Samples in each.
        """
        is_first, self._has_begun = not self._has_begun, True
        if self.vary:
            if self._segments and self._is_given_back():
                self._reserve()
            return
        if is_first:
            self._releases = self._device.cache_releases()
        planned, most = self._plan.provenance.signature, self._plan.micro_batch
        narrower = [is_narrower(piece, planned, size) for piece, size in zip(pieces, sizes, strict=True)]
        self.vary = any(narrower)
        has_widest = any(size >= most and not less for size, less in zip(sizes, narrower, strict=True))
        if is_first and self.vary and not has_widest:
            self._reserve()

    def _is_given_back(self) -> bool:
        """Return whether the cache was given back since, or has to be.

        The allocator does it, in the middle of a window, where small blocks, of which very narrow micro-batches have
        many, have no room beside it. Where they have just filled what was left, it is done before the next window.
        """
        held, grain = self._device.held_bytes(), self._plan.predicted_peak_bytes // _GRAINS
        if self._device.cache_releases() != self._releases or held < self._least_bytes:
            return True
        self._usual_bytes = self._usual_bytes or held
        return held > self._usual_bytes + grain and self._device.obtainable_bytes() < grain

    def _reserve(self) -> None:
        if not self._segments:
            return
        self._device.release_cache()
        if self._plan.device.keeps_workspaces:
            self._device.make_workspaces()  # or the first window would put them into the middle of a segment
        reserved = self._device.reserve(self._segments, self._plan.predicted_peak_bytes)
        self._usual_bytes = 0
        self._releases, self._least_bytes = self._device.cache_releases(), self._device.held_bytes()
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
