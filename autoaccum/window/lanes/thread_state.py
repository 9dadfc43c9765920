"""Give each lane what torch keeps for a thread.

Lanes are greenlets of one thread. Where one stops inside of `torch.autocast`, `torch.no_grad` or hooks of saved
tensors, the next must not find itself there: what such contexts set is taken away at each switch, and put back when the
lane goes on. Context variables need nothing here: greenlets have their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
        nesting: How many autocasts have been entered.
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
    nesting: int
    autocast: list[tuple[str, bool, torch.dtype]]
    place: tuple[int, Any] | None


@dataclass(eq=False)
class Kept:
    """What torch keeps for a thread, as somebody left it.

    Attributes:
        flags: All but the stacks.
        modes: Function modes and dispatch modes, outermost first.
        hooks: Pairs of hooks of saved tensors, outermost first.
        guard: What leads back into another inference mode than the next one's.
    """

    flags: Flags
    modes: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))
    hooks: list[Any] = field(default_factory=list)
    guard: Any = None

    @property
    def has_stacks(self) -> bool:
        """Whether there are modes or hooks."""
        return bool(self.hooks or self.modes[0] or self.modes[1])


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
        self._callers = self._taken(self._flags())
        self._put(self._callers, self._callers)

    def leave(self) -> Kept | None:
        """Put the caller's state in place of a lane's; return the lane's.

        None where it is the caller's: nearly always.
        """
        flags = self._flags()
        if flags == self._callers.flags and not self._callers.has_stacks and not any([read() for read in self._stacks]):
            return None
        found = self._taken(flags)
        self._put(self._callers, found)
        return found

    def enter(self, kept: Kept | None) -> None:
        """Put a lane's state in place of the caller's."""
        if kept is not None:
            self._put(kept, self._taken(self._callers.flags))

    def _taken(self, flags: Flags) -> Kept:
        take_functions()  # no mode sees what follows
        return Kept(flags, take_modes(), take_saved_hooks())

    def _flags(self) -> Flags:
        nesting = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        functions, refusal, grad, inference, cache, anomalies, nan = [read() for read in self._readers]
        return Flags(
            functions,
            refusal,
            grad,
            inference,
            cache,
            anomalies,
            nan,
            nesting,
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
        for _ in range(old.nesting, new.nesting):
            torch.autocast_increment_nesting()
        for _ in range(new.nesting, old.nesting):
            torch.autocast_decrement_nesting()
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
