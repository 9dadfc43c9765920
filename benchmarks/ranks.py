"""Measure words, agreement and windows of ranks against a bare loop.

    python -m benchmarks.ranks [RANKS ...]          1, 2 and 4 by default; gloo, on this machine's CPU

Each number of ranks is a group of processes of one thread. The bare loop reduces in its last backward (no_sync for the
others); both train the same windows of four micro-batches, in turn, and medians of the pairs are printed.
"""

from __future__ import annotations

import datetime
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autoaccum import Runner, Workload, fit_plan
from autoaccum.ranks.group import Place
from autoaccum.ranks.words import Control, Kind

ROUNDS, WORDS = 10, 200
STEPS, MICRO_BATCH, WIDTH = 4, 16, 1024


def network() -> nn.Module:
    """Make 12.6 million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def seconds(action: Callable[[], object]) -> float:
    """Return the time of an action, which all ranks begin together."""
    dist.barrier()
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Compute a mean over samples."""
    return model(batch).square().mean()  # type: ignore[no-any-return]


def measure(rank: int, world: int) -> str:
    """Measure in one rank; return the line of the table."""
    batch = torch.randn(STEPS * MICRO_BATCH, WIDTH)
    bare = DistributedDataParallel(network())
    bare_optimizer = torch.optim.SGD(bare.parameters(), lr=1e-3)
    model = DistributedDataParallel(network())
    work = Workload(model, batch[:4], loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    begun = time.perf_counter()
    limits = {"max_micro_batch": MICRO_BATCH, "budget": "4GiB", "verify": False, "check": False}
    plan = fit_plan(work, target_batch=world * len(batch), shares="equal" if world > 1 else None, **limits)
    planning = time.perf_counter() - begun
    runner = Runner(work, plan)

    def bare_loop() -> None:
        for index, piece in enumerate(batch.split(MICRO_BATCH)):
            with bare.no_sync() if index < STEPS - 1 else nullcontext():
                (loss(bare, piece) / STEPS).backward()
        bare_optimizer.step()
        bare_optimizer.zero_grad()

    pairs = []
    for number in range(ROUNDS + 2):
        actions = [bare_loop, lambda: runner.step(batch)]
        found = {id(action): seconds(action) for action in (actions if number % 2 else actions[::-1])}
        pairs.append([found[id(action)] for action in actions])
    own, theirs = (statistics.median(pair[i] for pair in pairs[2:]) for i in (1, 0))
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs[2:])
    words = _words(rank, world)
    return f"| {world} | {words} | {planning:.1f} s | {1e3 * theirs:.0f} ms | {1e3 * own:.0f} ms | {ratio:.3f} |"


def _words(rank: int, world: int) -> str:
    if world == 1:
        return "- | -"
    control = Control(Place(rank, world), 60)
    taken = sorted(seconds(lambda: control.say(Kind.STATUS, [1.0])) for _ in range(WORDS))
    gathered = statistics.median(seconds(lambda: control.gather({"rank": rank})) for _ in range(20))
    return (
        f"{1e3 * statistics.median(taken):.2f} ms (p95 {1e3 * taken[int(0.95 * WORDS)]:.1f}) | {1e3 * gathered:.1f} ms"
    )


def run(world: int, folder: Path) -> str:
    """Measure in as many processes; return the first rank's line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            limit = datetime.timedelta(seconds=120)
            store = dist.TCPStore("127.0.0.1", port, world, rank == 0, limit)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
            line = measure(rank, world)
            if rank == 0:
                (folder / str(world)).write_text(line)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return (folder / str(world)).read_text()


def main() -> None:
    """Print the table."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print("| ranks | a word | a gather | one plan of all | bare DDP loop | Runner.step | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for world in [int(text) for text in sys.argv[1:]] or [1, 2, 4]:
            print(run(world, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
