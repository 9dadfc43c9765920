"""Part (e): times, alone on the card.

`Runner.step` and the loop written by hand train the same split, window by window in turn. The knee that
`--objective fastest` chooses stands beside measured times of each size. Micro-batches are copied from pageable memory,
from pinned memory, and from pinned memory on a separate stream, in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from autoaccum import Runner, fit_plan
from autoaccum.data import split as cutting
from autoaccum.data import tree
from autoaccum.data.prefetch import Copies
from autoaccum.simulation.knee import interval
from autoaccum.window import step

from . import apart
from .job import Job
from .loops import hand_written
from .memory import limit_to
from .models import MODELS, made, on_device

SIZES = {"gpt2-bf16": 16, "resnet50-bf16-channels-last": 64, "mlp-fp32": 512}  # samples of a micro-batch
STEPS = 4
WARM_UP, WINDOWS = 3, 12
SCAN_SECONDS = 3.0


def run(job: Job) -> None:
    """Time one model, in three processes."""
    made(job.model)
    for name, function in (("runner", runner_and_loop), ("knee", knee), ("copies", copies)):
        if name not in job.known:
            job.emit(name, **apart.call(function, job.model))


def _seconds(window: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    window()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turn(windows: dict[str, Callable[[], object]], rounds: int = WINDOWS) -> dict[str, list[float]]:
    """Time functions in turn, so that noise affects all equally."""
    found: dict[str, list[float]] = {name: [] for name in windows}
    for index in range(WARM_UP + rounds):
        for name, window in windows.items():
            seconds = _seconds(window)
            if index >= WARM_UP:
                found[name].append(seconds)
    return found


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Return the median of the rounds' ratios, with its 95 % interval."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    low, high = interval(pairs) or (min(pairs), max(pairs))
    return {"ratio": statistics.median(pairs), "low": low, "high": high}


def runner_and_loop(name: str) -> dict[str, Any]:
    """Time `Runner.step` and the loop, with one optimizer and one split."""
    limit_to(MODELS[name].limit_bytes)
    n, work = SIZES[name], on_device(name)
    work = replace(work, optimizer=step.open_context(work).optimizer)
    plan = fit_plan(work, target_batch=n * STEPS, max_micro_batch=n, check=False, verify=False)
    if len(set(plan.split)) != 1:
        raise RuntimeError(f"{n} samples don't fit, so the split isn't even: {plan.split}")
    runner, batch = Runner(work, plan), cutting.tile(work.sample, n * STEPS)
    optimizer: Any = work.optimizer
    loop = hand_written(work, optimizer, plan.micro_batch, len(plan.split))
    found = in_turn({"runner": lambda: runner.step(batch), "loop": loop})
    medians = {f"{kind} seconds": statistics.median(each) for kind, each in found.items()}
    return medians | ratio(found["runner"], found["loop"]) | {"split": plan.split, "windows": WINDOWS}


def knee(name: str) -> dict[str, Any]:
    """Plan for the fastest step; time powers of two by hand."""
    limit_to(MODELS[name].limit_bytes)
    work = on_device(name)
    plan = None
    if not _is_virtual():  # planning for the fastest needs times
        plan = fit_plan(work, target_batch=512, objective="fastest", timing_seconds=SCAN_SECONDS, check=False)
    optimizer = step.open_context(work).optimizer
    most = plan.largest_micro_batch if plan else SIZES[name]
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= most and n <= 512]
    scan: dict[int, float] = {}
    deadline = time.perf_counter() + 2 * SCAN_SECONDS
    for n in reversed(sizes):
        window = hand_written(work, optimizer, n, max(1, min(STEPS, 512 // n)))
        window()
        scan[n] = statistics.median(_seconds(window) for _ in range(3)) / (n * max(1, min(STEPS, 512 // n)))
        if time.perf_counter() > deadline:
            break
    found: dict[str, Any] = {"seconds per sample": {str(n): scan[n] for n in sorted(scan)}}
    if plan is not None:
        found |= {
            "knee": plan.micro_batch,
            "largest": plan.largest_micro_batch,
            "reason": plan.provenance.reasons.get("times", ""),
            "timed": {str(each.micro_batch): each.step_seconds for each in plan.timing.timed_sizes},
        }
    return found


def copies(name: str) -> dict[str, Any]:
    """Time windows whose micro-batches come from the host in three ways."""
    limit_to(MODELS[name].limit_bytes)
    n, work = SIZES[name], on_device(name)
    piece = cutting.tile(work.sample, n)
    pinned = tree.map_leaves(piece, lambda path, leaf: leaf.pin_memory() if torch.is_tensor(leaf) else leaf)
    context = step.open_context(work)

    def window(source: Any, ahead: bool) -> Callable[[], object]:
        bring = Copies(context.device, ahead=ahead)

        def train() -> None:
            context.copies = bring
            step.train_window(context, [source] * STEPS, (n,) * STEPS)

        return train

    ways = {"pageable": window(piece, False), "pinned": window(pinned, False), "own stream": window(pinned, True)}
    found = in_turn(ways)
    return {
        "seconds": {name: statistics.median(each) for name, each in found.items()},
        "own stream / pageable": ratio(found["own stream"], found["pageable"]),
        "own stream / pinned": ratio(found["own stream"], found["pinned"]),
        "bytes": sum(leaf.nbytes for _, leaf in tree.leaves(piece) if torch.is_tensor(leaf)),
    }


def _is_virtual() -> bool:
    from autoaccum.devices.virtual.control import is_virtual

    return is_virtual()
