"""Batches of any form: made by the loader's own collate function, in planning and in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP64,
    Capture,
    Rows,
    distance,
    gradients,
    one_thread,  # noqa: F401
    seen,
)
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from autoaccum import BatchError, Plan, Runner, UsageError, Workload, fit_plan
from autoaccum.data.collated import Collated
from autoaccum.data.sample import with_sample
from autoaccum.exactness.check import check

SAMPLES = 22
ORDER = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5)).tolist()
Batch = Any


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# --- pictures and their boxes, as torchvision's detection models take them


def scene(index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One picture with one to three boxes; sides differ."""
    high, wide, boxes = 3 + index % 3, 4 + index % 2, 1 + index % 3
    target = {"boxes": floats(boxes, 4, seed=index), "labels": torch.arange(boxes) + index % 2}
    return floats(3, high, wide, seed=index), target


class Detector(nn.Module):
    """Boxes and classes of each picture from its mean colour; the losses are means over pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.colour, self.box = nn.Linear(3, 8).double(), nn.Linear(8, 4).double()

    def forward(self, pictures: Sequence[torch.Tensor], targets: Sequence[dict[str, torch.Tensor]]) -> Any:
        hidden = [torch.tanh(self.colour(picture.mean((1, 2)))) for picture in pictures]
        losses = [
            F.l1_loss(self.box(h).expand(len(t["boxes"]), 4), t["boxes"]) for h, t in zip(hidden, targets, strict=True)
        ]
        return {"loss_box": torch.stack(losses).mean()}


def of_scenes(m: nn.Module, b: Batch) -> torch.Tensor:
    losses = m(list(b[0]), b[1])
    return sum(losses.values())  # type: ignore[return-value]


def zipped(items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(zip(*items, strict=True))


# --- DETR of transformers: a tensor of padded pictures beside a list of dictionaries


def as_for_detr(items: Sequence[Any]) -> dict[str, Any]:
    high, wide = (max(item[0].shape[side] for item in items) for side in (1, 2))
    pictures = [F.pad(p, (0, wide - p.shape[2], 0, high - p.shape[1])) for p, _ in items]
    mask = [F.pad(torch.ones(p.shape[1:]), (0, wide - p.shape[2], 0, high - p.shape[1])) for p, _ in items]
    return {
        "pixel_values": torch.stack(pictures),
        "pixel_mask": torch.stack(mask),
        "labels": [target for _, target in items],
    }


class Detr(nn.Module):
    """A mean over all boxes of the batch, as DETR's losses are."""

    def __init__(self) -> None:
        super().__init__()
        self.colour, self.box = nn.Linear(3, 8).double(), nn.Linear(8, 4).double()

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor, labels: Any) -> dict[str, torch.Tensor]:
        mask = pixel_mask[:, None].double()
        colour = (pixel_values * mask).sum((2, 3)) / mask.sum((2, 3))
        boxes = self.box(torch.tanh(self.colour(colour)))
        off = [
            F.l1_loss(b.expand(len(t["boxes"]), 4), t["boxes"], reduction="sum")
            for b, t in zip(boxes, labels, strict=True)
        ]
        return {"loss": torch.stack(off).sum() / sum(len(t["boxes"]) for t in labels)}


def count_boxes(b: Batch) -> int:
    return sum(len(target["boxes"]) for target in b["labels"])


# --- sequences


def spoken(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and a shorter text."""
    frames, text = 6 + index % 4, 1 + index % 3
    return floats(frames, 5, seed=index), torch.randint(1, 4, (text,), generator=generator(index))


def concatenated(items: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """As torch's CTC takes them: all texts behind one another, time first."""
    frames, texts = zip(*items, strict=True)
    lengths = [torch.tensor([len(each) for each in side]) for side in (frames, texts)]
    return (pad_sequence(list(frames)), torch.cat(texts), *lengths)


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 8).double(), nn.Linear(8, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(x))).log_softmax(-1)


def ctc(m: nn.Module, b: Batch) -> torch.Tensor:
    return F.ctc_loss(m(b[0]), b[1], b[2], b[3])


def time_first(items: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Four steps of each sample, time first: as many as some micro-batches have samples."""
    return {"x": torch.stack([x[:4] for x, _ in items], 1), "y": torch.stack([x[:4, 0] for x, _ in items], 1)}


def by_steps(m: nn.Module, b: Batch) -> torch.Tensor:
    return F.mse_loss(m(b["x"]).mean(0)[:, 0], b["y"].mean(0))


def packed(items: Sequence[Any]) -> dict[str, Any]:
    frames, texts = zip(*items, strict=True)
    return {"frames": pack_sequence(list(frames), enforce_sorted=False), "text": torch.stack([t[0] for t in texts])}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.GRU(5, 6).double(), nn.Linear(6, 4).double()

    def forward(self, frames: Any) -> torch.Tensor:
        states, lengths = pad_packed_sequence(self.inner(frames)[0])
        return self.out(states.sum(0) / lengths[:, None].to(states))


def of_texts(m: nn.Module, b: Batch) -> torch.Tensor:
    return F.cross_entropy(m(b["frames"]), b["text"])


# --- what stands beside tensors


@dataclass
class Spoken:
    """A batch with strings and None, of pictures of varying number."""

    frames: torch.Tensor
    owner: torch.Tensor
    names: list[str]
    extra: None = None


def in_a_dataclass(items: Sequence[Any]) -> Spoken:
    frames = torch.cat([x for x, _ in items])
    owner = torch.cat([torch.full((len(x),), index) for index, (x, _) in enumerate(items)])
    return Spoken(frames, owner, [f"sample {len(x)}" for x, _ in items])


def by_owner(m: nn.Module, b: Spoken) -> torch.Tensor:
    outputs = m(b.frames)
    sums = torch.zeros(len(b.names), 4, dtype=outputs.dtype).index_add(0, b.owner, outputs)
    return sums.pow(2).mean()


Case = tuple[Callable[[int], Any], Callable[[Sequence[Any]], Batch], Callable[[], nn.Module], Any, Any]
CASES: dict[str, Case] = {
    "lists of boxes": (scene, zipped, Detector, of_scenes, None),
    "DETR": (scene, as_for_detr, Detr, None, count_boxes),
    "concatenated targets": (spoken, concatenated, Listener, ctc, None),
    "time first": (lambda i: (floats(6, 5, seed=i), 0), time_first, Listener, by_steps, None),
    "packed sequences": (spoken, packed, Recurrent, of_texts, None),
    "a dataclass": (spoken, in_a_dataclass, Listener, by_owner, None),
}


def work_of(name: str, **more: Any) -> Workload:
    sample_of, collate, make, loss, count = CASES[name]
    torch.manual_seed(0)
    data = Rows([sample_of(index) for index in range(SAMPLES)])
    loader = DataLoader(data, batch_size=3, collate_fn=collate, sampler=ORDER)
    how = {"optimizer": partial(Capture, lr=0.05), "loader": loader, "loss": loss, "count": count}
    return Workload(make(), **{**how, **more})


def planned(work: Workload, **how: Any) -> Plan:
    return fit_plan(
        work, **{"target_batch": 10, "max_micro_batch": 4, "budget": "4GiB", "verify": False, "check": False, **how}
    )


def whole(work: Workload, indices: Sequence[int]) -> Batch:
    loader: Any = work.loader
    return loader.collate_fn([loader.dataset[index] for index in indices])


def loss_of(work: Workload) -> Callable[[nn.Module, Any], Any]:
    return work.loss or (lambda m, b: m(**b)["loss"])


@pytest.mark.parametrize("name", CASES)
def test_windows_have_the_gradient_of_the_whole_collated_batch(name: str) -> None:
    work = work_of(name)
    plan = planned(work)
    assert plan.split == (4, 3, 3)
    runner = Runner(work, plan)
    twin = copy.deepcopy(work.model)
    results = list(runner.epoch(work.loader))  # type: ignore[arg-type]
    assert [result.split for result in results] == [(4, 3, 3), (4, 3, 3), (2,)]
    for start, got in zip((0, 10, 20), seen(runner), strict=True):
        want = gradients(twin, loss_of(work), whole(work, ORDER[start : start + 10]))
        assert distance(got, want) < FP64
        with torch.no_grad():
            for p, g in zip(twin.parameters(), want, strict=True):
                p.sub_(g, alpha=0.05)


@pytest.mark.parametrize("name", CASES)
def test_the_test_of_exactness_collates_its_parts(name: str) -> None:
    work, _ = with_sample(work_of(name))
    assert isinstance(work.sample, Collated)
    verdict = check(work, isolated=False)
    assert verdict.exact, verdict
    assert verdict.samples == 8
    if name == "DETR":
        assert check(replace(work, count=None), isolated=False).kind == "wrong denominator"


@pytest.mark.parametrize("name", ["lists of boxes", pytest.param("time first", marks=pytest.mark.slow)])
def test_out_of_memory_loads_smaller_micro_batches_of_the_same_samples(name: str) -> None:
    failures = iter([False, True, False, False, True])

    def failing(inner: Any) -> Any:
        def loss(m: nn.Module, b: Any) -> Any:
            out = inner(m, b)
            if torch.is_grad_enabled() and next(failures, False):
                raise torch.OutOfMemoryError("out of memory")
            return out

        return loss

    work = work_of(name)
    plan = planned(work)
    model = copy.deepcopy(work.model)
    runner = Runner(work, plan)
    inner = runner.context.loss
    runner.context.loss = failing(inner)
    first = next(iter(runner.epoch(work.loader)))  # type: ignore[arg-type]
    assert first.retries == 2 and max(first.split) < 4 and sum(first.split) == 10
    assert distance(seen(runner)[0], gradients(model, inner, whole(work, ORDER[:10]))) < FP64


def test_what_cannot_be_collated_is_refused_in_words() -> None:
    work = work_of("lists of boxes")
    runner = Runner(work, planned(work))
    with pytest.raises(BatchError, match=r"Runner\.epoch"):
        runner.step(whole(work, range(4)))
    with pytest.raises(UsageError, match="isn't map-style"):
        list(runner.epoch([whole(work, range(4))]))
    large = Rows([(picture.repeat(1, 9, 9), target) for picture, target in map(scene, range(6))])
    with pytest.raises(BatchError, match="largest=index"):
        list(runner.epoch(DataLoader(large, batch_size=2, collate_fn=zipped)))


def test_the_largest_sample_is_planned_for() -> None:
    data = Rows([scene(index) for index in range(20)] + [(floats(3, 30, 30, seed=1), scene(1)[1])] + [scene(2)])
    loader = DataLoader(data, batch_size=2, collate_fn=zipped)
    work = replace(work_of("lists of boxes"), loader=loader)
    with pytest.raises(BatchError, match="largest=index"):
        list(Runner(work, planned(work)).epoch(loader))
    work = replace(work, largest=20)
    assert sum(result.samples for result in Runner(work, planned(work)).epoch(loader)) == SAMPLES


def test_a_sample_that_cannot_be_cut_gives_way_to_the_dataset() -> None:
    work = work_of("concatenated targets")
    given = replace(work, sample=whole(work, range(3)))
    assert isinstance(with_sample(given)[0].sample, Collated)
    plain = Workload(nn.Linear(6, 3).double(), loader=DataLoader(Rows([(floats(6, seed=i), i % 3) for i in range(9)])))
    found, text = with_sample(plain)
    assert isinstance(found.sample, list) and found.sample[0].shape == (8, 6) and text.startswith("8 samples")


@pytest.mark.slow
def test_planning_verifies_collated_windows() -> None:
    work = work_of("packed sequences")
    plan = planned(work, verify=True, check=True, timing_seconds=0)
    assert plan.verified and plan.exactness == "exact (tested on 8 samples)"
    assert "by its collate_fn" in " ".join(plan.notes)


def test_graphs_of_torch_geometric() -> None:
    geometric = pytest.importorskip("torch_geometric")
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    def graph(index: int) -> Any:
        nodes = 4 + index % 5
        edges = torch.randint(nodes, (2, 2 * nodes), generator=generator(index))
        return geometric.data.Data(x=floats(nodes, 6, seed=index), edge_index=edges, y=torch.tensor([index % 3]))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = GCNConv(6, 8), nn.Linear(8, 3)

        def forward(self, data: Any) -> torch.Tensor:
            hidden = torch.tanh(self.conv(data.x, data.edge_index))
            return self.out(global_mean_pool(hidden, data.batch))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, graphs = Net().double(), [graph(index) for index in range(12)]
    loader = GraphLoader(graphs, batch_size=4)

    def loss(m: nn.Module, data: Any) -> torch.Tensor:
        return F.cross_entropy(m(data), data.y)

    work = Workload(model, loss=loss, loader=loader, optimizer=Capture)
    plan = planned(work, check=True)
    assert plan.exactness.startswith("exact")
    runner = Runner(work, plan)
    list(runner.epoch(loader))
    batch = geometric.data.Batch.from_data_list(graphs[:10])
    assert distance(seen(runner)[0], gradients(model, loss, batch)) < FP64


@pytest.mark.slow
def test_torchvisions_detection_models() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    class Backbone(nn.Sequential):
        out_channels = 8

    torch.manual_seed(0)
    backbone = Backbone(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU())
    anchors = AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    model = detection.RetinaNet(backbone, 3, anchor_generator=anchors, min_size=32, max_size=48)
    model.head.classification_head.conv = nn.Identity()
    model.head.regression_head.conv = nn.Identity()
    model.head.classification_head.cls_logits = nn.Conv2d(8, 3, 1)
    model.head.regression_head.bbox_reg = nn.Conv2d(8, 4, 1)
    model = model.double()

    def item(index: int) -> Any:
        boxes = torch.tensor([[2.0, 2, 20, 20], [8, 8, 30, 30]][: 1 + index % 2], dtype=torch.float64)
        target = {"boxes": boxes, "labels": torch.tensor([1, 2][: 1 + index % 2])}
        return floats(3, 32, 32 + 4 * (index % 3), seed=index).sigmoid(), target

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return sum(m(list(b[0]), list(b[1])).values())  # type: ignore[return-value]

    loader = DataLoader(Rows([item(index) for index in range(10)]), batch_size=2, collate_fn=zipped)
    work = Workload(model, loss=loss, loader=loader, optimizer=Capture)
    plan = planned(work)
    runner = Runner(work, plan)
    want = gradients(model, loss, zipped([item(index) for index in range(10)]))
    list(runner.epoch(loader))
    assert distance(seen(runner)[0], want) < FP64


class Stream(IterableDataset[Any]):
    """Pictures and their boxes, one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return map(scene, ORDER)


def test_lists_of_a_stream_are_refused_before_anything_is_trained() -> None:
    """Cut by their elements they'd have another form in each micro-batch, and whole batches sum to no exact target."""
    loader = DataLoader(Stream(), batch_size=4, collate_fn=zipped)
    with pytest.raises(BatchError, match="Micro-batches are cut along dimension 0"):
        planned(work_of("lists of boxes", loader=loader))
    named = {"loader": loader, "per_sample": {"batch[0]", "batch[1]"}}
    with pytest.raises(UsageError, match=r"the loader is a DataLoader that isn't map-style") as error:
        planned(work_of("lists of boxes", **named))
    assert "its collate_fn makes each micro-batch" in error.value.hint
