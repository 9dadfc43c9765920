"""Memory that outlives a window: what is kept from one to the next, how much, and by which line.

A loss that appends its output to a list, an evaluation that keeps its predictions: each window then takes more than the
one before, and no peak holds for long. Recordings show that something stays; three windows of equal size, with every
tensor's making noted, show what: the lines of whose tensors more is there after the third window than after the second,
and after the second than after the first.
"""

from __future__ import annotations

import linecache
import logging
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..devices import oom
from ..phases import FIRST, LATER, PHASE_TITLES
from ..torch_compat import TorchDispatchMode
from ..units import show_bytes
from ..window import step
from ..window.compiled import uncompiled

if TYPE_CHECKING:
    from ..plan import Plan
    from .target import RecordingTarget

log = logging.getLogger("autoaccum")

WINDOWS = 3  # of equal size: what the first one makes for all later ones isn't growth, what the second one adds is
_OWN = str(Path(__file__).parent.parent)
_LIBRARIES = tuple({_OWN, str(Path(torch.__file__).parent), *(sysconfig.get_paths()[k] for k in ("stdlib", "purelib"))})
_MOST_NAMED = 3


@dataclass(frozen=True)
class Site:
    """A line whose tensors outlive their window.

    Attributes:
        where: "mine.py:12: kept.append(model(x))"; "" where no line of the user's was at work, as in backward.
        phase: The phase of the window.
        bytes: What stays of one window of the probe's size.
    """

    where: str
    phase: str
    bytes: int

    @property
    def when(self) -> str:
        """When it ran, in words."""
        return "each micro-batch" if self.phase in (FIRST, LATER) else PHASE_TITLES.get(self.phase, "between phases")


@dataclass(frozen=True)
class Growth:
    """What each window keeps.

    Attributes:
        sites: The lines that keep it, the largest first.
        undone: Whether all that planning's windows left could be taken out again (see state/appended.py).
    """

    sites: tuple[Site, ...]
    undone: bool = False

    @property
    def bytes(self) -> int:
        """What stays of one window of the probe's size."""
        return sum(site.bytes for site in self.sites)


def probe(subject: RecordingTarget, n: int) -> Growth | None:
    """Trains three windows of two micro-batches of n samples and sees what outlives them.

    Returns:
        What each keeps; None where the third finds all as the second did.
    """
    subject.progress(f"three windows of {n} samples, to see what outlives them")
    piece = subject.tile(n)
    watch, alive = _Watch(), []
    try:
        with uncompiled(), watch:
            for _ in range(WINDOWS):
                step.train_window(subject.context, [piece] * 2, (n, n), on_phase=watch.on_phase)
                step.run_between(subject.context, on_phase=watch.on_phase)
                alive.append(watch.alive(subject.context))
    except (RuntimeError, MemoryError) as error:
        if oom.is_out_of_memory(error):
            raise
        log.debug("what outlives a window could not be seen: some op refuses to be watched", exc_info=True)
        return None
    before, second, third = alive
    grown = {key: min(second[key] - before[key], third[key] - second[key]) for key in third}
    sites = [Site(where, phase, size) for (where, phase), size in grown.items() if size > 0]
    if not sites:
        return None
    subject.remove_appended()
    left = watch.alive(subject.context)
    undone = sum(left[site.where, site.phase] for site in sites) < sum(site.bytes for site in sites)
    return Growth(tuple(sorted(sites, key=lambda site: -site.bytes)), undone)


def _state(context: step.TrainingContext) -> set[int]:
    """The storages that training keeps by design: parameters, buffers, gradients, optimizer state."""
    tensors: list[Any] = [*context.model.parameters(), *context.model.buffers()]
    tensors += [tensor.grad for tensor in context.model.parameters()]
    tensors += [value for state in context.optimizer.state.values() for value in state.values()]
    return {StorageWeakRef(t.untyped_storage()).cdata for t in tensors if isinstance(t, torch.Tensor)}  # type: ignore[no-untyped-call]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes for each tensor that an op makes which line asked for it, without keeping it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.made: dict[int, tuple[StorageWeakRef, Site]] = {}

    def on_phase(self, name: str) -> _InPhase:
        return _InPhase(self, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, (tuple, list)) else (out,)
        for tensor in found:
            if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                self._note(tensor)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # of a layout without one (sparse)
            return
        ref = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        known = self.made.get(ref.cdata)
        # An address is used again; a view, or an op in place, makes nothing.
        if known is None or known[0].expired():  # type: ignore[no-untyped-call]
            self.made[ref.cdata] = ref, Site(_users_line(), self.phase, storage.nbytes())

    def alive(self, context: step.TrainingContext) -> Counter[tuple[str, str]]:
        """By line and phase: bytes made so far that are there now, but for what training keeps by design."""
        state, found = _state(context), Counter[tuple[str, str]]()
        for address, (ref, site) in self.made.items():
            if address not in state and not ref.expired():  # type: ignore[no-untyped-call]
                found[site.where, site.phase] += site.bytes
        return found


class _InPhase:
    """Says which phase of the window it is, while it is entered."""

    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.watch.phase = self.name

    def __exit__(self, *_: object) -> None:
        self.watch.phase = ""


def _users_line() -> str:
    """The innermost line that is neither torch's, nor a library's, nor ours."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARIES) and not file.startswith("<frozen"):
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{Path(file).name}:{frame.f_lineno}" + (f": {text[:80]}" if text else "")
        frame = frame.f_back
    return ""


def told(growth: Growth) -> str:
    """The lines that keep something, in words."""
    lines = list(dict.fromkeys((site.when, site.where or "by no line of yours") for site in growth.sites))
    named = [f"{where} ({when})" for when, where in lines[:_MOST_NAMED]]
    more = len(lines) - _MOST_NAMED
    return "; ".join(named) + (f"; and {more} more lines" if more > 0 else "")


def at_run_time(plan: Plan) -> str:
    """What planning saw of a growth, for the warning of a window that took too much; "" where it saw none."""
    memory = plan.memory
    if not memory.growth_bytes:
        return ""
    return f"Each window keeps {show_bytes(memory.growth_bytes)} more than the one before it: {memory.growth_where}."
