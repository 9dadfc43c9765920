"""Fine-tune a tagger with Accelerate; its labels are ragged."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import fit_plan, windows

torch.manual_seed(0)
ids = torch.randint(1, 100, (250, 12))
labels = torch.where(torch.arange(12) < torch.randint(1, 13, (250, 1)), ids % 7, -100)
model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 7))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(TensorDataset(ids, labels), batch_size=16, shuffle=True)
accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)


def criterion(logits, targets):
    """Mean over the labels that aren't ignored."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


for window in windows(loader, fit_plan(model, (ids[:8], labels[:8]), target_batch=64), accelerator=accelerator):
    for micro in window:
        window.backward(criterion(model(micro.batch[0]), micro.batch[1]))
    window.step(optimizer)
print(f"loss {criterion(model(ids), labels).item():.3f}")
