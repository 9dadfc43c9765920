"""Micro-batches and windows in which nothing counts, and windows that don't add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_cases import mlp
from helpers_train import Capture, cut, distance, gradients, one_thread, vectors  # noqa: F401
from torch import nn

from autoaccum import Workload
from autoaccum.window import step

SIZES = (4, 4, 4)


@pytest.mark.parametrize("sizes", [SIZES, (12,)], ids=str)
def test_the_loss_of_a_window_in_which_nothing_counts_is_zero_and_no_nan(sizes: tuple[int, ...]) -> None:
    x, y = vectors(12)
    context = step.open_context(Workload(mlp().double(), (x, y), optimizer=Capture))
    result = step.train_window(context, list(cut((x, torch.full_like(y, -100)), sizes)), sizes)
    assert float(result.loss) == 0 and not result.stepped


@pytest.mark.parametrize("sizes", [(4, 4), (4, 4, 4, 4)], ids=str)
def test_a_window_whose_sizes_and_pieces_differ_in_number_is_no_window(sizes: tuple[int, ...]) -> None:
    context = step.open_context(Workload(mlp().double(), vectors(12), optimizer=Capture))
    with pytest.raises(ValueError, match="zip"):
        step.train_window(context, list(cut(vectors(12), SIZES)), sizes)


def test_a_pair_that_counts_nothing_in_the_whole_window_is_a_loss_of_zero() -> None:
    x, y = vectors(12)

    def loss(m: nn.Module, b: Any) -> Any:
        return (m(b[0]) ** 2).mean(-1).mul(b[1]).sum(), b[1].sum()

    context = step.open_context(Workload(mlp().double(), (x, y), loss=loss, optimizer=Capture))
    nothing = torch.zeros(12, dtype=x.dtype)
    result = step.train_window(context, list(cut((x, nothing), SIZES)), SIZES)
    assert float(result.loss) == 0 and not result.stepped


def test_a_hand_written_mean_of_nothing_poisons_no_window() -> None:
    batch = {"x": torch.randn(12, 6, dtype=torch.float64), "mask": torch.ones(12)}
    batch["mask"][4:8] = 0

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return ((m(b["x"]) ** 2).mean(-1) * b["mask"]).sum() / b["mask"].sum()

    model = mlp().double()
    context = step.open_context(Workload(model, batch, loss=loss, count=lambda b: b["mask"].sum(), optimizer=Capture))
    step.train_window(context, list(cut(batch, SIZES)), SIZES)
    assert isinstance(context.optimizer, Capture)
    assert distance(context.optimizer.seen[-1], gradients(model, loss, batch)) < 1e-12
