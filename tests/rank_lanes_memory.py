"""Lanes of two ranks on virtual GPUs: what each planned, and what it reserved, as JSON.

autoaccum virtual-gpu --memory 4GiB --devices 2 --copies all -- torchrun --nproc-per-node 2 \\
    tests/rank_lanes_memory.py FOLDER norms|rows

The first rank's share takes several lanes, the second one's fits in one. After some windows a neighbour takes most of
what the first one has left. Kernels compute nothing here; copies, and so what passes between ranks, are real ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_lanes_cuda import PIXELS, workload
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import autoaccum
from autoaccum import Runner, Workload, fit_plan
from autoaccum.devices.virtual import control

SHARES, WINDOWS, BUDGET = (128, 24), 3, "768MiB"
ROWS = 8  # of these: a contrastive loss over so many times as many samples


def normalized(rank: int) -> tuple[Workload, Any]:
    """Make images for a net with synchronized normalizations."""
    work = workload()
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(work.model), device_ids=[rank])
    batch = torch.ones(SHARES[rank], 3, PIXELS, PIXELS), torch.zeros(SHARES[rank], dtype=torch.long)
    return Workload(model, work.sample, optimizer=work.optimizer, batchnorm="exact"), batch


def contrastive(rank: int) -> tuple[Workload, Any]:
    """Make vectors for a loss over the rows of all ranks."""
    wide = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.Tanh())]
    model = nn.Sequential(nn.Linear(16, 1024), *wide, nn.Linear(1024, 64)).cuda()
    batch = torch.ones(ROWS * SHARES[rank], 16)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        rows = autoaccum.gather_window(model(batch))
        return nn.functional.cross_entropy(rows @ rows.T, torch.arange(len(rows), device=rows.device))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Workload(model, batch[:8], loss=loss, optimizer=optimizer, batch_interactions="exact"), batch


def main(folder: str, what: str) -> None:
    """Plan, train, and say what was reserved."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    work, batch = (normalized if what == "norms" else contrastive)(rank)
    shares = SHARES if what == "norms" else tuple(ROWS * share for share in SHARES)
    plan = fit_plan(
        work,
        target_batch=sum(shares),
        shares=shares,
        check=False,
        budget=(BUDGET if what == "norms" else "640MiB"),
        headroom=0,
    )
    runner = Runner(work, plan, timeout_seconds=60)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    results = [runner.step(batch) for _ in range(WINDOWS)]
    failures, reserved = control.stats(rank).failures, torch.cuda.max_memory_reserved()
    dist.barrier()
    if rank == 0 and what == "norms":
        torch.cuda.empty_cache()
        needed = reserved - torch.cuda.memory_reserved()
        control.set_other(0, torch.cuda.mem_get_info()[0] - needed * 3 // 5)
    short = [runner.step(batch) for _ in range(WINDOWS if what == "norms" else 0)]
    found = {
        "planned": plan.split, "splits": [each.split for each in results], "method": plan.method,
        "retries": [each.retries for each in results], "samples": [each.samples for each in results],
        "failures": failures, "predicted": plan.predicted_peak_bytes, "reserved": reserved, "notes": plan.notes,
        "short": [each.split for each in short], "short_retries": [each.retries for each in short],
        "short_retried": [each.ranks_retried for each in short], "short_samples": [each.samples for each in short],
    }  # fmt: skip
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
