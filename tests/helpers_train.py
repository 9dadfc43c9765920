"""What the tests of the step and of the Runner share: models, data, gradients to compare, real plans."""

from __future__ import annotations

import copy
import functools
import logging
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plan_fields import changed_plan
from torch import nn
from torch.utils.data import Dataset

from autoaccum import Plan, Runner, Workload, fit_plan
from autoaccum.simulation.solver import split_within
from autoaccum.window.fingerprint import fingerprint, signature
from autoaccum.window.step import open_context

FP64, FP32 = 1e-12, 1e-5  # relative L2 of a gradient against one whole batch's
NAIVE = 0.05  # what the usual mistakes differ by at least, in the cases chosen here
IGNORED = -100

Gradients = list[torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other over 16 samples take most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drained(seen: queue.SimpleQueue[Any]) -> list[Any]:
    """What a loss has put into a queue: a list that it holds is put back, as all of the user's state is."""
    return [seen.get() for _ in range(seen.qsize())]


class Capture(torch.optim.Optimizer):
    """Plain SGD that keeps a copy of every gradient it is given."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})
        self.seen: list[Gradients] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        assert all(p.grad is not None for p in params)
        self.seen.append([p.grad.clone() for p in params])
        for p in params:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class Another(Capture):
    """The same under another name."""


def mlp(dtype: torch.dtype = torch.float64, width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)).to(
        dtype
    )


def vectors(n: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples that differ much from one another, so that a wrong weight shows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64) * torch.linspace(0.2, 3, n)[:, None]
    return x.to(dtype), torch.randint(5, (n,), generator=g)


class Tagger(nn.Module):
    """Classes for every token; what it gives at a token depends on all the unmasked tokens of its sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.out = nn.Linear(8, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = (ids > 0).to(self.out.weight.dtype)[..., None]
        h = torch.tanh(self.inner(self.embedding(ids)))
        mean = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.out(h + mean)


def tagger(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Tagger().to(dtype)


CLASS_WEIGHTS = torch.linspace(0.1, 10, 7, dtype=torch.float64)


def token_sum(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = model(batch["ids"]), batch["labels"]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def weighted_sum(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = model(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
    weights = CLASS_WEIGHTS.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="sum")
    return total, weights[labels[labels != IGNORED]].sum()


def token_count(batch: dict[str, Any]) -> torch.Tensor:
    return (batch["labels"] != IGNORED).sum()


def weighted_count(batch: dict[str, Any]) -> torch.Tensor:
    labels = batch["labels"]
    return CLASS_WEIGHTS[labels[labels != IGNORED]].sum()


def sequence(length: int, seed: int) -> dict[str, torch.Tensor]:
    """One sample; its label's class leans on the seed, so that classes come unevenly."""
    g = torch.Generator().manual_seed(seed)
    labels = (torch.randint(3, (length,), generator=g) + seed // 2) % 7
    return {"ids": torch.randint(1, 11, (length,), generator=g), "labels": labels}


def pad(samples: Sequence[dict[str, torch.Tensor]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Pads samples to the longest, or to a length: ids with 0, labels with what is ignored."""
    longest = length or max(len(sample["ids"]) for sample in samples)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.stack([F.pad(sample[key], (0, longest - len(sample[key])), value=value) for sample in samples])

    return {"ids": padded("ids", 0), "labels": padded("labels", IGNORED)}


class Rows(Dataset[Any]):
    """A list of samples as a map-style dataset."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def gradients(model: nn.Module, loss: Callable[[nn.Module, Any], Any], batch: Any) -> Gradients:
    """The gradient of one whole batch by plain autograd, on a copy of the model."""
    twin = copy.deepcopy(model)
    out = loss(twin, batch)
    (out[0] / out[1] if isinstance(out, tuple) else out).backward()
    return [p.grad for p in twin.parameters() if p.grad is not None]


def mean_of(context: Sequence[Gradients], weights: Sequence[float] | None = None) -> Gradients:
    """The weighted sum of gradients; the plain mean where no weights are given: the usual mistake."""
    factors = weights or [1 / len(context)] * len(context)
    return [sum(w * g for w, g in zip(factors, column, strict=True)) for column in zip(*context, strict=True)]


def distance(got: Gradients, want: Gradients) -> float:
    """The larger of the relative L2 distance of the flat gradients and that of the worst tensor."""
    assert len(got) == len(want) > 0

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        value = float((a.double() - b.double()).norm() / b.double().norm())
        return value if value == value else float("inf")

    flat = relative(*(torch.cat([g.flatten() for g in side]) for side in (got, want)))
    return max([flat, *(relative(a, b) for a, b in zip(got, want, strict=True) if b.norm() > 0)])


@functools.cache
def base_plan() -> Plan:
    """A real plan, made once; `plan_for` makes others of it."""
    work = Workload(mlp(), vectors(4))
    return fit_plan(work, target_batch=64, budget="4GiB", verify=False)


def split_otherwise(plan: Plan, target: int, micro_batch: int) -> Plan:
    """The same plan for another target, as though only micro-batches of that size fitted."""
    split = split_within(target, micro_batch)
    steps = len(split)
    return changed_plan(plan, target_batch=target, micro_batch=split[0], accumulation_steps=steps, split=split)


def plan_for(work: Workload, target: int, micro_batch: int) -> Plan:
    """A plan for a workload as though only micro-batches of that size fitted."""
    changes = {
        "signature": signature(work.sample),
        "fingerprint": fingerprint(open_context(replace(work, scheduler=None))),
    }
    return changed_plan(split_otherwise(base_plan(), target, micro_batch), **changes)


def runner_for(work: Workload, target: int, micro_batch: int) -> Runner:
    runner = Runner(work, plan_for(work, target, micro_batch))
    runner.micro_batch = micro_batch
    return runner


def seen(runner: Runner) -> list[Gradients]:
    """The gradients that each optimizer step was given."""
    optimizer = runner.context.optimizer
    assert isinstance(optimizer, Capture)
    return optimizer.seen


def cut(batch: Any, sizes: Sequence[int]) -> Iterator[Any]:
    """The batch in pieces, by plain slicing: independent of the code under test."""
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        yield {k: v[rows] for k, v in batch.items()} if isinstance(batch, dict) else tuple(v[rows] for v in batch)
        start += size


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def recoveries(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said about running out of memory."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and "ut of memory" in record.getMessage()
    ]
