"""Find memory that outlives a window, and the lines that keep it.

A loss that appends its output to a list or an evaluation that keeps its predictions makes each window use more than the
one before, so no peak holds for long. Recordings show that memory stays. Which lines keep it is shown by three windows
of equal size in which each new tensor is noted with its line: those with more bytes alive after the third window than
after the second, and after the second than after the first.
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
from ..torch_compat import TorchDispatchMode, local_tensors
from ..units import show_bytes
from ..window import step

if TYPE_CHECKING:
    from ..plan import Plan
    from .target import RecordingTarget

log = logging.getLogger("autoaccum")

WINDOWS = 3  # of equal size: what the first one makes for all later ones is not growth; what the second one adds is
_PACKAGE = str(Path(__file__).parent.parent)
_LIBRARIES = tuple(
    {_PACKAGE, str(Path(torch.__file__).parent), *(sysconfig.get_paths()[k] for k in ("stdlib", "purelib"))}
)
_MAX_LINES_NAMED = 3


@dataclass(frozen=True)
class Site:
    """A line whose tensors outlive their window.

    Attributes:
        where: "mine.py:12: kept.append(model(x))"; "" where none of the user's was running, as in backward.
        phase: The phase of the window.
        bytes: Bytes kept by one window of the probe's size.
    """

    where: str
    phase: str
    bytes: int

    @property
    def when(self) -> str:
        """When the line ran, in words."""
        return "each micro-batch" if self.phase in (FIRST, LATER) else PHASE_TITLES.get(self.phase, "between phases")


@dataclass(frozen=True)
class Growth:
    """The memory that each window keeps.

    Attributes:
        sites: The lines that keep it, the largest first.
        undone: Whether what planning's windows left could be removed again (see state/appended.py).
    """

    sites: tuple[Site, ...]
    undone: bool = False

    @property
    def bytes(self) -> int:
        """Bytes kept by one window of the probe's size."""
        return sum(site.bytes for site in self.sites)


def probe(subject: RecordingTarget, n: int) -> Growth | None:
    """Train three windows, and find what outlives them.

    Returns:
        What each window keeps; None where the third ends as the second did.
    """
    subject.progress(f"three windows of {n} samples, to find what outlives them")
    run = subject.window(n)
    watch, alive = _Watch(), []
    try:
        with watch:
            for _ in range(WINDOWS):
                run(watch.on_phase)
                alive.append(watch.alive(subject.context))
    except (RuntimeError, MemoryError) as error:
        if oom.is_out_of_memory(error):
            raise
        log.debug(
            "what outlives a window could not be found: an operation does not run under a dispatch mode", exc_info=True
        )
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
    """Return the storages of parameters, buffers, gradients and optimizer state."""
    tensors: list[Any] = [*context.model.parameters(), *context.model.buffers()]
    tensors += [tensor.grad for tensor in context.model.parameters()]
    tensors += [value for state in context.optimizer.state.values() for value in state.values()]
    parts = (part for tensor in tensors if isinstance(tensor, torch.Tensor) for part in local_tensors(tensor))
    return {StorageWeakRef(part.untyped_storage()).cdata for part in parts}  # type: ignore[no-untyped-call]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the user's line for each tensor that an operation makes."""

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
        except (NotImplementedError, RuntimeError):  # sparse layouts have none
            return
        ref = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        known = self.made.get(ref.cdata)
        # Addresses are reused; a view and an operation in place make no storage.
        if known is None or known[0].expired():  # type: ignore[no-untyped-call]
            self.made[ref.cdata] = ref, Site(_users_line(), self.phase, storage.nbytes())

    def alive(self, context: step.TrainingContext) -> Counter[tuple[str, str]]:
        """Return the live bytes by line and phase, training state excluded."""
        state, found = _state(context), Counter[tuple[str, str]]()
        for address, (ref, site) in self.made.items():
            if address not in state and not ref.expired():  # type: ignore[no-untyped-call]
                found[site.where, site.phase] += site.bytes
        return found


class _InPhase:
    """Set the phase of the window while it is entered."""

    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.watch.phase = self.name

    def __exit__(self, *_: object) -> None:
        self.watch.phase = ""


def _users_line() -> str:
    """Return the innermost line outside of torch, libraries and this package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARIES) and not file.startswith("<frozen"):
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{Path(file).name}:{frame.f_lineno}" + (f": {text[:80]}" if text else "")
        frame = frame.f_back
    return ""


def describe_growth(growth: Growth) -> str:
    """Return the lines that keep memory, in words."""
    lines = list(dict.fromkeys((site.when, site.where or "by none of your lines") for site in growth.sites))
    named = [f"{where} ({when})" for when, where in lines[:_MAX_LINES_NAMED]]
    more = len(lines) - _MAX_LINES_NAMED
    return "; ".join(named) + (f"; and {more} more lines" if more > 0 else "")


def at_run_time(plan: Plan) -> str:
    """Return planning's finding of growth for a warning, or ""."""
    memory = plan.memory
    if not memory.growth_bytes:
        return ""
    return f"Each window keeps {show_bytes(memory.growth_bytes)} more than the one before it: {memory.growth_where}."
