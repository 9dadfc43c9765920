"""Carry the caller's state of torch into a lane's thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, TypeVar

import torch

from .torch_internals import current_modes, entered_modes

Result = TypeVar("Result")


class ThreadState:
    """The caller's gradient mode, autocast, modes, stream and context variables.

    Args:
        device: The device that is trained on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._grad = torch.is_grad_enabled()
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys(("cpu", device.type))
        ]
        self._cache = torch.is_autocast_cache_enabled()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._modes = current_modes()

    def carried(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Return work that runs under this state, in whichever thread."""
        context = copy_context()

        def run() -> Result:
            return context.run(self._under, work)

        return run

    def _under(self, work: Callable[[], Result]) -> Result:
        torch.get_num_threads()  # a new thread takes the number that was set with its first call of this, not before
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(self._stream))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, enabled, dtype in self._autocast:
                entering: Any = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._cache)
                if enabled:
                    stack.enter_context(entering)
            stack.enter_context(entered_modes(self._modes))
            return work()
