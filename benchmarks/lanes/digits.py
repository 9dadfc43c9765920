"""Train digits with a batch of 256 in small micro-batches.

One net, one recipe, five ways: the whole batch, plain accumulation, frozen statistics, group normalization, and lanes.
The first, third and fourth don't depend on the micro-batch, and are run with the whole batch.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from autoaccum import Workload
from autoaccum.window.step import open_context, run_between, train_window

from ..tables import Row

BATCH, STEPS, SEEDS, TEST = 256, 30, 3, 500
T_95 = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}  # Student's t by the number of seeds
COLORS = {"whole batch": "#444444", "plain": "#d62728", "frozen": "#9467bd", "GroupNorm": "#2ca02c", "lanes": "#1f77b4"}


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        title: Its name.
        kind: Its color's name.
        batchnorm: The workload's `batchnorm=`.
        micro_batch: Samples in a micro-batch.
        groups: Whether group normalization takes batch normalization's place.
    """

    title: str
    kind: str
    batchnorm: str | None
    micro_batch: int
    groups: bool = False


WAYS = (
    Way("whole batch", "whole batch", None, BATCH),
    *(Way(f"plain, {size}", "plain", "per_micro_batch", size) for size in (8, 4, 2)),
    Way("frozen", "frozen", "frozen", BATCH),
    Way("GroupNorm", "GroupNorm", None, BATCH, groups=True),
    *(Way(f"lanes, {size}", "lanes", "exact", size) for size in (8, 4, 2)),
)


def net(*, groups: bool) -> nn.Module:
    """Make the net: two convolutions with their normalizations, and a linear layer."""

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels) if groups else nn.BatchNorm2d(channels)

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), norm(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, of shape (1797, 1, 8, 8), and their digits."""
    found: Any = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


def train(way: Way, seed: int) -> tuple[list[float], float]:
    """Train once; return each step's loss, and the test accuracy."""
    x, y = data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, rest = order[:TEST], order[TEST:]
    torch.manual_seed(seed)
    model = net(groups=way.groups)
    work = Workload(
        model, (x[:4], y[:4]), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), batchnorm=way.batchnorm
    )
    context = open_context(work)
    draws, losses = torch.Generator().manual_seed(seed + 100), []
    sizes = (way.micro_batch,) * (BATCH // way.micro_batch)
    for _ in range(STEPS):
        chosen = rest[torch.randperm(len(rest), generator=draws)[:BATCH]]
        pieces = list(zip(x[chosen].split(sizes), y[chosen].split(sizes), strict=True))
        losses.append(float(train_window(context, pieces, sizes).loss))
        run_between(context)
    model.eval()
    with torch.no_grad():
        right = (model(x[test]).argmax(1) == y[test]).float().mean()
    return losses, float(right)


def run(picture: str | None = None) -> list[Row]:
    """Train every way with every seed; return a row for each way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, curves, intervals = [], {}, {}
    for way in WAYS:
        runs = [train(way, seed) for seed in range(SEEDS)]
        accuracies = [100 * accuracy for _, accuracy in runs]
        half = T_95[SEEDS] * statistics.stdev(accuracies) / math.sqrt(SEEDS)
        curves[way.title] = [statistics.mean(step) for step in zip(*(losses for losses, _ in runs), strict=True)]
        intervals[way.title] = statistics.mean(accuracies), half
        rows.append(
            {
                "way, micro-batch": way.title,
                "test accuracy, %": f"{statistics.mean(accuracies):.1f} ± {half:.1f}",
                "lowest and highest": f"{min(accuracies):.1f} to {max(accuracies):.1f}",
                "last training loss": f"{curves[way.title][-1]:.3f}",
            }
        )
        print(rows[-1], flush=True)
    torch.set_num_threads(threads)
    if picture:
        Path(picture).write_text(drawn(curves, intervals))
    return rows


def drawn(curves: dict[str, list[float]], intervals: dict[str, tuple[float, float]]) -> str:
    """Draw the training losses and the accuracies, as SVG."""
    kinds = {way.title: way.kind for way in WAYS}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 330" font-family="sans-serif" font-size="12">',
        '<rect width="820" height="330" fill="white"/>',
        f'<text x="60" y="22">training loss of {STEPS} optimizer steps of {BATCH} (mean of {SEEDS} seeds)</text>',
        '<text x="500" y="22">test accuracy, %, with 95 % intervals</text>',
    ]
    top = max(max(curve[2:]) for curve in curves.values())
    for title, curve in curves.items():
        points = " ".join(
            f"{60 + 380 * step / (STEPS - 1):.1f},{290 - 250 * min(loss, top) / top:.1f}"
            for step, loss in enumerate(curve)
        )
        dashes = "" if title.endswith(" 2") or "," not in title else ' stroke-dasharray="4 3"'
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{COLORS[kinds[title]]}" stroke-width="1.6"{dashes}/>'
        )
    parts += [f'<text x="28" y="{294 - 250 * part:.0f}">{top * part:.1f}</text>' for part in (0, 0.5, 1)]
    low = min(mean - half for mean, half in intervals.values())

    def across(value: float) -> float:
        return 590 + 210 * (value - low) / (100 - low)

    for index, (title, (mean, half)) in enumerate(intervals.items()):
        y, color = 48 + 27 * index, COLORS[kinds[title]]
        parts += [
            f'<text x="500" y="{y + 4}" fill="{color}">{title}</text>',
            f'<line x1="{across(mean - half):.1f}" x2="{across(min(100, mean + half)):.1f}" y1="{y}" y2="{y}" '
            f'stroke="{color}" stroke-width="2"/>',
            f'<circle cx="{across(mean):.1f}" cy="{y}" r="4" fill="{color}"/>',
        ]
    parts += [f'<text x="{across(value) - 10:.0f}" y="310">{value:.0f}</text>' for value in (low, (low + 100) / 2, 100)]
    return "\n".join([*parts, "</svg>"]) + "\n"
