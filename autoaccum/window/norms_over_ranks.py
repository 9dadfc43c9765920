"""Merge the statistics that a window's normalizations saw on all ranks.

Each rank has merged those of its own micro-batches (norms.py). Over ranks they are added up on the host in fp64, twice:
counts and sums, which give the mean, and then the squared deviations from it, so that no difference of large squares is
taken. All ranks add the same numbers in the same order, and so have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..torch_compat import InstanceNorm, NormBase
from .norms import Statistics, Window, wide_float

Found = list[list[Statistics]]


class OwnStatistics:
    """What one rank's micro-batches showed, on the host.

    Args:
        window: The normalizations of its window, whose micro-batches have run.

    Attributes:
        calls: How often each module was called in a forward.
    """

    def __init__(self, window: Window) -> None:
        self._modules: list[NormBase] = [merging.module for merging in window.merged]
        self._found = [_on_host(merging.found) for merging in window.merged]
        self.calls = tuple(map(len, self._found))

    def merged(self, calls: Sequence[int], add_up: Callable[[torch.Tensor], None]) -> Found:
        """Return the statistics of all ranks, for each module and call.

        Args:
            calls: How often each module was called, on the rank that called it most often.
            add_up: Replaces numbers on the host by their sums over ranks.
        """
        places = [(i, call) for i, often in enumerate(calls) for call in range(often)]
        if not places:
            return [[] for _ in calls]
        found = [self._found[i][call] if call < len(self._found[i]) else None for i, call in places]
        widths = [self._modules[i].num_features for i, _ in places]
        sums = _zeros(len(places) + sum(widths))
        counts, means = sums[: len(places)], torch.split(sums[len(places) :], widths)
        for place, own in enumerate(found):
            if own is not None:
                counts[place] = own.count
                means[place].copy_(own.mean * own.count)
        add_up(sums)
        squares = _zeros(sum(widths))
        deviations = torch.split(squares, widths)
        for place, own in enumerate(found):
            means[place].div_(counts[place])
            if own is not None:
                deviations[place].copy_(own.deviations)
                if not own.of_instances:
                    deviations[place].add_((own.mean - means[place]).square_(), alpha=own.count)
        add_up(squares)
        merged: Found = [[] for _ in calls]
        for place, (i, _) in enumerate(places):
            module = self._modules[i]
            assert module.running_mean is not None
            device = module.running_mean.device
            mean, deviation = (each[place].to(device, wide_float(device)) for each in (means, deviations))
            merged[i].append(Statistics(int(counts[place]), mean, deviation, isinstance(module, InstanceNorm)))
        return merged


def _on_host(found: Sequence[Statistics]) -> list[Statistics]:
    """Copy statistics to the host, all of a module's at once."""
    if not found:
        return []
    flat = torch.cat([part for each in found for part in (each.mean, each.deviations)]).to("cpu", torch.float64)
    parts = torch.split(flat, len(found[0].mean))
    return [Statistics(each.count, parts[2 * i], parts[2 * i + 1], each.of_instances) for i, each in enumerate(found)]


def _zeros(numbers: int) -> torch.Tensor:
    return torch.zeros(numbers, dtype=torch.float64, device="cpu")
