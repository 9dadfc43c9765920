"""Give each lane what torch keeps for a thread.

Lanes are greenlets of one thread. Where one stops inside of `torch.autocast`, `torch.no_grad` or hooks of saved
tensors, the next must not find itself there: what such contexts set is taken away at each switch, and put back when the
lane goes on. Context variables need nothing here: greenlets have their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .torch_internals import (
    put_functions,
    put_modes,
    put_saved_hooks,
    refuse_saved_hooks,
    saved_hooks_refusal,
    take_functions,
    take_modes,
    take_saved_hooks,
    track_saved_hooks,
)


@dataclass(eq=False)
class Kept:
    """What torch keeps for a thread, as somebody left it.

    Attributes:
        functions: Whether functions of torch ask modes and subclasses of tensors.
        modes: Function modes and dispatch modes, outermost first.
        hooks: Pairs of hooks of saved tensors, outermost first.
        refusal: Why there may be no such hooks; None where there may.
        grad: Whether gradients are on.
        inference: Whether inference mode is.
        autocast: By kind of device: whether it is on, and its dtype.
        cache: Whether autocast keeps what it casts.
        nesting: How many autocasts have been entered.
        anomalies: Whether anomalies are looked for, and NaN is one. Torch keeps these two for all threads.
        place: The current device and stream; None on a CPU.
        guard: What leads back into another inference mode than the next one's.
    """

    functions: Any
    modes: tuple[list[Any], list[Any]]
    hooks: list[Any]
    refusal: str | None
    grad: bool
    inference: bool
    autocast: list[tuple[str, bool, torch.dtype]]
    cache: bool
    nesting: int
    anomalies: tuple[bool, bool]
    place: tuple[int, Any] | None
    guard: Any = None


class ThreadState:
    """Exchange what torch keeps for this thread.

    Args:
        device: The device that is trained on.
    """

    def __init__(self, device: torch.device) -> None:
        self._kinds = tuple(dict.fromkeys(("cpu", device.type)))
        self._on_cuda = device.type == "cuda"
        track_saved_hooks()

    def exchange(self, other: Kept | None) -> Kept:
        """Put another one's state in place; return the one before.

        Args:
            other: What it left; None for somebody new, who begins with what is there.
        """
        functions = take_functions()  # no mode sees what follows
        found = self._taken(functions)
        self._put(other or found, found)
        put_functions((other or found).functions)
        return found

    def _taken(self, functions: Any) -> Kept:
        nesting = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        return Kept(
            functions,
            take_modes(),
            take_saved_hooks(),
            saved_hooks_refusal(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self._kinds],
            torch.is_autocast_cache_enabled(),
            nesting,
            (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            (torch.cuda.current_device(), torch.cuda.current_stream()) if self._on_cuda else None,
        )

    def _put(self, new: Kept, old: Kept) -> None:
        if new.guard is None and new.inference != old.inference:
            old.guard = torch.inference_mode(new.inference)
            old.guard.__enter__()
        elif new.guard is not None:
            new.guard.__exit__(None, None, None)
            new.guard = None
        if new.grad != torch.is_grad_enabled():
            torch.set_grad_enabled(new.grad)
        if new.autocast != old.autocast:
            for kind, enabled, dtype in new.autocast:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
        if new.cache != old.cache:
            torch.set_autocast_cache_enabled(new.cache)
        for _ in range(old.nesting, new.nesting):
            torch.autocast_increment_nesting()
        for _ in range(new.nesting, old.nesting):
            torch.autocast_decrement_nesting()
        if new.anomalies != old.anomalies:
            torch.set_anomaly_enabled(*new.anomalies)
        if new.place is not None and new.place != old.place:
            device, stream = new.place
            torch.cuda.set_device(device)
            torch.cuda.set_stream(stream)
        self._put_hooks(new, old)
        put_modes(new.modes)

    def _put_hooks(self, new: Kept, old: Kept) -> None:
        changes = new.refusal != old.refusal
        if changes or (new.hooks and old.refusal is not None):
            refuse_saved_hooks(None)
        put_saved_hooks(new.hooks)
        if new.refusal is not None and (changes or new.hooks):
            refuse_saved_hooks(new.refusal, beside_some=bool(new.hooks))
