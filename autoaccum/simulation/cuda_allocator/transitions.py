"""Remember what phases do to states of the allocator. No torch here."""

from __future__ import annotations

import marshal
from hashlib import blake2b
from typing import Any, NamedTuple

from .allocator import PhaseResult


class Outcome(NamedTuple):
    """Hold a phase's figures, and the number of the state after it."""

    result: PhaseResult
    after: int


class Transitions:
    """Hold the outcomes of phases, by the number of the state before.

    Equal states with equal phases ahead go on alike, so what one window showed holds for every other that comes by: a
    search over numbers of steps replays each stretch once. A state's number is a new one, or, where a key of the whole
    state was made, that of the state with an equal key (its digest of 32 bytes is kept in its place, for the memory).

    Attributes:
        outcomes: By the number of a state, 0 at the start, and what the phase is.
    """

    def __init__(self) -> None:
        self.outcomes: dict[tuple[object, ...], Outcome] = {}
        self._numbers: dict[bytes, int] = {}
        self._last = 0

    def number_of(self, key: Any) -> int:
        """Return the number of a state with that key.

        Args:
            key: Tuples of whole numbers.
        """
        digest = blake2b(marshal.dumps(key, 2), digest_size=32).digest()  # version 2: the same for equal keys
        if digest not in self._numbers:
            self._numbers[digest] = self.new()
        return self._numbers[digest]

    def new(self) -> int:
        """Return the number of a state that is compared with none."""
        self._last += 1
        return self._last
