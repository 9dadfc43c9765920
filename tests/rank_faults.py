"""A seeded schedule of faults over the windows of a group, and what must come of it (tests/test_rank_faults.py)."""

from __future__ import annotations

import copy
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers_train import Capture, Rows, distance, gradients, mlp, tagger, token_sum, vectors
from rank_cases import TIMEOUT, ddp, is_equal_everywhere, plan, rows, said_by, tokens
from rank_groups import plan_of_ranks
from torch import nn
from torch.utils.data import DataLoader

from autoaccum import Runner, Workload
from autoaccum.ranks import reduction, words
from autoaccum.ranks.shares import slice_of
from autoaccum.runner.loop import train
from autoaccum.simulation.solver import split_within
from autoaccum.workload import default_loss

WINDOWS = 3
PLACES = ("forward", "backward", "last backward", "reduction")  # private to the rank that runs out of memory
ENDS = ("never fits", "optimizer", "loss")  # end all ranks


@dataclass
class Fault:
    """What goes wrong on this rank, in one window."""

    window: int
    place: str
    pass_: int
    times: int


class Boom(torch.autograd.Function):
    """Runs out of memory in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (injected)")


class Faults:
    """Injects a rank's faults, by hooks of the model and the optimizer."""

    def __init__(self, model: nn.Module, faults: list[Fault]) -> None:
        self.faults, self.window, self.passes, self.micro_batches = faults, 0, 0, 1
        list(model.modules())[-1].register_forward_hook(self._forward)

    def begin(self, window: int, micro_batches: int) -> None:
        self.window, self.passes, self.micro_batches = window, 0, micro_batches

    def _due(self, *places: str) -> Fault | None:
        found = [f for f in self.faults if f.window == self.window and f.times and f.place in places]
        return found[0] if found else None

    def _forward(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return out  # counting
        fault = self._due(*PLACES, *ENDS)
        number, self.passes = self.passes, self.passes + 1
        if fault is None or fault.place in ("reduction", "optimizer"):
            return out
        if fault.place == "loss":
            raise ValueError("a mistake of the loss (injected)")
        at = self.micro_batches - 1 if fault.place == "last backward" else fault.pass_ % self.micro_batches
        if fault.place != "never fits" and number != at:
            return out
        fault.times, self.passes = fault.times - 1, 0
        self.micro_batches += 1  # it starts over in smaller ones; at least one more
        if "backward" in fault.place:
            return Boom.apply(out)  # type: ignore[no-any-return, no-untyped-call]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (injected)")

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Run out of memory between the last backward and the word after it."""
        prepare = reduction.Reduction.prepare

        def failing(own: Any, wide: Any) -> None:
            fault = self._due("reduction")
            if fault is not None:
                fault.times, self.passes = fault.times - 1, 0
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            prepare(own, wide)

        reduction.Reduction.prepare = failing  # type: ignore[method-assign]
        try:
            yield
        finally:
            reduction.Reduction.prepare = prepare  # type: ignore[method-assign]


class Stepping(Capture):
    """SGD that keeps gradients, and runs out of memory where it is asked to."""

    faults: Faults

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.faults._due("optimizer") is not None:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        super().step(closure)


def schedule(seed: int, world: int) -> tuple[Any, ...]:
    """Kind of model, shares, micro-batches, and each rank's faults; the same on all ranks."""
    draw = random.Random(seed)
    shares = [draw.randint(8, 32) for _ in range(world)]
    splits = [split_within(share, draw.randint(-(-share // 4), share)) for share in shares]
    faults: list[list[Fault]] = [[] for _ in range(world)]
    for _ in range(draw.randint(0, 3)):
        fault = Fault(draw.randrange(WINDOWS), draw.choice(PLACES), draw.randrange(6), draw.randint(1, 2))
        faults[draw.randrange(world)].append(fault)
    if seed % 8 == 7:
        # Not in the last window: a failed optimizer step is said in the word after it, which there is none of.
        faults[draw.randrange(world)] = [Fault(draw.randrange(WINDOWS - 1), draw.choice(ENDS), 0, 999)]
    kind, data = draw.choice(("ddp", "bare")), draw.choice(("tokens", "vectors"))
    return kind, "representations" if seed % 4 == 1 else data, splits, faults


def _views(model: nn.Module, batch: Any) -> Any:
    return model(batch[0]), batch[1]


def _against_all(model: nn.Module, found: Any) -> torch.Tensor:
    """Compare each sample's representation with those of the whole window."""
    views, label = found
    same = (label[:, None] == label).double()
    return -((views @ views.T).log_softmax(1) * same).sum(1).mean()


class Normed(nn.Module):
    """Runs out of memory between two normalizations: its last module is the one in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.other = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.out, self.middle = nn.Linear(8, 5), nn.Linear(8, 8, bias=False)  # whose gradient would be 0
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.other(self.middle(torch.tanh(self.norm(self.first(x))))))
        return out


# Of a number of samples: the model, the batch, the loss, and what else a Workload gets.
CASES: dict[str, Callable[[int], Any]] = {
    "tokens": lambda n: (tagger, tokens(n), token_sum, {}),
    "vectors": lambda n: (mlp, vectors(n), default_loss, {}),
    "representations": lambda n: (mlp, vectors(n), _against_all, {"encode": _views}),
    "lanes": lambda n: (Normed, vectors(n), default_loss, {"batchnorm": "exact"}),
}


def run_schedule(seed: int, rank: int, world: int, case: str = "") -> dict[str, Any]:
    """Train some windows with faults; compare each with one process."""
    kind, data, splits, faults = schedule(seed, world)
    data = case or data
    total = sum(map(sum, splits))
    make, batch, loss, more = CASES[data](total)
    model = make()
    inject = Faults(model, copy.deepcopy(faults[rank]))
    optimizer = Stepping(model.parameters(), lr=0.05)
    optimizer.faults = inject
    wrapped = ddp(model) if kind == "ddp" else model
    work = Workload(wrapped, rows(batch, slice(0, 2)), loss=loss, optimizer=optimizer, **more)
    runner = Runner(work, plan_of_ranks(plan(), work, splits, rank), timeout_seconds=TIMEOUT)
    encode = more.get("encode")
    whole = loss if encode is None else lambda model, batch: loss(model, encode(model, batch))
    runner.checks.rechecked = True
    worst, retries, counted = 0.0, [], []
    with inject.reducing():
        for window in range(WINDOWS):
            twin = make()
            twin.load_state_dict(model.state_dict())
            inject.begin(window, len(runner.sizing.sizes(sum(splits[rank]))))
            try:
                result = runner.step(rows(batch, slice_of(tuple(map(sum, splits)), rank)))
            except Exception as error:
                return {"ended": [type(error).__name__, getattr(error, "rank", None), str(error)[:200]], "worst": worst}
            worst = max(worst, distance(optimizer.seen[-1], gradients(twin, whole, batch)))
            retries.append(result.retries)
            counted.append(result.ranks_retried)
    return {"ended": None, "worst": worst, "equal": is_equal_everywhere(model), "retries": retries, "counted": counted}


def _schedules(numbers: range, rank: int, world: int) -> Any:
    found = []
    for seed in numbers:
        found.append(run_schedule(seed, rank, world))
        if os.environ.get("RANK_TIMES"):
            print(f"[{rank}] of {world}: schedule {seed}: {found[-1]['ended']}", file=sys.stderr, flush=True)
        if seed % 50 == 49:
            gc.collect()
    return found


def schedules_few(rank: int, world: int) -> Any:
    return _schedules(range(8) if world == 2 else range(4, 8), rank, world)


def schedules_200(rank: int, world: int) -> Any:
    return _schedules(range(200), rank, world)


# -- ranks that are gone: each in a group of its own


def _timed(action: Any) -> Any:
    begun = time.monotonic()
    said = said_by(action)
    return {"said": said, "seconds": time.monotonic() - begun}


def _training(rank: int, world: int, timeout: float, at: Any) -> Any:
    """Train until the last rank does something in its third window."""
    model = mlp()
    windows = [0]

    def loss(m: nn.Module, batch: Any) -> torch.Tensor:
        if rank == world - 1 and windows[0] == 2:
            at()
        return default_loss(m, batch)

    work = Workload(
        model, vectors(4), loss=loss, count=lambda b: len(b[0]), optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    splits = [(4, 4)] * world
    runner = Runner(work, plan_of_ranks(plan(), work, splits, rank), timeout_seconds=timeout)

    def run() -> None:
        for _ in range(5):
            runner.step(vectors(8))
            windows[0] += 1

    return _timed(run)


def a_rank_is_killed(rank: int, world: int) -> Any:
    return _training(rank, world, 20.0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def the_first_rank_is_killed(rank: int, world: int) -> Any:
    if rank == 0:
        return _training(world - 1, world, 20.0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return _training(0, world, 20.0, lambda: None)


def a_rank_stops_answering(rank: int, world: int) -> Any:
    return _training(rank, world, 2.0, lambda: time.sleep(6))


def an_optimizer_fails_at_the_very_end(rank: int, world: int) -> Any:
    """Nothing follows its last window: the rank raises soon, and one that steps on all the same learns why."""
    words.ANSWER_SECONDS = 0.5
    model = mlp()
    optimizer = Stepping(model.parameters(), lr=0.05)
    optimizer.faults = Faults(model, [Fault(1, "optimizer", 0, 1)] if rank == 1 else [])
    work = Workload(model, vectors(4), optimizer=optimizer)
    runner = Runner(work, plan_of_ranks(plan(), work, [(4, 4)] * world, rank), timeout_seconds=TIMEOUT)
    runner.step(vectors(8))
    optimizer.faults.begin(1, 2)
    last = _timed(lambda: runner.step(vectors(8)))
    raised = Path(os.environ["RANK_FOLDER"]) / "raised"
    if rank == 1:
        raised.touch()
        return {"last": last}
    until = time.monotonic() + 10
    while not raised.exists() and time.monotonic() < until:  # in a word that this rank doesn't say yet
        time.sleep(0.05)
    return {"last": last, "alone": raised.exists(), "then": _timed(lambda: runner.step(vectors(8)))}


# -- a checkpoint of ranks


class Noisy(nn.Module):
    """Drops out, so that random states matter."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = mlp(), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(self.drop(x))
        return out


def _run(rank: int, splits: Any, checkpoint: str | None, steps: int | None, *, noisy: bool = True) -> Any:
    torch.manual_seed(7 + rank)
    model = Noisy() if noisy else mlp()
    if not noisy:
        model.load_state_dict(mlp().state_dict())
    x, y = vectors(96)
    loader = DataLoader(Rows(list(zip(x, y, strict=True))), 8, shuffle=True)
    work = Workload(model, vectors(4), optimizer=lambda p: torch.optim.AdamW(p, 1e-2), loader=loader)
    made = plan_of_ranks(plan(), work, splits, rank)
    said: list[Any] = []
    result = train(work, made, progress=said.append, epochs=3, steps=steps, checkpoint=checkpoint)
    return model, result


def a_checkpoint_goes_on_bitwise(rank: int, world: int) -> Any:
    """4 of 9 windows, then a new start from the file: the same bits as a run without a break."""
    folder = Path(os.environ["RANK_FOLDER"])
    splits = [(8, 8), (8, 8)] if world == 2 else [(16,), (8,), (8,)]
    whole, ended = _run(rank, splits, None, None)
    file = str(folder / f"check-{world}")
    _, half = _run(rank, splits, file, 4)
    again, rest = _run(rank, splits, file, None)
    same = all(map(torch.equal, whole.parameters(), again.parameters()))
    return {"same": same, "equal": is_equal_everywhere(again), "steps": [half["steps"], rest["steps"], ended["steps"]],
            "samples": [half["samples"], rest["samples"]]}  # fmt: skip


def begun_here(rank: int, world: int) -> Any:
    """Begin a training that another number of ranks goes on with."""
    file = str(Path(os.environ["RANK_FOLDER"]) / "moved")
    _, half = _run(rank, [(8, 8), (8, 8)], file, 4, noisy=False)
    return half["steps"]


def gone_on_with(rank: int, world: int) -> Any:
    """Go on with a training of two ranks on three; its effective batch and its windows stay."""
    file = str(Path(os.environ["RANK_FOLDER"]) / "moved")
    model, rest = _run(rank, [(16,), (8,), (4, 4)], file, None, noisy=False)
    return {"steps": rest["steps"], "samples": rest["samples"], "equal": is_equal_everywhere(model),
            "values": torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()}  # fmt: skip
