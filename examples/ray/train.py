"""Train with Ray Train on two workers, of which one gets three times the other's share of an effective batch of 512.

python examples/ray/train.py
"""

import ray.train.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import Runner, Workload, fit_plan


def train_worker(config):
    """Train on each worker: Ray has made the process group, which says how many they are."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(1_200, 784), torch.randint(10, (1_200,)))
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    model = ray.train.torch.prepare_model(model)  # a DistributedDataParallel on this worker's device
    loader = DataLoader(data, batch_size=32, shuffle=True)  # the same on all workers, without prepare_data_loader
    work = Workload(model, data[:8], optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), clip_grad_norm=1.0)
    plan = fit_plan(work, target_batch=512, shares=config["shares"], max_micro_batch=100)
    for result in Runner(work, plan).epoch(loader):
        ray.train.report({"step": result.number, "samples": result.samples, "loss": float(result.loss)})
    rank = ray.train.get_context().get_world_rank()
    print(f"worker {rank}: shares {plan.shares}, {plan.split} here")


if __name__ == "__main__":
    scaling = ray.train.ScalingConfig(num_workers=2, use_gpu=torch.cuda.is_available())
    ray.train.torch.TorchTrainer(train_worker, train_loop_config={"shares": (384, 128)}, scaling_config=scaling).fit()
