"""Train a model that FSDP2 shards over the ranks that torchrun starts, with an effective batch of 512.

torchrun --nproc-per-node 2 examples/fsdp/train.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import Runner, Workload, fit_plan

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.manual_seed(0)
data = TensorDataset(torch.randn(1_200, 784), torch.randint(10, (1_200,)))
model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
for module in (model[0], model):  # each block first, then the whole
    fully_shard(module, mesh=mesh)
loader = DataLoader(data, batch_size=32, shuffle=True)  # the same on all ranks, without a DistributedSampler
work = Workload(model, data[:8], optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), clip_grad_norm=1.0)
plan = fit_plan(work, target_batch=512, max_micro_batch=100)
for result in Runner(work, plan).epoch(loader):
    if dist.get_rank() == 0:
        print(f"step {result.number}: {result.samples} samples, loss {result.loss:.3f}, {result.split} here")
dist.destroy_process_group()
