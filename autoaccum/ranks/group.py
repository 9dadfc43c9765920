"""Find this process's place among the ranks of its process group.

The group is whoever's started it: torchrun, Accelerate, Ray Train, Lightning. Nothing is started here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ..errors import UsageError

_apart: ContextVar[bool] = ContextVar("apart", default=False)
_absent_allowed: ContextVar[bool] = ContextVar("absent_allowed", default=False)


@dataclass(frozen=True)
class Place:
    """This process's place among the ranks.

    Attributes:
        rank: Its rank.
        world: Number of ranks, at least 2.
    """

    rank: int
    world: int


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Count this rank alone, while what runs has no collectives.

    Other ranks may run something else meanwhile, or wait.
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def ranks_here() -> int:
    """Return the ranks of this process's group; 1 without one, or `apart`."""
    if _apart.get():
        return 1
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def place_here() -> Place | None:
    """Return this process's place; None where it trains, or plans, alone."""
    world = ranks_here()
    return Place(torch.distributed.get_rank(), world) if world > 1 and not are_absent() else None


def are_absent() -> bool:
    """Return whether the other ranks aren't here: torch's fake process group."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_backend() == "fake" and not _apart.get()


@contextlib.contextmanager
def absent_allowed() -> Iterator[None]:
    """Accept a fake process group while this is entered."""
    token = _absent_allowed.set(True)
    try:
        yield
    finally:
        _absent_allowed.reset(token)


def refuse_absent() -> None:
    """Refuse a fake process group where it isn't accepted.

    Raises:
        UsageError: There is one, and nothing could be trained on it.
    """
    if not are_absent() or _absent_allowed.get():
        return
    raise UsageError(
        f"This process group of {torch.distributed.get_world_size()} ranks is a fake one, on which nothing can be "
        "trained.",
        "Its collectives wait for nobody and sum nothing; it serves to plan for ranks that are not here.",
        "Plan on it (fit_plan, or autoaccum plan --gpu NAME), and train on a group of real ranks: nccl or gloo.",
    )
