"""Train a small classifier on 784 inputs with an effective batch of 128."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import fit_plan, windows

torch.manual_seed(0)
data = TensorDataset(torch.randn(1_050, 784), torch.randint(10, (1_050,)))
model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loader = DataLoader(data, batch_size=32, shuffle=True)

for window in windows(loader, fit_plan(model, data[:8], target_batch=128, optimizer=optimizer)):
    for micro in window:
        window.backward(criterion(model(micro.batch[0]), micro.batch[1]))
    window.step(optimizer)
print(f"loss {criterion(model(data[:][0]), data[:][1]).item():.3f}")
