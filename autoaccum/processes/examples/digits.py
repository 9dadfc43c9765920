"""A convolutional net with BatchNorm on scikit-learn's handwritten digits.

1,797 images of 8 x 8.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ...errors import UsageError
from ...workload import Workload

SEED = 1


def workload() -> Workload:
    """Make the workload: images at four times their size, cross-entropy, SGD."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "The digits workload needs scikit-learn, which is not installed.",
            hint="python -m pip install 'autoaccum[digits]'",
        ) from None
    torch.manual_seed(SEED)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(nn.functional.interpolate(images, scale_factor=4), torch.tensor(digits.target))
    return Workload(
        nn.Sequential(
            *_layer(1, 32), *_layer(32, 64), nn.MaxPool2d(2), *_layer(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(128, 10),
        ),
        data[:8],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        loader=lambda: DataLoader(data, batch_size=64, shuffle=True),
        name="digits",
    )  # fmt: skip


def _layer(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
