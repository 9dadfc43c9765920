"""transformers' own DETR, with its labels as lists of dictionaries: planned, and trained in windows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers_train import FP64, Capture, Rows, gradients, seen
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("scipy")

from autoaccum import Runner, Workload, fit_plan  # noqa: E402
from autoaccum.data.sample import with_sample  # noqa: E402
from autoaccum.exactness.check import check  # noqa: E402

pytestmark = pytest.mark.slow
PICTURES, SIDE = 12, 64


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    """DETR's loss makes its classes' weights in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def picture(index: int, boxes: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(index)
    places = 0.2 + 0.4 * torch.rand(boxes, 4, generator=g, dtype=torch.float64)
    classes = torch.randint(3, (boxes,), generator=g)
    return torch.randn(3, SIDE, SIDE, generator=g, dtype=torch.float64), {"class_labels": classes, "boxes": places}


def collate(items: list[Any]) -> dict[str, Any]:
    pictures, labels = zip(*items, strict=True)
    mask = torch.ones(len(items), SIDE, SIDE, dtype=torch.long)
    return {"pixel_values": torch.stack(pictures), "pixel_mask": mask, "labels": list(labels)}


def detr() -> Any:
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=5, num_labels=3, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config).double()


def work_of(boxes: Any) -> Workload:
    data = Rows([picture(index, boxes(index)) for index in range(PICTURES)])
    loader = DataLoader(data, batch_size=3, collate_fn=collate, shuffle=False)
    return Workload(detr(), loader=loader, optimizer=partial(Capture, lr=0.05))


def test_windows_have_the_gradient_of_one_batch_of_pictures_and_their_boxes() -> None:
    work = work_of(lambda index: 2)
    plan = fit_plan(work, target_batch=8, max_micro_batch=3, budget="6GiB", verify=False)
    assert plan.split == (3, 3, 2) and plan.exactness.startswith("exact")
    runner, twin = Runner(work, plan), copy.deepcopy(work.model)
    results = list(runner.epoch(work.loader))  # type: ignore[arg-type]
    assert [result.split for result in results] == [(3, 3, 2), (2, 2)]
    loader: Any = work.loader
    want = gradients(twin, lambda m, b: m(**b).loss, collate([loader.dataset[index] for index in range(8)]))
    got, whole = (torch.cat([each.flatten() for each in found]) for found in (seen(runner)[0], want))
    assert (got - whole).norm() / whole.norm() < FP64  # of all at once: some tensors' own are rounding alone, of 1e-22


def test_pictures_of_unlike_numbers_of_boxes_are_found_to_be_inexact() -> None:
    """Classes are averaged over all queries by weight, boxes over boxes: no one count is right for both."""
    work, _ = with_sample(work_of(lambda index: 1 + index % 3))
    verdict = check(work, isolated=False)
    assert not verdict.exact and verdict.words.startswith("not exact")
