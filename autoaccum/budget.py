"""A memory budget, with a reason for every number. No torch."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_HEADROOM = "10%"  # of what the machine has free, where nobody named a limit: others use it too


@dataclass(frozen=True)
class BudgetItem:
    """One number of a budget and where it comes from."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Budget:
    """What training may use.

    Attributes:
        bytes: The limit less the headroom: what the peak may come to.
        limit_bytes: The tightest of the limits.
        headroom_bytes: Kept free.
        terms: Every limit that was looked at, and the headroom.
        binding_constraint: The name of the tightest limit.
    """

    bytes: int
    limit_bytes: int
    headroom_bytes: int
    terms: tuple[BudgetItem, ...]
    binding_constraint: str
