"""Train with Accelerate's model and optimizer on the ranks that torchrun starts, with an effective batch of 512.

torchrun --nproc-per-node 2 examples/accelerate/train.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import Runner, Workload, fit_plan

accelerator = Accelerator(cpu=not torch.cuda.is_available())  # it makes the process group
torch.manual_seed(0)
data = TensorDataset(torch.randn(1_200, 784), torch.randint(10, (1_200,)))
model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
loader = DataLoader(data, batch_size=32, shuffle=True)  # the same on all ranks, and not prepared
work = Workload(model, data[:8], optimizer=optimizer, clip_grad_norm=1.0)
plan = fit_plan(work, target_batch=512, shares=(384, 128), max_micro_batch=100)
for result in Runner(work, plan).epoch(loader):
    accelerator.print(f"step {result.number}: {result.samples} samples, loss {result.loss:.3f}")
accelerator.print("shares", plan.shares, "micro-batches", [entry.accumulation_steps for entry in plan.ranks])
accelerator.end_training()
