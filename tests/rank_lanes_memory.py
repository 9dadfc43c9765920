"""Lanes of two ranks on virtual GPUs: what each planned, and what it reserved, as JSON.

autoaccum virtual-gpu --memory 4GiB --devices 2 --copies all -- torchrun --nproc-per-node 2 \\
    tests/rank_lanes_memory.py FOLDER

The first rank's share takes several lanes, the second one's fits in one. Kernels compute nothing here; copies, and so
what passes between ranks, are real ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_lanes_cuda import PIXELS, workload
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autoaccum import Runner, fit_plan
from autoaccum.devices.virtual import control

SHARES, WINDOWS, BUDGET = (128, 24), 3, "768MiB"


def main(folder: str) -> None:
    """Plan, train, and say what was reserved."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    work = workload()
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(work.model), device_ids=[rank])
    work = type(work)(model, work.sample, optimizer=work.optimizer, batchnorm="exact")
    plan = fit_plan(work, target_batch=sum(SHARES), shares=SHARES, check=False, budget=BUDGET, headroom=0)
    runner = Runner(work, plan, timeout_seconds=60)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = torch.ones(SHARES[rank], 3, PIXELS, PIXELS), torch.zeros(SHARES[rank], dtype=torch.long)
    results = [runner.step(batch) for _ in range(WINDOWS)]
    found = {
        "planned": plan.split, "splits": [each.split for each in results], "method": plan.method,
        "retries": [each.retries for each in results], "samples": [each.samples for each in results],
        "failures": control.stats(rank).failures, "predicted": plan.predicted_peak_bytes,
        "reserved": torch.cuda.max_memory_reserved(), "notes": plan.notes,
    }  # fmt: skip
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
