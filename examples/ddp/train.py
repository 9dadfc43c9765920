"""Train a classifier with an effective batch of 512 on the ranks that torchrun starts, which may be unlike each other.

torchrun --nproc-per-node 2 examples/ddp/train.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import Runner, Workload, fit_plan

dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
data = TensorDataset(torch.randn(1_200, 784), torch.randint(10, (1_200,)))
model = DistributedDataParallel(nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)).to(device))
loader = DataLoader(data, batch_size=32, shuffle=True)  # the same on all ranks, without a DistributedSampler
work = Workload(model, data[:8], optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), clip_grad_norm=1.0)
plan = fit_plan(work, target_batch=512, shares=(384, 128), max_micro_batch=(100, 50)[dist.get_rank()])
for result in Runner(work, plan).epoch(loader):
    if dist.get_rank() == 0:
        print(f"step {result.number}: {result.samples} samples, loss {result.loss:.3f}, {len(result.split)} here")
if dist.get_rank() == 0:
    print("shares", plan.shares, "micro-batches", [entry.accumulation_steps for entry in plan.ranks])
dist.destroy_process_group()
