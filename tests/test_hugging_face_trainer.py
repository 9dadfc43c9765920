"""Hugging Face's Trainer in windows: the same training as the plain Trainer's in one big batch, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
from hugging_face_cases import (
    CHEAP,
    KINDS,
    arguments,
    dataset,
    difference,
    losses,
    make,
    trained,
)
from transformers import Trainer

from autoaccum.integrations.transformers import ExactTrainer

TARGET = 10


def in_windows(folder: Path, model: Any, data: Any, **more: Any) -> tuple[Any, Any]:
    args = arguments(folder, per_device_train_batch_size=2, **more.pop("args", {}))
    chosen = {"target_batch": TARGET, "max_micro_batch": 4, **CHEAP, **more}
    return trained(ExactTrainer, model, args, data, **chosen)


def in_one_batch(folder: Path, model: Any, data: Any, **more: Any) -> tuple[Any, Any]:
    args = arguments(folder, per_device_train_batch_size=TARGET, **more.pop("args", {}))
    return trained(Trainer, model, args, data, **more)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama", "bert classes", "bert tokens", "bert regression", "t5", "vit", "opt", "gpt-neox", "mistral"],
)
def test_every_step_has_the_gradient_of_one_big_batch(name: str, tmp_path: Path) -> None:
    """Windows of 10, 10 and the tail of 3, with ragged lengths and labels, in micro-batches of at most 4."""
    data = dataset(KINDS.get(name, "language"))
    plain, expected = in_one_batch(tmp_path, make(name).double(), data)
    ours, found = in_windows(tmp_path, make(name).double(), data)
    assert ours.plan.split == (4, 3, 3)
    assert len(found.gradients) == 3
    assert difference(found, expected) < 1e-12
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)  # the Trainer adds them up in single precision
    again = {p: q for p, q in zip(ours.model.parameters(), plain.model.parameters(), strict=True)}
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-9) for p, q in again.items())
