"""Let all ranks read a loader in the first rank's order.

A sampler draws its order from torch's global generator, or from the loader's. Ranks may have seeded these unlike each
other, so that each drops out other units; with these states each would read another order too, and samples would be
lost or trained twice. So an epoch's order is drawn from a stream of its own that begins as the first rank's states are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..state.rng import put_rng, same_state, take_rng
from .words import Control, Kind


class SharedOrder:
    """The random states that an epoch's order is drawn from.

    Args:
        control: The words; every rank makes one at the same time.
        loader: The loader, with its generators.
    """

    def __init__(self, control: Control, loader: Iterable[Any]) -> None:
        self._generators = generators_of(loader)
        mine = _host(take_rng()), [generator.get_state() for generator in self._generators]
        self._states, own = control.from_first(mine, Kind.ORDER)
        for generator, state in zip(self._generators, own, strict=False):
            generator.set_state(state)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from the order's stream while it is entered.

        A generator that nothing else was drawn from moves on with it, as on one rank.
        """
        before = _host(take_rng())
        own = {name: state for name, state in before.items() if not self._is_at(name, state)}
        put_rng({name: state for name, state in self._states.items() if name in before})
        try:
            yield
        finally:
            self._states = {name: state for name, state in _host(take_rng()).items() if name in self._states}
            put_rng(own)

    def _is_at(self, name: str, state: Any) -> bool:
        return name in self._states and same_state(self._states[name], state)


def generators_of(loader: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that determine a DataLoader's order.

    These are its own and its sampler's, beside the global one.
    """
    holders = loader, getattr(loader, "sampler", None)
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _host(states: dict[str, Any]) -> dict[str, Any]:
    """Leave out the generators of GPUs, which no sampler draws from."""
    return {name: state for name, state in states.items() if "CUDA" not in name}
