"""`autoaccum run`: epochs of a workload with its plan, resumable from a checkpoint at a window's end."""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import UsageError
from .files import write_whole
from .identity import check_fingerprint
from .plan import Plan
from .process_memory import committed_bytes
from .rng import put_rng, take_rng
from .runner import Runner, StepResult
from .windows import loader_length
from .workload import Batch, Workload


def train(
    workload: Workload,
    plan: Plan,
    *,
    say: Callable[[dict[str, Any]], None],
    epochs: int = 1,
    steps: int | None = None,
    checkpoint: str | None = None,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """Trains whole windows; stops at the end of one when interrupted.

    Args:
        workload: What is trained; must have a loader.
        plan: Its plan.
        say: Called after each window with its figures.
        epochs: Passes over the loader.
        steps: Optimizer steps at most, those before a resume included.
        checkpoint: File to resume from, where it exists, and to write.
        checkpoint_seconds: How often to write it; it is always written at the end.

    Returns:
        Optimizer steps, samples and the last loss; whether it was interrupted.
    """
    if workload.loader is None:
        raise UsageError(
            f"The workload {workload.name} has no loader, so there is nothing to train on.",
            hint="Return Workload(..., loader=DataLoader(dataset, ...)), or a function that makes one.",
        )
    runner = Runner(workload, plan)
    place = _Place()
    if checkpoint is not None and Path(checkpoint).exists():
        _resume(Path(checkpoint), runner, place, plan)
    saved, last = time.monotonic(), {"loss": None}
    length = loader_length(_loader(workload), runner.samples)
    with _interrupts() as interrupted:
        for result in _windows(runner, workload, place, epochs):
            last = _figures(result, runner, place, length)
            say({"step": last})
            stop = interrupted() or (steps is not None and runner.number >= steps)
            if checkpoint is not None and (stop or time.monotonic() - saved >= checkpoint_seconds):
                _save(checkpoint, runner, place, plan)
                saved = time.monotonic()
            if stop:
                break
        if checkpoint is not None:
            _save(checkpoint, runner, place, plan)
        return {**last, "steps": runner.number, "samples": place.samples, "interrupted": interrupted()}


class _Place:
    """Where training is: the epoch, its windows done, and the random states that reproduce its order."""

    def __init__(self) -> None:
        self.epoch = self.windows = self.samples = 0
        self.rng_at_epoch: dict[str, Any] | None = None
        self.rng_now: dict[str, Any] | None = None


def _windows(runner: Runner, workload: Workload, place: _Place, epochs: int) -> Iterator[StepResult]:
    """Every window of the epochs that are left; an epoch begun before a resume is entered where it was left."""
    while place.epoch < epochs:
        skip, rng = place.windows, place.rng_now
        if place.rng_at_epoch is None:
            place.rng_at_epoch = take_rng()
        else:
            put_rng(place.rng_at_epoch)  # the loader draws its order from it
        for result in runner.epoch(_loader(workload), skip=skip, rng=rng if skip else None):
            place.windows += 1
            place.samples += result.samples
            place.rng_now = take_rng()
            yield result
        place.epoch, place.windows, place.rng_at_epoch = place.epoch + 1, 0, None


def _loader(workload: Workload) -> Iterable[Batch]:
    loader = workload.loader
    return loader() if callable(loader) else loader  # type: ignore[return-value]


def _figures(result: StepResult, runner: Runner, place: _Place, length: int | None) -> dict[str, Any]:
    return {
        "number": result.number,
        "epoch": place.epoch,
        "window": place.windows,
        "windows": length,
        "loss": float(result.loss),
        "samples": result.samples,
        "micro_batch": max(result.split),
        "accumulation_steps": len(result.split),
        "retries": result.retries,
        "committed_bytes": committed_bytes(),
    }


def _save(path: str, runner: Runner, place: _Place, plan: Plan) -> None:
    state = {"runner": runner.state_dict(), "place": vars(place), "fingerprint": dict(plan.fingerprint)}
    write_whole(path, lambda file: torch.save(state, file))


def _resume(path: Path, runner: Runner, place: _Place, plan: Plan) -> None:
    try:
        state = torch.load(path, weights_only=False)  # a file of the user's own, with random states of three libraries
        fingerprint = state["fingerprint"]
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, EOFError) as error:
        raise UsageError(
            f"The checkpoint {str(path)!r} can't be read ({type(error).__name__}).",
            "It was cut short, or is something else.",
            "Name another --checkpoint, or remove it to start from the beginning.",
        ) from None
    check_fingerprint(fingerprint, plan.fingerprint)
    runner.load_state_dict(state["runner"])
    vars(place).update(state["place"])


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks to stop at the window's end, the second stops at once."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
