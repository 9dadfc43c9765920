"""Remove what the user's functions append to lists and tensors while planning.

A loss or an evaluation that appends to a list would be left with the results of planning's windows among its own, and
planning with the memory that they hold. state/snapshot.py puts all back in the end; this is quick, and only for what
grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .closures import Holdings


def keeper(held: Holdings) -> Callable[[], None]:
    """Note what functions hold; return a function that removes later additions.

    A list that was changed in another way than by adding at its end is left as it is. A tensor that was put together
    with more (`self.all = torch.cat([self.all, new])`) is what it was again.

    Args:
        held: What the workload's functions hold (state/closures.py).
    """
    things = [thing for _, thing in held.things]
    lists = [(found, list(found)) for found in things if type(found) is list]
    owners = [vars(thing) for thing in things if isinstance(getattr(thing, "__dict__", None), dict)]
    tensors = [(owner, name, value) for owner in owners for name, value in owner.items() if _is_tensor(value)]
    slots = [(slot, value) for slot in held.slots if _is_tensor(value := slot.get())]

    def take_out() -> None:
        for found, kept in lists:
            if len(found) > len(kept) and all(a is b for a, b in zip(found, kept, strict=False)):
                del found[len(kept) :]
        for owner, name, before in tensors:
            if _has_grown(owner.get(name), before):
                owner[name] = before
        for slot, before in slots:
            if _has_grown(slot.get(), before):
                slot.put(before)

    return take_out


def _is_tensor(thing: Any) -> bool:
    return isinstance(thing, torch.Tensor)


def _has_grown(now: Any, before: torch.Tensor) -> bool:
    return isinstance(now, torch.Tensor) and now.nbytes > before.nbytes
