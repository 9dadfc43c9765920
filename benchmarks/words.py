"""Time control words over many ranks: `python -m benchmarks.words --most 32`.

A word is an all-reduce of 17 float64 on a gloo group. gloo's goes around a ring: 2 (W - 1) messages one after the
other; a two-level word (all-reduce in groups of 8, among their firsts, and a broadcast back) and a tree need fewer.
Processes on this machine are measured as far as they go; the time of a message is fitted to the smaller ones of these,
held to the largest, and taken from a data sheet for networks. All ranks share this machine's cores, so its messages
wait for a core, which those of a cluster don't: its figures are upper bounds of a word's own work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

NODE = 8  # ranks of a node
WARM, WORDS, NUMBERS = 5, 40, 17
WORLDS = (64, 128, 256, 512, 1024)
# One message's latency. TCP on a data center's Ethernet: 25 us one way is a usual figure between hosts of one cluster
# (a ping of 50 us); within a host, what was fitted here counts.
NETWORK_SECONDS = 25e-6


def ring_messages(ranks: int) -> int:
    """Return the messages one after the other of gloo's all-reduce."""
    return 2 * (ranks - 1)


def two_level_messages(ranks: int) -> int:
    """Return those of a word in groups of a node."""
    inner, outer = min(NODE, ranks), -(-ranks // NODE)
    return ring_messages(inner) + (ring_messages(outer) if outer > 1 else 0) + math.ceil(math.log2(inner))


def tree_messages(ranks: int) -> int:
    """Return those of a binary tree, up and down, as NCCL's."""
    return 2 * math.ceil(math.log2(ranks))


def _measured(rank: int, ranks: int, folder: str, two_level: bool) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks, timeout=limit)
    say = _two_level(rank, ranks) if two_level else (lambda word: dist.all_reduce(word))
    taken = []
    for number in range(WARM + WORDS):
        word = torch.ones(NUMBERS, dtype=torch.float64)
        started = time.perf_counter()
        say(word)
        taken.append(time.perf_counter() - started)
        assert word[0] == ranks, word[0]
        if number == WARM:
            dist.barrier()
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(taken[WARM:]))
    dist.barrier()
    dist.destroy_process_group()


def _two_level(rank: int, ranks: int) -> Callable[[torch.Tensor], None]:
    firsts = list(range(0, ranks, NODE))
    groups = [dist.new_group(list(range(first, min(ranks, first + NODE)))) for first in firsts]
    among = dist.new_group(firsts) if len(firsts) > 1 else None
    mine, own_first = groups[rank // NODE], rank // NODE * NODE

    def say(word: torch.Tensor) -> None:
        dist.all_reduce(word, group=mine)
        if among is not None:
            if rank == own_first:
                dist.all_reduce(word, group=among)
            dist.broadcast(word, own_first, group=mine)

    return say


def measure(ranks: int, *, two_level: bool) -> tuple[float, float]:
    """Return a word's median and 95th percentile in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_measured, args=(rank, ranks, folder, two_level), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{ranks} ranks: a process ended with {[process.exitcode for process in processes]}")
        seconds = json.loads(Path(folder, "seconds").read_text())
    return statistics.median(seconds), sorted(seconds)[int(0.95 * len(seconds))]


def main() -> None:
    """Print what was measured, and what follows for more ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--most", type=int, default=16, help="Processes here.")
    most = parser.parse_args().most
    worlds = [ranks for ranks in (2, 4, 8, 16, 32, 64, 128) if ranks <= most]
    found = {}
    print("| ranks | ring, ms (p95) | messages | ms each | two-level, ms (p95) | messages |\n|---|---|---|---|---|---|")
    for ranks in worlds:
        ring, two = measure(ranks, two_level=False), measure(ranks, two_level=True)
        found[ranks] = ring[0]
        each = ring[0] / ring_messages(ranks)
        print(
            f"| {ranks} | {1e3 * ring[0]:.2f} ({1e3 * ring[1]:.2f}) | {ring_messages(ranks)} | {1e3 * each:.3f} "
            f"| {1e3 * two[0]:.2f} ({1e3 * two[1]:.2f}) | {two_level_messages(ranks)} |"
        )
        sys.stdout.flush()
    fitted = worlds[:-1] or worlds
    message = statistics.median(found[ranks] / ring_messages(ranks) for ranks in fitted)
    held = message * ring_messages(worlds[-1])
    print(
        f"\na message here: {1e3 * message:.3f} ms, fitted to {', '.join(map(str, fitted))} ranks; {worlds[-1]} ranks: "
        f"{1e3 * held:.2f} ms by it, {1e3 * found[worlds[-1]]:.2f} measured ({held / found[worlds[-1]] - 1:+.0%})\n"
    )
    print("| ranks | ring, ms a window | two-level | tree |\n|---|---|---|---|")
    for ranks in WORLDS:  # two words a window
        row = (2e3 * NETWORK_SECONDS * count(ranks) for count in (ring_messages, two_level_messages, tree_messages))
        print(f"| {ranks} | " + " | ".join(f"{each:.2f}" for each in row) + " |")


if __name__ == "__main__":
    main()
