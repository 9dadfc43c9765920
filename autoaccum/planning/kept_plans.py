"""Answer a request with a kept plan, or make and keep one.

Only where another process trains, as the command line's requests are: the heap and the allocator of the process that
trains are part of a plan. And only where a limit of memory was named, or a GPU that isn't here: what is free on a
machine changes from second to second, and a plan is for one budget, to the byte.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import stat
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ..devices.base import Device
from ..files import private, stamps
from ..plan import Plan
from ..processes.fork import Died, ForkFailed, in_copy
from ..workload import Workload
from . import cache
from .cache_key import question
from .live_digest import Opaque
from .request import PlanRequest

log = logging.getLogger("autoaccum")

CPU = "cpu"
_SEED = 0
_SEPARATOR = "\0"  # in no path
_COARSE_SECONDS = 0.02  # how coarse a file system's times may be


class KeptPlans:
    """The plans that were kept, for one request of this process.

    Args:
        mode: Whether plans are used and kept (`cache.USE`), only kept (`cache.REFRESH`), or neither (`cache.OFF`).

    Attributes:
        entry: What the answer was found in; None if it was made.
        reason: Why the answer was not kept; "" if it was.
        seconds: What asking took.
    """

    def __init__(self, mode: str) -> None:
        self.entry: cache.Entry | None = None
        self.reason = "the cache is off" if mode == cache.OFF else ""
        self.seconds = 0.0
        self._mode, self._started, self._opened = mode, time.time(), stamps.OpenedFiles()

    def watch(self) -> None:
        """Note opened files from now on, before the user's code runs.

        The random states start from one seed, so that a function which sets none makes the same objects each time.
        torch's own is drawn anew in each process (ATen/CPUGeneratorImpl.cpp), and so are Python's and NumPy's.
        """
        if self._mode != cache.OFF:
            self._opened.watch()
            torch.default_generator.manual_seed(_SEED)
            random.seed(_SEED)
            np.random.seed(_SEED)

    def answer(self, device: Device, workload: Workload, request: PlanRequest, make: Callable[[], Plan]) -> Plan:
        """Return the plan that was kept, or what `make` returns.

        Args:
            device: The device that is planned on.
            workload: The workload, as its function made it.
            request: The request.
            make: Plans.
        """
        began = time.perf_counter()
        key, known = self._key(device, workload, request)
        kept = self._look_up(key, device, request) if key and self._mode == cache.USE else None
        self.seconds = time.perf_counter() - began
        if kept is not None:
            return kept
        plan = make()
        if plan.method != cache.REPLAYED:
            self.reason = self.reason or "its sizes follow no rule"
        if key and not self.reason:
            self._keep(key, known, plan)
        return plan

    def _key(self, device: Device, workload: Workload, request: PlanRequest) -> tuple[str, set[str]]:
        """Return the question's key, or "", and the files it covers."""
        if not self.reason and not request.train_in_new_process:
            self.reason = "it is for this process"
        if self.reason:
            return "", set()

        def find() -> tuple[str, str]:
            try:
                asked = question(workload, request, device)
            except Opaque as error:
                return "", str(error)
            known = stamps.loaded_files() | self._opened.paths()
            key = cache.key_of({**asked, **cache.surroundings(), "files": stamps.stamps(known)})
            return key, _SEPARATOR.join(known)

        # What this leaves in the heap, some 10 MiB, would count to the plan of this process: a copy leaves nothing.
        try:
            key, found = in_copy(find) if device.name == CPU else find()
        except (ForkFailed, Died, MemoryError) as error:
            key, found = "", f"its question could not be asked ({error})"
        if not key:
            self.reason = found
            return "", set()
        return key, set(found.split(_SEPARATOR))

    def _look_up(self, key: str, device: Device, request: PlanRequest) -> Plan | None:
        entry = cache.look_up(key)
        if entry is None:
            return None
        try:
            plan = Plan.from_json(entry.answer["plan"])
        except Exception:  # whatever a file may hold: it is planned anew
            log.debug("a kept plan can't be read", exc_info=True)
            return None
        if plan.budget_bytes != device.read_budget(request.budget, request.headroom).bytes:
            return None
        self.entry = entry
        return plan

    def _keep(self, key: str, known: set[str], plan: Plan) -> None:
        own = os.path.realpath(private.cache_folder() / "autoaccum") + os.sep
        read = {
            path for path in stamps.loaded_files() | self._opened.paths() if not path.startswith(f"{own}plans{os.sep}")
        }
        # Libraries that autoaccum itself compiles, for the first plan on a machine, lie under a digest of their source.
        if changed := written_since((path for path in read if not path.startswith(own)), self._started):
            self.reason = f"{changed} was written meanwhile"
            return
        cache.keep(key, {"plan": plan.to_json()}, stamps.stamps(read - known))


def written_since(paths: Iterable[str], started: float) -> str:
    """Return a file that was written since a time; "" for none."""
    for path in paths:
        with contextlib.suppress(OSError):
            found = os.stat(path)  # noqa: PTH116  # thousands of them
            if stat.S_ISREG(found.st_mode) and found.st_mtime > started - _COARSE_SECONDS:
                return path
    return ""


def about(kept: KeptPlans) -> dict[str, Any]:
    """Return what the command line shows of it, as JSON."""
    found = kept.entry
    return {"origin": found.origin if found else "", "not_kept": kept.reason, "asking_seconds": kept.seconds}
