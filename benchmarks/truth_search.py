"""The truth of a case, by training windows in fresh processes.

One process for each split and capacity.

Processes are forked from one that has imported everything, built the model on the CPU and never touched CUDA.
"""

from __future__ import annotations

import functools
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoaccum import Workload
from autoaccum.devices import oom
from autoaccum.devices.registry import get_device
from autoaccum.planning.predictor_virtual import UninitializedTarget
from autoaccum.planning.target import RecordingTarget
from autoaccum.simulation.solver import CAPACITY_MARGIN, Split, balanced
from autoaccum.simulation.training_run import MAX_WINDOWS
from autoaccum.window import step

from .truth_cases import Case, limit, workload

EXPANDABLE = "expandable_segments:True"


def forked(run: Callable[[], Any]) -> Any:
    """Run `run` in a child; return its JSON result."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = {"found": run()}
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(text) if text else {"failed": f"ended with status {status} and no answer"}
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    return answer["found"]


@dataclass
class Tried:
    """The result of training a split.

    `raised` says whether an out-of-memory error reached the training: a convolution without room for its workspace
    runs with another engine, and only counts one.
    """

    ooms: int
    retries: Split
    peak_bytes: int
    live_bytes: int
    raised: bool = False

    @property
    def fits(self) -> bool:
        """Whether it fits, as `TrainingReplay.fits` defines it.

        A convolution that did without its workspace has run out of memory, too.
        """
        return not self.ooms and not any(self.retries[2:])

    @property
    def fits_without_retries(self) -> bool:
        """Whether the allocator never gave its cache back."""
        return not self.ooms and not any(self.retries)


def train(
    work: Workload,
    context: step.TrainingContext,
    split: Split,
    windows: int = MAX_WINDOWS,
    target: type[RecordingTarget] = UninitializedTarget,
) -> Tried:
    """Train windows to the end, or until the split clearly doesn't fit.

    `target` makes the batches: written ones where something is computed.
    """
    retries: list[int] = []
    raised = False
    before = count("num_ooms")
    torch.cuda.reset_peak_memory_stats()
    subject = target(context, work, get_device(context.device), None)
    pieces = {size: subject.tile(size) for size in set(split)}
    for index in range(windows):
        retried = count("num_alloc_retries")
        try:
            step.train_window(context, [pieces[size] for size in split], split)
        except RuntimeError as error:
            if not oom.is_out_of_memory(error):
                raise
            oom.drop_frames(error)
            raised = True
        retries.append(count("num_alloc_retries") - retried)
        if count("num_ooms") > before or (index >= 2 and retries[-1]):
            break
    stats = torch.cuda.memory_stats()
    return Tried(
        count("num_ooms") - before,
        tuple(retries),
        stats["reserved_bytes.all.peak"],
        stats["requested_bytes.all.peak"],
        raised,
    )


def count(name: str) -> int:
    """One of the allocator's own counts."""
    return int(torch.cuda.memory_stats().get(name, 0))


class Truth:
    """Tries splits of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model, self.batch = case.make()
        self.bound = functools.cache(self._bound)
        self.known: dict[tuple[Split, int | None, int, str, bool], Tried] = {}

    def tried(
        self,
        split: Split,
        capacity_bytes: int | None,
        windows: int = MAX_WINDOWS,
        settings: str = "",
        *,
        kept: bool = False,
    ) -> Tried:
        """In a fresh process; `kept` are cuBLAS's workspaces, or given back."""
        key = split, capacity_bytes, windows, settings, kept
        if key not in self.known:
            found = forked(functools.partial(self._try, *key))
            self.known[key] = Tried(found[0], tuple(found[1]), found[2], found[3])
        return self.known[key]

    def _try(self, split: Split, capacity_bytes: int | None, windows: int, settings: str, kept: bool) -> Any:
        if settings:
            torch.cuda.memory._set_allocator_settings(settings)
        limit(capacity_bytes)
        work = workload(self.case, self.model.cuda(), self.batch)
        context = step.open_context(work)
        context.keeps_workspaces = kept
        found = train(work, context, split, windows)
        return found.ooms, found.retries, found.peak_bytes, found.live_bytes

    @property
    def usable_bytes(self) -> int:
        """2 % less than the capacity."""
        return int(self.case.capacity_bytes * (1 - CAPACITY_MARGIN))

    @property
    def least(self) -> int:
        """The smallest micro-batch that can be trained."""
        return 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()) else 1

    def fits(self, split: Split) -> bool:
        """Whether it fits at both capacities without retries from window three.

        At the whole capacity, and at 2 % less.
        """
        sizes = (self.usable_bytes, self.case.capacity_bytes)
        return any(all(self.tried(split, size, kept=kept).fits for size in sizes) for kept in (False, True))

    def fits_without_retries(self, split: Split, settings: str = "") -> bool:
        """With 2 % less, and no retry ever."""
        return self.tried(split, self.usable_bytes, settings=settings).fits_without_retries

    def possible(self, n: int, *, alone: bool) -> bool:
        """Whether a window with such a micro-batch can be alive at once."""
        split = (n,) if alone else (n, n - 1) if n > self.least else (n, n)
        found = self.tried(split, None, 2)
        return not found.ooms and found.live_bytes <= self.usable_bytes

    def _bound(self, most: int = 1 << 20) -> int:
        """Return the largest micro-batch that several can be alive of.

        Live bytes grow with it.
        """
        low, high = self.least - 1, 16
        while high < most and self.possible(high, alone=False):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.possible(middle, alone=False) else (low, middle)
        return low

    def largest(self) -> int:
        """Return the largest micro-batch whose window of two fits, or 0."""
        n = self.bound()
        while n >= self.least and not self.fits((n, n)):
            n -= 1
        return n if n >= self.least else 0

    def smallest_steps(self, target: int) -> Split:
        """Return the split of fewest steps that fits, or ()."""
        if self.possible(target, alone=True) and self.fits((target,)):
            return (target,)
        for k in range(max(2, -(-target // max(1, self.bound()))), target // self.least + 1):
            if self.fits(balanced(target, k)):
                return balanced(target, k)
        return ()
