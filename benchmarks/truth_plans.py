"""Plan a case, train the plan, and compare it with the truth."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from autoaccum import errors
from autoaccum.data import split as cutting
from autoaccum.devices.virtual import control
from autoaccum.planning import build_plan, fit, verify
from autoaccum.planning.predictor_virtual import UninitializedTarget
from autoaccum.simulation.solver import Split, balanced
from autoaccum.window import step

from .truth_cases import Case, limit, workload
from .truth_search import EXPANDABLE, Truth, count, forked, train

TRUTHS = ("case", "workspace", "target", "true k", "true largest", "truth_seconds", "tries")
BEYOND = 6  # sizes tried beyond the largest without retries


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count micro-batches and samples of recording and of verification."""
    found = {"passes": 0, "samples": 0, "verifications": 0, "verified samples": 0}
    inner, run = step.train_window, verify.run_for_real
    verifying = False

    def train_window(context: Any, pieces: Any, sizes: Sequence[int], **how: Any) -> Any:
        if verifying:
            found["verified samples"] += sum(sizes)
        else:
            found["passes"] += len(sizes)
            found["samples"] += sum(sizes)
        return inner(context, pieces, sizes, **how)

    def run_for_real(predictor: Any, split: Split) -> Any:
        nonlocal verifying
        verifying = True
        found["verifications"] += 1
        try:
            return run(predictor, split)
        finally:
            verifying = False

    step.train_window, verify.run_for_real = train_window, run_for_real  # type: ignore[assignment]
    try:
        yield found
    finally:
        step.train_window, verify.run_for_real = inner, run


@contextlib.contextmanager
def only_the_plan() -> Iterator[None]:
    """Leave out what takes most of the time and changes no figure.

    The table of other sizes' peaks, and writing to host batches, of which nothing is copied here.
    """
    environment_for, table = fit.environment_for, build_plan._table
    fit.environment_for = lambda device: replace(environment_for(device), subject=UninitializedTarget)
    build_plan._table = lambda predictor, split, largest: ()
    try:
        yield
    finally:
        fit.environment_for, build_plan._table = environment_for, table


def planned(truth: Truth, target: int, *, state: bool, less: bool, histories: bool = True) -> dict[str, Any]:
    """Plans in this process, then trains the plan here.

    Args:
        truth: The case.
        target: The target batch.
        state: Whether the optimizer has state before planning, which is kept.
        less: Whether the capacity turns out 2 % smaller after planning.
        histories: Whether the plan has to hold here; else only in a fresh process.
    """
    case = truth.case
    limit(case.capacity_bytes)
    work = workload(case, truth.model.cuda(), truth.batch)
    if state:
        context = step.open_context(work)
        work = replace(work, optimizer=context.optimizer)
        step.train_window(context, [cutting.tile(work.sample, 2)], (2,))
    started, reserved = time.perf_counter(), torch.cuda.memory_reserved()
    try:
        with counted() as counts, only_the_plan():
            plan = fit.fit_plan(work, target_batch=target, headroom=0, train_in_new_process=not histories, check=False)
    except errors.AutoaccumError as error:
        return {"refused": f"{type(error).__name__}: {error}", "ooms": count("num_ooms"), **counts}
    seconds = time.perf_counter() - started
    ooms, left = count("num_ooms"), torch.cuda.memory_reserved()
    if less:
        control.set_other(0, control.stats(0).other_bytes + case.capacity_bytes - truth.usable_bytes)
    context = step.open_context(work)
    context.keeps_workspaces = plan.device.keeps_workspaces
    here = train(work, context, plan.split)
    return {
        "split": plan.split,
        "largest": plan.largest_micro_batch,
        "without retries": plan.schedule.largest_without_retries,
        "expandable": plan.schedule.largest_with_expandable_segments,
        "binds": plan.memory.binding_constraint,
        "method": plan.method,
        "recordings": [note.micro_batch for note in plan.evidence.recordings],
        "predicted": plan.predicted_peak_bytes,
        "measured": plan.measured_peak_bytes,
        "budget": plan.memory.budget.bytes,
        "seconds": seconds,
        "ooms": ooms,
        "left as it was": left == reserved,
        "holds here": here.fits,
        "here": [here.ooms, here.retries, here.peak_bytes],
        **counts,
    }


def row(case: Case, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """One line of the table.

    Args:
        case: What is planned.
        known: An earlier line of the case, whose truth is reused: it doesn't depend on how plans are made.
    """
    started = time.perf_counter()
    truth = Truth(case)
    line = {name: known[name] for name in TRUTHS} if known else _truth(truth)
    largest, target = line["true largest"], line["target"]
    split = balanced(target, line["true k"]) if line["true k"] else ()
    plan = forked(lambda: planned(truth, target, state=False, less=False))
    if "refused" in plan:
        exact = not split
        return line | {"refused": plan["refused"], "exact": exact, "largest exact": exact, "ooms": plan["ooms"]}
    line |= _against(truth, plan, split, largest) | _holding(truth, plan, target)
    return line | {"seconds": round(time.perf_counter() - started, 1)}


def _truth(truth: Truth) -> dict[str, Any]:
    started = time.perf_counter()
    largest = truth.largest()
    target = max(truth.least, round(truth.case.load * largest))
    split = truth.smallest_steps(target)
    found = truth.case.label, truth.case.workspace or "", target, len(split), largest
    return dict(zip(TRUTHS, (*found, round(time.perf_counter() - started, 1), len(truth.known)), strict=True))


def _against(truth: Truth, plan: dict[str, Any], split: Split, largest: int) -> dict[str, Any]:
    """Compare the plan with the truth.

    With one micro-batch the largest is the target, and nothing is larger.
    """
    chosen = tuple(plan["split"])
    most = chosen[0] if len(chosen) == 1 else largest
    return {
        "k": len(chosen),
        "largest": plan["largest"],
        "exact": chosen == split,
        "largest exact": plan["largest"] == most,
        "largest too high": plan["largest"] > most,
        "without retries": plan["without retries"],
        "without retries is": _held(truth.fits_without_retries, plan["without retries"], most),
        "expandable": plan["expandable"],
        "expandable is": _held(functools.partial(truth.fits_without_retries, settings=EXPANDABLE), plan["expandable"]),
        "passes": plan["passes"],
        "samples / micro-batch": round(plan["samples"] / chosen[0], 2),
        "verifications": plan["verifications"],
        "predicted": plan["predicted"],
        "measured": plan["measured"],
        "binds": plan["binds"],
        "method": plan["method"],
        "recordings": " ".join(map(str, plan["recordings"])),
        "plan_seconds": round(plan["seconds"], 2),
    }


def _held(fits: Callable[[Split], bool], largest: int | None, most: int | None = None) -> str:
    """Whether a size fits, and none of the next few.

    Trying all that live bytes allow would take hours.
    """
    if largest is None:
        return "unknown"
    if not fits((largest, largest)):
        return "too high"
    larger = [n for n in range(largest + 1, largest + 1 + BEYOND) if most is None or n <= most]
    return "too low" if any(fits((n, n)) for n in larger) else "exact"


def _holding(truth: Truth, plan: dict[str, Any], target: int) -> dict[str, Any]:
    """Whether plans hold in a fresh process and in those that searched.

    With optimizer state kept and dropped.

    The plan itself is checked at the full capacity; others, planned in separate processes, at 2 % less.
    """
    others = {
        state: forked(lambda state=state: planned(truth, target, state=state, less=True)) for state in (False, True)
    }
    fresh = truth.fits(tuple(plan["split"]))
    here = plan["holds here"] and others[False].get("holds here", True)
    kept = others[True].get("holds here", True)
    return {
        "safe": fresh and here and kept,
        "fits fresh": fresh,
        "fits here": here,
        "fits here, state kept": kept,
        "k with state kept": len(others[True].get("split", ())),
        "ooms": sum(each["ooms"] for each in (plan, *others.values())),
    }
