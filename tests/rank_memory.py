"""A rank of two that runs out of memory for real, on a virtual GPU: what it and the other one did, as JSON.

autoaccum virtual-gpu --memory 4GiB --devices 2 --copies all -- torchrun --nproc-per-node 2 tests/rank_memory.py FOLDER

After planning, a neighbour takes most of rank 1's device. Kernels compute nothing here; copies, and so sums over ranks,
are real ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from autoaccum import Runner, Workload, fit_plan
from autoaccum.devices.virtual import control

WIDTH, SHARES, WINDOWS = 2048, (65_536, 32_768), 3
NEIGHBOUR_BYTES = 3050 << 20


def network() -> nn.Module:
    """Make 16.8 million parameters."""
    torch.manual_seed(0)
    layers = (layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    return nn.Sequential(nn.Linear(16, WIDTH), *layers, nn.Linear(WIDTH, 4))


def main(folder: str) -> None:
    """Plan, take memory away, and train."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    model = network().cuda()
    features, classes = torch.ones(SHARES[rank], 16), torch.zeros(SHARES[rank], dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())
    work = Workload(model, (features[:8], classes[:8]), optimizer=optimizer)
    plan = fit_plan(work, target_batch=sum(SHARES), shares=SHARES, check=False, verify=False)
    runner = Runner(work, plan, timeout_seconds=60)
    if rank == 1:
        control.set_other(1, NEIGHBOUR_BYTES)
    gradients: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.reshape(-1)[:4096].cpu() for p in model.parameters()]))
    )
    torch.cuda.reset_peak_memory_stats()
    results, seconds = [], []
    for _ in range(WINDOWS):
        begun = time.monotonic()
        results.append(runner.step((features, classes)))
        seconds.append(round(time.monotonic() - begun, 2))
    values = torch.cat([p.detach().reshape(-1).cpu() for p in model.parameters()])
    same = []
    for mine in (values, *gradients):
        first = mine.clone()
        dist.broadcast(first, 0)
        same.append(torch.equal(first, mine))
    found = {
        "planned": plan.split, "splits": [each.split for each in results], "same": same, "seconds": seconds,
        "retries": [each.retries for each in results], "ranks_retried": [each.ranks_retried for each in results],
        "samples": [each.samples for each in results], "failures": control.stats(rank).failures,
        "predicted": plan.predicted_peak_bytes, "reserved": torch.cuda.max_memory_reserved(),
    }  # fmt: skip
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
