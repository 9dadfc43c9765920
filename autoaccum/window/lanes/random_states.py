"""Give each lane its own random draws.

A lane's generator of torch continues where the lane stopped, whatever other lanes draw in between. So checkpointing,
which draws again from the state that a block began with, draws the same. The first lane continues the caller's draws,
and the caller continues the first lane's; each other lane begins with a seed that follows from the caller's state, so
that nothing is drawn for it. Python's and NumPy's generators are shared: lanes run in a fixed order, and their draws
are reproducible, too.
"""

from __future__ import annotations

import hashlib

import torch


class RandomStates:
    """Hold the states of torch's generators for each lane.

    Args:
        device: The device that is trained on.
        lanes: Number of lanes.
    """

    def __init__(self, device: torch.device, lanes: int) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            self._generators.append(torch.cuda.default_generators[index])
        callers = self._taken()
        self._states = [callers, *(self._seeded(callers, lane) for lane in range(1, lanes))]
        self._lane = 0
        self._put(callers)

    def _seeded(self, callers: list[torch.Tensor], lane: int) -> list[torch.Tensor]:
        """Return a lane's first states."""
        digests = (hashlib.sha256(bytes(state.numpy()) + lane.to_bytes(8, "big")).digest() for state in callers)
        seeds = (int.from_bytes(digest[:7], "big") for digest in digests)
        pairs = zip(self._generators, seeds, strict=True)
        return [generator.manual_seed(seed).get_state() for generator, seed in pairs]

    def _taken(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _put(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def enter(self, lane: int) -> None:
        """Continue a lane's draws, and remember where the one before it stopped."""
        if lane != self._lane:
            self._states[self._lane] = self._taken()
            self._put(self._states[lane])
            self._lane = lane
