"""Train epochs of a workload, resumable after each window.

`autoaccum run` calls it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..data.loaders import loader_length
from ..devices.base import Device
from ..devices.registry import get_device
from ..errors import UsageError
from ..plan import Plan
from ..processes import interrupts
from ..processes.child import FINISHES
from ..ranks.order import generators_of
from ..state.rng import as_plain, from_plain, put_rng, take_rng
from ..workload import Batch, Workload
from .checkpoint import plain, read_checkpoint, unusable, write_checkpoint
from .over_ranks import agreed, exists_everywhere, on_all_ranks, states_of_ranks
from .runner import Runner, StepResult

# What taking over a state that is no state of this workload's raises, torch's and the workload's own classes included.
_MISMATCH_ERRORS = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def train(
    workload: Workload,
    plan: Plan,
    *,
    progress: Callable[[dict[str, Any]], None],
    epochs: int = 1,
    steps: int | None = None,
    checkpoint: str | None = None,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """Train whole windows; stop at the end of one when interrupted.

    Args:
        workload: What is trained; must have a loader.
        plan: Its plan.
        progress: Called after each window with its figures.
        epochs: Passes over the loader.
        steps: Optimizer steps at most, those before a resume included.
        checkpoint: File to resume from, where it exists, and to write.
        checkpoint_seconds: How often to write it; it is always written at the end.

    Returns:
        Optimizer steps, samples and the last loss; whether it was interrupted; the checkpoint that was written.

    Ranks of a process group all call this. They stop together, and the first one writes the checkpoint.
    """
    _check_loader(workload, epochs)
    runner, position = Runner(workload, plan), _Position()
    device = get_device(runner.context.device)
    if checkpoint is not None:
        _begin(checkpoint, runner, position, plan)
    saved, last, nonfinite = time.monotonic(), {"loss": None}, _NonfiniteLosses(device)
    length = loader_length(_loader(workload), runner.samples, least=runner.least)
    with _interrupts(progress) as interrupted:
        enough = steps is not None and runner.number >= steps
        for result in () if enough else _windows(runner, workload, position, epochs):
            last = _figures(result, runner, position, length, device)
            nonfinite.count(result, position, progress)
            progress({"step": last})
            is_due = checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds
            stops, saves = agreed(runner.ranks, stops=interrupted() is not None, saves=is_due)
            if stops or (steps is not None and runner.number >= steps):
                break
            if saves and checkpoint:
                _save(checkpoint, runner, position, plan)
                saved = time.monotonic()
        if checkpoint is not None:
            _save(checkpoint, runner, position, plan)
        number = interrupted()
        ended = {
            "steps": runner.number,
            "samples": position.samples,
            "interrupted": number is not None,
            "signal": number,
        }
        return {**last, **ended, **nonfinite.figures(), "checkpoint": checkpoint}


def _check_loader(workload: Workload, epochs: int) -> None:
    """Refuse a workload without data for so many epochs.

    Raises:
        UsageError: It has no loader, or one that gives its batches once.
    """
    if workload.loader is None:
        raise UsageError(
            f"The workload {workload.name} has no loader, so there is nothing to train on.",
            hint="Return Workload(..., loader=DataLoader(dataset, ...)), or a function that makes one.",
        )
    if epochs > 1 and hasattr(workload.loader, "__next__"):
        raise UsageError(
            f"The loader is a {type(workload.loader).__name__}, which gives its batches once, for {epochs} epochs.",
            "Behind the first epoch there would be nothing to train on.",
            "Give a DataLoader, a list of batches, or a function that makes it anew: loader=lambda: ...",
        )


class _NonfiniteLosses:
    """Count windows whose loss is not finite.

    On a device that computes nothing there are none: values mean nothing there.
    """

    def __init__(self, device: Device) -> None:
        self._is_counting = device.computes
        self._first: dict[str, int] | None = None
        self._windows = 0

    def count(self, result: StepResult, position: _Position, progress: Callable[[dict[str, Any]], None]) -> None:
        """Count a window; report the first that isn't finite."""
        loss = float(result.loss)
        if math.isfinite(loss) or not self._is_counting:
            return
        self._windows += 1
        if self._first is None:
            self._first = {"epoch": position.epoch + 1, "window": position.windows}
            message = f"epoch {position.epoch + 1}, window {position.windows}: the loss is {loss}; training goes on"
            progress({"warning": message})

    def figures(self) -> dict[str, Any]:
        """Return how many there were, and which was the first."""
        return {"nonfinite_windows": self._windows, "first_nonfinite": self._first}


_COUNT_FIELDS, _RNG_FIELDS = ("epoch", "windows", "samples"), ("rng_at_epoch", "rng_now")


class _Position:
    """The position in training, and the random states that reproduce it."""

    def __init__(self) -> None:
        self.epoch = self.windows = self.samples = 0
        self.rng_at_epoch: dict[str, Any] | None = None
        self.rng_now: dict[str, Any] | None = None
        self.order_at_epoch: list[torch.Tensor] = []
        self.is_own = True  # whether the random states are this rank's; a rank that is new has none

    def state(self) -> dict[str, Any]:
        """Return the position in tensors and plain values, for a checkpoint."""
        rng = {name: None if (each := getattr(self, name)) is None else as_plain(each) for name in _RNG_FIELDS}
        return {name: getattr(self, name) for name in _COUNT_FIELDS} | rng | {"order_at_epoch": self.order_at_epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned.

        Raises:
            ValueError: It is something else, in a way that can be seen.
            RuntimeError, TypeError, LookupError: So do generators that are given it.
        """
        counts, order = {name: state[name] for name in _COUNT_FIELDS}, state["order_at_epoch"]
        if not all(type(each) is int and each >= 0 for each in counts.values()):
            raise ValueError(f"counts of {counts}")
        if type(order) is not list or not all(isinstance(each, torch.Tensor) for each in order):
            raise ValueError("the loader's generators have no such states")
        for each in order:
            torch.Generator().set_state(each)
        found = {name: None if state[name] is None else from_plain(dict(state[name])) for name in _RNG_FIELDS}
        before = take_rng()
        try:
            for states in found.values():
                put_rng(states or {})
        finally:
            put_rng(before)
        vars(self).update(counts | found | {"order_at_epoch": order})


def _windows(runner: Runner, workload: Workload, position: _Position, epochs: int) -> Iterator[StepResult]:
    """Train the windows of the epochs that are left.

    An epoch that was begun before a resume continues where it was left.
    """
    while position.epoch < epochs:
        skip, rng = position.windows, position.rng_now if position.is_own else take_rng()
        position.is_own = True
        loader = _loader(workload)
        generators = generators_of(loader)
        if position.rng_at_epoch is None:
            position.rng_at_epoch = take_rng()
            position.order_at_epoch = [generator.get_state() for generator in generators]
        else:  # the loader draws its order from these
            put_rng(position.rng_at_epoch)
            if len(generators) != len(position.order_at_epoch):
                raise UsageError(
                    f"The checkpoint has {len(position.order_at_epoch)} generators of the loader; the loader has "
                    f"{len(generators)}.",
                    "An epoch is gone on with in its own order, which the loader's generators draw.",
                    "Give the loader the generator that it had, or start over without the checkpoint.",
                )
            for generator, state in zip(generators, position.order_at_epoch, strict=True):
                generator.set_state(state)
        for result in runner.epoch(loader, skip=skip, rng=rng if skip else None):
            position.windows += 1
            position.samples += result.samples
            position.rng_now = take_rng()
            yield result
        position.epoch, position.windows, position.rng_at_epoch = position.epoch + 1, 0, None


def _loader(workload: Workload) -> Iterable[Batch]:
    loader = workload.loader
    return loader() if callable(loader) else loader  # type: ignore[return-value]


def _figures(
    result: StepResult, runner: Runner, position: _Position, length: int | None, device: Device
) -> dict[str, Any]:
    return {
        "number": result.number,
        "epoch": position.epoch,
        "window": position.windows,
        "windows": length,
        "loss": float(result.loss),
        "held_bytes": device.held_bytes(),
        "samples": result.samples,
        "micro_batch": max(result.split, default=0),
        "accumulation_steps": len(result.split),
        "retries": result.retries,
    }


def _begin(path: str, runner: Runner, position: _Position, plan: Plan) -> None:
    """Go on from a checkpoint, where there is one."""
    plain(runner.state_dict(), "the checkpoint")  # what it can't hold is an error before the first window
    if exists_everywhere(runner.ranks, path):
        on_all_ranks(runner.ranks, lambda: _resume(Path(path), runner, position, plan))


def _save(path: str, runner: Runner, position: _Position, plan: Plan) -> None:
    places = states_of_ranks(runner.ranks, position.state())
    content = {"runner": runner.state_dict(), "place": places[0], "for": _made_for(plan), "ranks": places[1:]}

    def write() -> None:
        if runner.ranks is None or runner.ranks.rank == 0:
            write_checkpoint(path, content)

    on_all_ranks(runner.ranks, write)


def _resume(path: Path, runner: Runner, position: _Position, plan: Plan) -> None:
    state = read_checkpoint(path)
    for name in ("runner", "place", "for"):
        if not isinstance(state.get(name), dict):
            raise unusable(path, f"it holds no {name!r}" if name not in state else f"its {name!r} is no mapping")
    limits = state["runner"].get("limits")
    numbers = {
        "number": state["runner"].get("number"),
        "micro_batch": limits["micro_batch"] if isinstance(limits, dict) else None,
    }
    if not all(type(each) is int and each >= 0 for each in numbers.values()) or not numbers["micro_batch"]:
        raise unusable(path, f"it says {', '.join(f'{name} {each!r}' for name, each in numbers.items())}")
    made_for, here = state["for"], _made_for(plan)
    if made_for != here:
        differing = "; ".join(
            f"{k}: {made_for.get(k)} there, {here[k]} here" for k in here if made_for.get(k) != here[k]
        )
        raise UsageError(
            f"The checkpoint {str(path)!r} is of another training ({differing}).",
            "It counts windows of another size, or holds the state of another model or optimizer.",
            "Go on with a plan for the same target, or name another --checkpoint.",
        )
    try:
        rank = 0 if runner.ranks is None else runner.ranks.rank
        others = state.get("ranks", [])
        position.load_state(others[rank - 1] if 0 < rank <= len(others) else state["place"])
        position.is_own = rank <= len(others)
        runner.load_state_dict(state["runner"])
    except _MISMATCH_ERRORS as error:
        raise unusable(path, f"its state isn't this workload's ({type(error).__name__}: {error})") from error


def _made_for(plan: Plan) -> dict[str, str]:
    """Return what must be the same to resume from a checkpoint.

    Versions, the micro-batch and the number of ranks may change.
    """
    parts = {name: plan.provenance.fingerprint[name] for name in ("model", "optimizer")}
    return parts | {"target batch": str(plan.target_batch)}


@contextmanager
def _interrupts(progress: Callable[[dict[str, Any]], None]) -> Iterator[Callable[[], int | None]]:
    """Stop at the window's end after a signal, immediately after a second.

    Yields a function that returns the first signal's number.
    """

    def handle(number: int, frame: object) -> None:
        if not interrupts.is_repeated(number) and interrupts.received_more_than_one():
            raise interrupts.Interrupted(number)

    with interrupts.handled_by(handle):
        progress({FINISHES: True})
        yield interrupts.received
