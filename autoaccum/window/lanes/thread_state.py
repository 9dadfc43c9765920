"""Give each lane what torch keeps for a thread.

Lanes are greenlets of one thread. Where one stops inside of `torch.autocast`, `torch.no_grad` or hooks of saved
tensors, the next must not find itself there: what such contexts set is taken away at each switch, and put back when the
lane goes on. Context variables need nothing here: greenlets have their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .torch_internals import (
    Reader,
    put_functions,
    put_modes,
    put_saved_hooks,
    refuse_saved_hooks,
    stack_readers,
    state_readers,
    take_functions,
    take_modes,
    take_saved_hooks,
    track_saved_hooks,
)


class Flags(NamedTuple):
    """What torch keeps for a thread, but for its stacks.

    Attributes:
        functions: Whether functions of torch ask modes and subclasses of tensors.
        refusal: Why there may be no hooks of saved tensors; None where there may.
        grad: Whether gradients are on.
        inference: Whether inference mode is.
        cache: Whether autocast keeps what it casts.
        anomalies: Whether anomalies are looked for. Torch keeps this for all threads, and the next one.
        nan: Whether NaN is one.
        autocast: By kind of device: whether it is on, and its dtype.
        place: The current device and stream; None on a CPU.
    """

    functions: Any
    refusal: str | None
    grad: bool
    inference: bool
    cache: bool
    anomalies: bool
    nan: bool
    autocast: list[tuple[str, bool, torch.dtype]]
    place: tuple[int, Any] | None


@dataclass(eq=False)
class Kept:
    """What torch keeps for a thread, as somebody left it.

    Attributes:
        flags: All but the stacks, and what follows.
        nesting: How many autocasts have been entered.
        modes: Function modes and dispatch modes, outermost first.
        hooks: Pairs of hooks of saved tensors, outermost first.
        guard: What leads back into another inference mode than the next one's.
    """

    flags: Flags
    nesting: int
    modes: tuple[list[Any], list[Any]]
    hooks: list[Any]
    guard: Any = None


class ThreadState:
    """Exchange what torch keeps for this thread, between its caller and lanes.

    Args:
        device: The device that is trained on.
    """

    def __init__(self, device: torch.device) -> None:
        self._kinds = tuple(dict.fromkeys(("cpu", device.type)))
        self._on_cuda = device.type == "cuda"
        track_saved_hooks()
        self._stacks: tuple[Reader, ...] = stack_readers()
        self._readers: tuple[Reader, ...] = (
            *state_readers(),
            torch.is_grad_enabled,
            torch.is_inference_mode_enabled,
            torch.is_autocast_cache_enabled,
            torch.is_anomaly_enabled,
            torch.is_anomaly_check_nan_enabled,
        )
        self._callers = self._taken(self._flags(), _nesting())
        self._put(self._callers, self._callers)
        self._callers_is_bare = not any(read() for read in self._stacks)

    def leave(self) -> Kept | int:
        """Put the caller's state in place of a lane's; return the lane's.

        Where it differs in the number of autocasts alone, as nearly always, that is returned.
        """
        flags, nesting = self._flags(), _nesting()
        is_bare = self._callers_is_bare and not any([read() for read in self._stacks])
        if is_bare and flags == self._callers.flags:
            _nest(nesting, self._callers.nesting)
            return nesting
        found = self._taken(flags, nesting)
        self._put(self._callers, found)
        return found

    def enter(self, kept: Kept | int | None) -> None:
        """Put a lane's state in place of the caller's.

        Args:
            kept: What it left; None before it has begun.
        """
        if isinstance(kept, int):
            _nest(self._callers.nesting, kept)
        elif kept is not None:
            self._put(kept, self._taken(self._callers.flags, self._callers.nesting))

    def _taken(self, flags: Flags, nesting: int) -> Kept:
        take_functions()  # no mode sees what follows
        return Kept(flags, nesting, take_modes(), take_saved_hooks())

    def _flags(self) -> Flags:
        functions, refusal, grad, inference, cache, anomalies, nan = [read() for read in self._readers]
        return Flags(
            functions,
            refusal,
            grad,
            inference,
            cache,
            anomalies,
            nan,
            [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self._kinds],
            (torch.cuda.current_device(), torch.cuda.current_stream()) if self._on_cuda else None,
        )

    def _put(self, kept: Kept, before: Kept) -> None:
        new, old = kept.flags, before.flags
        if kept.guard is not None:
            kept.guard.__exit__(None, None, None)
            kept.guard = None
        elif new.inference != old.inference:
            before.guard = torch.inference_mode(new.inference)
            before.guard.__enter__()
        if new.grad != torch.is_grad_enabled():
            torch.set_grad_enabled(new.grad)
        if new.autocast != old.autocast:
            for kind, enabled, dtype in new.autocast:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(new.cache)
        _nest(before.nesting, kept.nesting)
        torch.set_anomaly_enabled(new.anomalies, new.nan)
        if new.place is not None and new.place != old.place:
            device, stream = new.place
            torch.cuda.set_device(device)
            torch.cuda.set_stream(stream)
        if old.refusal is not None:
            refuse_saved_hooks(None)
        put_saved_hooks(kept.hooks)
        if new.refusal is not None:
            refuse_saved_hooks(new.refusal, beside_some=bool(kept.hooks))
        put_modes(kept.modes)
        put_functions(new.functions)


def _nesting() -> int:
    """Return how many autocasts have been entered."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return nesting


def _nest(old: int, new: int) -> None:
    """Change how many autocasts have been entered."""
    for _ in range(old, new):
        torch.autocast_increment_nesting()
    for _ in range(new, old):
        torch.autocast_decrement_nesting()
