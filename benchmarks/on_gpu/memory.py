"""Part (a): compare plans with the truth in fresh processes.

`fit_plan` plans within a memory fraction. Its window is then trained in a process of its own, and the largest
micro-batch is looked for around the plan's answer by training windows of two, each in a process of its own. A size
*fits* as plans define it: at the limit and at 2 % less, nothing ran out of memory, and the allocator did not give its
cache back from the third window on; with cuBLAS's workspaces kept or given back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from autoaccum import errors
from autoaccum.devices.cuda.budget import read_device
from autoaccum.planning import fit
from autoaccum.planning.predictor import verified_part
from autoaccum.planning.predictor_virtual import UninitializedTarget
from autoaccum.planning.target import RecordingTarget
from autoaccum.simulation.solver import CAPACITY_MARGIN
from autoaccum.window import compiled, step
from benchmarks.truth_plans import counted
from benchmarks.truth_search import count, train

from . import apart
from . import windows as windows_kept
from .around import largest_around
from .job import Job
from .models import MODELS, made, on_device

WINDOWS = 4  # of the plan's split
TRY_WINDOWS = 3  # of a size: the first two may give the cache back, and the third may not


def limit_to(limit_bytes: int) -> None:
    """Limit what torch's allocator may reserve in this process."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), 0)


def run(job: Job) -> None:
    """Plan, train the plan's window afresh, and find the truth."""
    model = MODELS[job.model]
    made(job.model)
    plan = job.known.get("plan") or job.emit("plan", **apart.call(planned, job.model, model.limit_bytes, model.target))
    if "refused" in plan:
        return
    keeps = plan["keeps workspaces"]
    if "fresh" not in job.known:
        part = verified_part(tuple(plan["split"]), compiles=model.is_compiled and not job.is_virtual)
        job.emit("fresh", **apart.call(trained, job.model, part, model.limit_bytes, keeps, WINDOWS))
    tries: list[dict[str, Any]] = []
    started = time.perf_counter()

    def fits(n: int) -> bool:
        return any(_fits(job.model, n, model.limit_bytes, kept, tries) for kept in (keeps, not keeps))

    def may_go_on() -> bool:
        longest = max((each["seconds"] for each in tries), default=0.0)
        return job.seconds_left > 5 + 4 * longest

    least = 2 if plan["least"] > 1 else 1
    found = largest_around(fits, plan["largest"], may_go_on, least)
    job.emit(
        "truth", largest=found.largest, fails=found.fails, complete=found.is_complete, tried=sorted(found.tried),
        tries=len(tries), seconds=time.perf_counter() - started, ooms=sum(each["ooms"] for each in tries),
        **{"tries detail": tries},
    )  # fmt: skip


def _fits(name: str, n: int, limit_bytes: int, keeps: bool, tries: list[dict[str, Any]]) -> bool:
    for size in (int(limit_bytes * (1 - CAPACITY_MARGIN)), limit_bytes):
        tries.append(apart.call(trained, name, (n, n), size, keeps, TRY_WINDOWS))
        if not tries[-1]["fits"]:
            return False
    return True


def planned(name: str, limit_bytes: int, target: int) -> dict[str, Any]:
    """Plan in this process, within the limit, for training in another."""
    limit_to(limit_bytes)
    work = on_device(name)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        with counted() as counts, windows_kept.kept(name):
            # untimed: beside other trials times would mean nothing
            plan = fit.fit_plan(work, target_batch=target, train_in_new_process=True, timing_seconds=0)
    except errors.AutoaccumError as error:
        return {"refused": f"{type(error).__name__}: {error}", "ooms": count("num_ooms"), **counts}
    return {
        "split": plan.split,
        "largest": plan.largest_micro_batch,
        "capped": plan.schedule.largest_is_capped,
        "without retries": plan.schedule.largest_without_retries,
        "expandable": plan.schedule.largest_with_expandable_segments,
        "least": plan.request.min_micro_batch,
        "keeps workspaces": plan.device.keeps_workspaces,
        "budget": plan.memory.budget.bytes,
        "binds": plan.memory.budget.binding_constraint,
        "predicted": plan.predicted_peak_bytes,
        "predicted here": plan.evidence.this_process_peak_bytes,
        "measured": plan.measured_peak_bytes,
        "retries": plan.memory.retries,
        "method": plan.method,
        "recordings": [note.micro_batch for note in plan.evidence.recordings],
        "exactness": plan.exactness,
        "ooms": count("num_ooms"),
        "seconds": time.perf_counter() - started,
        "window seconds": plan.timing.window_seconds,
        "notes": plan.notes,
        **counts,
    }


def trained(name: str, split: Sequence[int], limit_bytes: int, keeps: bool, windows: int) -> dict[str, Any]:
    """Train windows of a split in this process, within the limit."""
    started = time.perf_counter()
    limit_to(limit_bytes)
    work = on_device(name)
    context = step.open_context(work)
    context.keeps_workspaces = keeps
    target = RecordingTarget if _computes() else UninitializedTarget
    with compiled.as_trained(context):
        found = train(work, context, tuple(split), windows, target=target)
    torch.cuda.synchronize()
    return {
        "split": list(split),
        "limit": limit_bytes,
        "keeps workspaces": keeps,
        "fits": found.fits,
        "ooms": found.ooms,
        "raised": found.raised,
        "retries": found.retries,
        "reserved": found.peak_bytes,
        "live": found.live_bytes,
        "context": read_device().context_bytes,
        "seconds": time.perf_counter() - started,
    }


def _computes() -> bool:
    from autoaccum.devices.virtual.control import is_virtual

    return not is_virtual()
