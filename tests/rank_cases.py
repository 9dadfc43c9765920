"""Cases of `tests/test_over_ranks.py`, run by every rank of a group (tests/rank_groups.py)."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from helpers_train import (
    Capture,
    Rows,
    distance,
    gradients,
    mlp,
    pad,
    sequence,
    tagger,
    token_count,
    token_sum,
    vectors,
)
from rank_groups import Splits, plan_of_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from autoaccum import Plan, Runner, UsageError, Workload, fit_plan
from autoaccum.data import split as cutting
from autoaccum.ranks import exchange, reduction
from autoaccum.ranks.group import apart
from autoaccum.ranks.shares import slice_of
from autoaccum.window.step import open_context, train_window
from autoaccum.workload import default_loss

UNEVEN: dict[int, Splits] = {
    2: ((8,) * 6, (8, 8)),  # 48 and 16
    3: ((11, 11, 10, 10), (7, 7), (8,)),  # 42, 14 and 8
}
TIMEOUT = 30.0


@cache
def plan() -> Plan:
    return Plan.load(os.environ["RANK_PLAN"])


def runner_for(work: Workload, splits: Splits, rank: int, **kwargs: Any) -> Runner:
    return Runner(work, plan_of_ranks(plan(), work, splits, rank), timeout_seconds=TIMEOUT, **kwargs)


def rows(batch: Any, part: slice) -> Any:
    return {k: v[part] for k, v in batch.items()} if isinstance(batch, dict) else tuple(v[part] for v in batch)


def is_equal_everywhere(model: nn.Module) -> bool:
    """Whether all ranks have the same bits."""
    flat = torch.cat([p.detach().reshape(-1) for p in (*model.parameters(), *model.buffers())])
    first = flat.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, flat)


def ddp(model: nn.Module, **kwargs: Any) -> nn.Module:
    return DistributedDataParallel(model, **kwargs)


def trained(
    rank: int, model: nn.Module, batch: Any, splits: Splits, loss: Any = None, steps: int = 3, **kwargs: Any
) -> dict[str, Any]:
    """Train windows of one batch, each rank with its share; the worst distance from one process with the whole."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    part = slice_of(tuple(map(sum, splits)), rank)
    optimizer = Capture(model.parameters(), lr=0.1)
    work = Workload(model, rows(batch, slice(0, 4)), loss=loss, optimizer=optimizer, **kwargs)
    runner = runner_for(work, splits, rank)
    worst, results = 0.0, []
    for _ in range(steps):
        twin = copy.deepcopy(inner)
        results.append(runner.step(rows(batch, part)))
        worst = max(worst, distance(optimizer.seen[-1], gradients(twin, loss or default_loss, batch)))
        with torch.no_grad():
            out = (loss or default_loss)(twin, batch)
            whole = float(out[0] / out[1] if isinstance(out, tuple) else out)
        worst = max(worst, abs(float(results[-1].loss) / whole - 1))
    assert runner.ranks is not None
    elements = sum(p.numel() for p in inner.parameters())
    return {
        "worst": worst,
        "equal": is_equal_everywhere(inner),
        "reduced": runner.ranks.exchange.reduction.reduced_elements / elements / steps,
        "samples": results[-1].samples,
        "split": results[-1].split,
    }


def tokens(n: int) -> dict[str, torch.Tensor]:
    return pad([sequence(1 + (5 * i + 3) % 9, seed=i) for i in range(n)])


def token_mean(model: nn.Module, batch: Any) -> torch.Tensor:
    total, count = token_sum(model, batch)
    return total / count


# -- exact


def uneven_ddp(rank: int, world: int) -> Any:
    return trained(rank, ddp(mlp()), vectors(64), UNEVEN[world])


def uneven_bare(rank: int, world: int) -> Any:
    """Ranks begin with other parameters; those of the first are everybody's."""
    return trained(rank, mlp(seed=rank), vectors(64), UNEVEN[world])


def uneven_mean_of_samples(rank: int, world: int) -> Any:
    loss = lambda model, batch: (model(batch[0]).square().sum(1) * batch[0][:, 0]).mean()  # noqa: E731
    return trained(rank, ddp(mlp()), vectors(64), UNEVEN[world], loss)


def ragged_tokens(rank: int, world: int) -> Any:
    return trained(rank, ddp(tagger()), tokens(64), UNEVEN[world], token_sum)


def ragged_tokens_counted(rank: int, world: int) -> Any:
    return trained(rank, tagger(), tokens(64), UNEVEN[world], token_mean, count=token_count)


def one_micro_batch_each(rank: int, world: int) -> Any:
    """A loss is asked for its form, and a window counted, also where this rank's is one micro-batch."""
    return trained(rank, tagger(), tokens(9 * world), [(9,)] * world, token_sum)


def a_share_that_is_all_ignored(rank: int, world: int) -> Any:
    batch = tokens(64)
    batch["labels"][slice_of(tuple(map(sum, UNEVEN[world])), 1)] = -100
    return trained(rank, tagger(), batch, UNEVEN[world], token_mean, count=token_count)


def bucket_view_and_unused(rank: int, world: int) -> Any:
    """A parameter that only the first rank's samples reach, and one that none does: it keeps no gradient."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.branch, self.never = mlp(), nn.Linear(5, 5).double(), nn.Linear(5, 5).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.body(x)
            return out + self.branch(out) * (x[:, :1] > 1e3) if bool((x > 1e3).any()) else out

    torch.manual_seed(0)
    model = ddp(Branches(), gradient_as_bucket_view=True, find_unused_parameters=True)
    x, y = vectors(64)
    x[0, 0] = 2e3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, Any] = {}

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.update({n: None if p.grad is None else p.grad.clone() for n, p in model.module.named_parameters()})

    optimizer.register_step_pre_hook(look)
    twin = copy.deepcopy(model.module)
    runner = runner_for(Workload(model, (x[:4], y[:4]), optimizer=optimizer), UNEVEN[world], rank)
    runner.step(rows((x, y), slice_of(tuple(map(sum, UNEVEN[world])), rank)))
    default_loss(twin, (x, y)).backward()
    whole = {n: p.grad for n, p in twin.named_parameters()}
    none = [n for n, gradient in seen.items() if gradient is None]
    reached = [n for n in whole if whole[n] is not None]
    return {
        "none": none,
        "worst": distance([seen[n] for n in reached], [whole[n] for n in reached]),  # type: ignore[misc]
        "equal": is_equal_everywhere(model.module),
    }


def fifty_steps(rank: int, world: int) -> Any:
    """AdamW, clipping and a scheduler: parameters bit-equal, and as one process trains them."""
    batches = [vectors(64, seed=i) for i in range(50)]
    model, twin = mlp(), mlp()
    part = slice_of(tuple(map(sum, UNEVEN[world])), rank)

    def make(m: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)

    optimizer, scheduler = make(model)
    work = Workload(model, batches[0], optimizer=optimizer, scheduler=scheduler, clip_grad_norm=0.1)
    runner = runner_for(work, UNEVEN[world], rank)
    other, other_scheduler = make(twin)
    norms = []
    for batch in batches:
        result = runner.step(rows(batch, part))
        other.zero_grad()
        loss = default_loss(twin, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        assert result.grad_norm is not None
        norms.append(abs(float(result.grad_norm / norm) - 1))
        other.step()
        other_scheduler.step(float(loss.detach()))
    return {
        "equal": is_equal_everywhere(model),
        "worst": distance(list(model.parameters()), list(twin.parameters())),
        "norm": max(norms),
        "rate": optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] < 1e-2,
    }


def one_decision_of_the_scaler(rank: int, world: int) -> Any:
    """An overflow on one rank skips the step on all, and their scales stay alike."""
    model = mlp(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    work = Workload(
        model, vectors(4, torch.float32), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), scaler=scaler,
        clip_grad_norm=1.0,
    )  # fmt: skip
    runner = runner_for(work, UNEVEN[world], rank)
    said = []
    for step in range(6):
        x, y = rows(vectors(64, torch.float32, seed=step), slice_of(tuple(map(sum, UNEVEN[world])), rank))
        if step == 3 and rank == 1:
            x = x * float("inf")
        result = runner.step((x, y))
        said.append([result.stepped, scaler.get_scale()])
    return {"said": said, "equal": is_equal_everywhere(model)}


def bf16_sums_in_fp32(rank: int, world: int) -> Any:
    """Gradients of bf16 parameters are summed over micro-batches and ranks in fp32."""

    def loss(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        return (model(torch.ones(1, 1, dtype=torch.bfloat16)).squeeze() * batch.sum()), 1

    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = Capture(model.parameters())
    splits = [(8, 8, 8), (8,)]
    work = Workload(model, torch.ones(2), loss=loss, optimizer=optimizer)
    runner = runner_for(work, splits, rank)
    # 256 + 1 + 1 here and 2 there, each a fourth of its sum; in bf16 256 + 1 is 256.
    runner.step(torch.tensor([128.0] * 8 + [0.5] * 16) if rank == 0 else torch.ones(8))
    return {"got": float(optimizer.seen[-1][0]), "expected": 260.0}


def batchnorm_takes_the_first_ranks(rank: int, world: int) -> Any:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
    work = Workload(model, vectors(4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batchnorm="per_micro_batch")
    runner = runner_for(work, UNEVEN[world], rank)
    for step in range(2):
        runner.step(rows(vectors(64, seed=step), slice_of(tuple(map(sum, UNEVEN[world])), rank)))
    return {"equal": is_equal_everywhere(model), "moved": float(model[1].running_mean.abs().sum()) > 0}


def normed(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.Tanh(),
        nn.Linear(8, 5),
    ).to(dtype)  # fmt: skip


def twice(model: Any, batch: Any) -> torch.Tensor:
    """Some micro-batches pass a normalization twice: those of one rank."""
    out = model(batch[0])
    if bool((batch[0] > 1e2).any()):
        out = out + model[6](model[1](model[0](-batch[0])))
    return nn.functional.cross_entropy(out, batch[1])


def merged_statistics(rank: int, world: int) -> Any:
    """Running statistics of all ranks, and the gradient of the same micro-batches in one process."""
    found: dict[str, Any] = {}
    far = vectors(64)
    far[0][50, 0] = 1e3
    cases = {"bare": (vectors(64, seed=3), None, False), "twice, ddp": (far, twice, True)}
    for name, (batch, loss, wraps) in cases.items():
        model = normed()
        optimizer = Capture(model.parameters(), lr=0.1)
        wrapped = ddp(model) if wraps else model
        work = Workload(wrapped, rows(batch, slice(0, 4)), loss=loss, optimizer=optimizer, batchnorm="merged")
        runner = runner_for(work, UNEVEN[world], rank)
        worst = 0.0
        for _ in range(2):
            twin = copy.deepcopy(model)
            runner.step(rows(batch, slice_of(tuple(map(sum, UNEVEN[world])), rank)))
            alone = in_one_process(twin, batch, [n for split in UNEVEN[world] for n in split], loss)
            worst = max(worst, distance(optimizer.seen[-1], alone), apart_of(model, twin))
        found[name] = {"worst": worst, "equal": is_equal_everywhere(model), "steps": int(model[1].num_batches_tracked)}
    return found | {"tail": merged_tail(rank, world)}


def merged_tail(rank: int, world: int) -> Any:
    """A window of 64 and one of 2, of which only the first rank has any; the statistics of the whole batches."""
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)).double()
    twin = copy.deepcopy(model)
    batches = [vectors(64), vectors(2, seed=5)]
    work = Workload(model, vectors(4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batchnorm="merged")
    results = list(runner_for(work, UNEVEN[world], rank).epoch(batches))
    for batch in batches:
        default_loss(twin, batch)
    return {
        "worst": apart_of(model, twin), "equal": is_equal_everywhere(model), "steps": int(model[0].num_batches_tracked),
        "samples": [result.samples for result in results],
    }  # fmt: skip


def in_one_process(model: nn.Module, batch: Any, sizes: list[int], loss: Any) -> list[torch.Tensor]:
    """The gradient of the same micro-batches without ranks; the model's statistics are updated."""
    with apart():
        context = open_context(Workload(model, batch, loss=loss, optimizer=Capture, batchnorm="merged"))
        train_window(context, cutting.split(batch, sizes), sizes)
    return context.optimizer.seen[-1]  # type: ignore[attr-defined,no-any-return]


def apart_of(model: nn.Module, twin: nn.Module) -> float:
    """The worst distance of two models' running statistics."""
    pairs = zip(model.buffers(), twin.buffers(), strict=True)
    return max(float((a - b).double().norm() / b.double().norm()) for a, b in pairs)


class Towers(nn.Module):
    """An encoder, with dropout or without, and a temperature that only the loss uses."""

    def __init__(self, p: float, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(p), nn.Linear(16, width), nn.Dropout(p))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.p = p
        self.double()


def two_views(model: Any, batch: Any) -> Any:
    return {"one": model.body(batch[0]), "other": [model.body(batch[0].flip(1)), batch[1]], "name": "views"}


def contrast(model: Any, found: Any) -> torch.Tensor:
    """Each sample against all of the window, of its own class or not; drops out scores itself."""
    one, (other, label) = nn.functional.normalize(found["one"], dim=1), found["other"]
    assert found["name"] == "views"
    scores = nn.functional.dropout(one @ nn.functional.normalize(other, dim=1).T * model.scale.exp(), model.p)
    same = (label[:, None] == label).double()
    return -(scores.log_softmax(1) * same).sum(1).mean()


def representations(rank: int, world: int) -> Any:
    """A loss over the representations of all ranks: dropout on each is its own, the loss's the same on all."""
    found: dict[str, Any] = {}
    for name, p, wraps, fails in (
        ("ddp", 0.0, True, ""), ("bare", 0.3, False, ""), ("encoding", 0.3, False, "encoding"),
        ("meeting", 0.3, False, "meeting"), ("second pass", 0.3, True, "second pass"),
        ("reduction", 0.0, True, "reduction"),
    ):  # fmt: skip
        found[name] = contrasted(rank, world, Towers(p), wraps, fails if rank == world - 1 else "")
    return found | {"tail": representations_of_a_tail(rank, world), "unlike": unlike_representations(rank, world)}


def contrasted(rank: int, world: int, model: Towers, wraps: bool, fails: str) -> dict[str, Any]:
    """Train windows whose second one runs out of memory on one rank; compare each with one process."""
    optimizer = Capture(model.parameters(), lr=0.1)
    part = slice_of(tuple(map(sum, UNEVEN[world])), rank)
    work = Workload(ddp(model) if wraps else model, vectors(4), encode=two_views, loss=contrast, optimizer=optimizer)
    runner = runner_for(work, UNEVEN[world], rank)
    torch.manual_seed(100 + rank)
    worst, results = 0.0, []
    for window in range(3):
        twin, state, batch = copy.deepcopy(model), torch.get_rng_state(), vectors(64, seed=window)
        with failing_once(model, fails if window == 1 else ""):
            results.append(runner.step(rows(batch, part)))
        expected, loss = at_once(twin, batch, gathered((state, results[-1].split)))
        worst = max(worst, distance(optimizer.seen[-1], expected), abs(float(results[-1].loss) / loss - 1))
    return {
        "worst": worst, "equal": is_equal_everywhere(model), "retries": [each.retries for each in results],
        "ranks_retried": [each.ranks_retried for each in results], "samples": results[-1].samples,
    }  # fmt: skip


def gathered(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def at_once(model: Any, batch: Any, ranks: Sequence[Any]) -> tuple[list[torch.Tensor], float]:
    """All encodings in one graph, each rank's drawn from its state; then the loss, from the first rank's draw."""
    before, first, found, seed = torch.get_rng_state(), 0, [], 0
    for rank, (state, split) in enumerate(ranks):
        torch.set_rng_state(state)
        for size in split:
            found.append(two_views(model, rows(batch, slice(first, first + size))))
            first += size
        seed = int(torch.randint(1 << 31, ())) if rank == 0 else seed
    torch.manual_seed(seed)
    loss = contrast(model, cutting.join(found))
    loss.backward()
    torch.set_rng_state(before)
    return [p.grad for p in model.parameters()], float(loss.detach())  # type: ignore[misc]


@contextlib.contextmanager
def failing_once(model: Towers, place: str) -> Iterator[None]:
    """Run out of memory once, in one place of a window."""
    left = [place]

    def fail(here: str) -> None:
        if left[0] == here:
            left[0] = ""
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (injected)")

    def in_pass(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        fail("second pass" if torch.is_grad_enabled() else "encoding")

    def wrapping(owner: Any, name: str, here: str) -> Any:
        inner = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            fail(here)
            return inner(*args, **kwargs)

        return mock.patch.object(owner, name, wrapper)

    handle = model.body.register_forward_hook(in_pass)
    with wrapping(exchange, "Meeting", "meeting"), wrapping(reduction.Reduction, "prepare", "reduction"):
        yield
    handle.remove()


def representations_of_a_tail(rank: int, world: int) -> Any:
    """Ranks without samples: the first one has all of the last window."""
    model = Towers(0.0)
    twin = copy.deepcopy(model)
    batches = [vectors(64), vectors(1, seed=5)]
    optimizer = Capture(model.parameters(), lr=0.1)
    work = Workload(model, vectors(4), encode=two_views, loss=contrast, optimizer=optimizer)
    splits = UNEVEN[world] if world == 2 else UNEVEN[world][::-1]
    results = list(runner_for(work, splits, rank).epoch(batches))
    for batch in batches:
        whole = gradients(twin, lambda m, b: contrast(m, two_views(m, b)), batch)
        with torch.no_grad():
            for p, gradient in zip(twin.parameters(), whole, strict=True):
                p.sub_(gradient, alpha=0.1)
    return {
        "worst": distance(list(model.parameters()), list(twin.parameters())), "equal": is_equal_everywhere(model),
        "samples": [result.samples for result in results],
    }  # fmt: skip


def unlike_representations(rank: int, world: int) -> Any:
    def encode(model: Any, batch: Any) -> Any:
        return model.body(batch[0])[:, : 8 - rank]

    work = Workload(Towers(0.0), vectors(4), encode=encode, loss=lambda m, z: z.square().mean())
    return said_by(lambda: runner_for(work, UNEVEN[world], rank).step(vectors(16)))


def large_gradients_in_place(rank: int, world: int) -> Any:
    before, reduction.SMALL_BYTES = reduction.SMALL_BYTES, 256
    try:
        return trained(rank, ddp(mlp()), vectors(64), UNEVEN[world])
    finally:
        reduction.SMALL_BYTES = before


def channels_last(rank: int, world: int) -> Any:
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).double().to(memory_format=torch.channels_last)
    )
    before, reduction.SMALL_BYTES = reduction.SMALL_BYTES, 0
    g = torch.Generator().manual_seed(1)
    batch = torch.randn(64, 3, 4, 4, generator=g, dtype=torch.float64), torch.randint(5, (64,), generator=g)
    try:
        return trained(rank, model, batch, UNEVEN[world])
    finally:
        reduction.SMALL_BYTES = before


def a_wrapper_that_is_expecting_a_backward(rank: int, world: int) -> Any:
    """A forward with gradients before the window, and a loss that calls the wrapper itself."""
    model = ddp(mlp())
    model(vectors(4)[0])

    def loss(_: nn.Module, batch: Any) -> torch.Tensor:
        return default_loss(model if _ is model.module else _, batch)

    return trained(rank, model, vectors(64), UNEVEN[world], loss)


# -- epochs


class Stream(IterableDataset[Any]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Any:
        yield from torch.randperm(self.n).tolist()


def epochs_of(rank: int, world: int, make: Callable[[], Any], n: int, seeds: bool = True) -> Any:
    """Two epochs: which samples each rank trained in each window, in order, and the windows' sizes."""
    seen: list[list[int]] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen[-1] += batch.reshape(-1).long().tolist()
        return model(batch.reshape(-1, 1).float()).square().mean()

    torch.manual_seed(rank if seeds else 0)
    model = nn.Linear(1, 1)
    work = Workload(model, torch.arange(4.0), loss=loss, count=len, optimizer=lambda p: torch.optim.SGD(p, lr=1e-9))
    runner = runner_for(work, UNEVEN[world], rank)
    torch.manual_seed(100 + rank if seeds else 100)
    found, sizes = [], []
    for _ in range(2):
        loader = make()
        seen.append([])
        epoch = []
        for result in runner.epoch(loader):
            epoch.append(seen[-1])
            seen.append([])
            sizes.append(result.samples)
        found.append(epoch)
    return {"found": found, "sizes": sizes, "drawn": int(torch.randint(1 << 30, ()))}


def float_collate(ids: Any) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.float32)


def epoch_map_style(rank: int, world: int) -> Any:
    """150 samples: two whole windows of 64, and a tail of 22."""
    return epochs_of(rank, world, lambda: DataLoader(Rows(range(150)), 10, shuffle=True, collate_fn=float_collate), 150)


def epoch_tiny_tail(rank: int, world: int) -> Any:
    """A tail of one sample: other ranks have none of it, and take part."""
    return epochs_of(rank, world, lambda: DataLoader(Rows(range(65)), 10, shuffle=True, collate_fn=float_collate), 65)


def epoch_with_generator_and_workers(rank: int, world: int) -> Any:
    g = torch.Generator().manual_seed(rank)
    loader = DataLoader(
        Rows(range(130)), 10, shuffle=True, generator=g, num_workers=1, collate_fn=float_collate,
        multiprocessing_context="fork",
    )  # fmt: skip
    return epochs_of(rank, world, lambda: loader, 130)


def epoch_of_a_stream(rank: int, world: int) -> Any:
    return epochs_of(rank, world, lambda: DataLoader(Stream(150), 7, collate_fn=float_collate), 150)


def epoch_of_a_list(rank: int, world: int) -> Any:
    return epochs_of(rank, world, lambda: [torch.arange(i, i + 30.0) for i in range(0, 150, 30)], 150)


def the_order_of_one_rank(rank: int, world: int) -> Any:
    """Ranks seeded alike read the order that one process reads, and go on as it does."""
    make = lambda: DataLoader(Rows(range(150)), 10, shuffle=True, collate_fn=float_collate)  # noqa: E731
    got = epochs_of(rank, world, make, 150, seeds=False)
    torch.manual_seed(100)
    orders = [[int(i) for batch in make() for i in batch] for _ in range(2)]
    return {**got, "orders": orders}


# -- refused, and failing together


def said_by(action: Callable[[], Any]) -> Any:
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "rank", None), getattr(error, "phase", None)]
    return "nothing was raised"


def refused(rank: int, world: int) -> Any:
    work = Workload(mlp(), vectors(4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    splits = UNEVEN[world]
    wrapped = ddp(mlp(), static_graph=True)
    synced = nn.Sequential(nn.Linear(6, 5), nn.SyncBatchNorm(5)).double()
    sampler: Any = torch.utils.data.DistributedSampler(Rows(range(64)), world, rank)
    return {
        "static_graph": said_by(lambda: fit_plan(Workload(wrapped, vectors(4)), target_batch=64)),
        "SyncBatchNorm": said_by(lambda: fit_plan(Workload(synced, vectors(4)), target_batch=64)),
        "encode": said_by(
            lambda: fit_plan(Workload(mlp(), vectors(4), encode=lambda m, b: m(b[0]), loss=lambda m, r: r.mean()))
        ),
        "below the world": said_by(lambda: fit_plan(work, target_batch=world - 1)),
        "shares": said_by(lambda: fit_plan(work, target_batch=64, shares=(60,) + (1,) * (world - 1))),
        "other targets": said_by(lambda: fit_plan(work, target_batch=64 + rank)),
        "other models": said_by(
            lambda: fit_plan(Workload(mlp(width=16 + rank), vectors(4)), target_batch=64, verify=False)
        ),
        "rank 1 fails": said_by(lambda: fit_plan(work, target_batch=64 if rank != 1 else 0)),
        "another world": said_by(lambda: Runner(work, plan(), timeout_seconds=TIMEOUT)),
        "world_size": said_by(lambda: fit_plan(work, target_batch=64, world_size=world + 1, rank=0)),
        "other trained tensors": said_by(
            lambda: runner_for(
                Workload(m := mlp(), vectors(4), optimizer=torch.optim.SGD(list(m.parameters())[rank > 0 :], lr=0.1)),
                splits,
                rank,
            )
        ),
        "DistributedSampler": said_by(
            lambda: next(runner_for(work, splits, rank).epoch(DataLoader(Rows(range(64)), 4, sampler=sampler)))
        ),
        "other samples": said_by(lambda: list(runner_for(work, splits, rank).epoch([vectors(64, seed=rank)]))),
        "fewer windows": said_by(lambda: list(runner_for(work, splits, rank).epoch([vectors(64)] * (3 - (rank == 1))))),
    }


def a_bad_batch_on_one_rank(rank: int, world: int) -> Any:
    """All leave out the window, whichever rank's share can't be used; with "skip" the others' samples are trained."""
    found: dict[str, Any] = {}
    for how in ("raise", "skip"):
        work = Workload(mlp(), vectors(4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        runner = runner_for(work, UNEVEN[world], rank)
        x, y = vectors(64)
        y32 = [y[i].to(torch.int32) if i == 63 else y[i] for i in range(64)]
        first = [(x[i], y[i]) for i in range(64)]
        bad = [(x[i], y32[i]) for i in range(64)]
        loader = DataLoader(Rows(first + bad + first), 4, collate_fn=_collate_as_last)
        said: list[Any] = []
        epoch = runner.epoch(loader, on_bad_batch=how)
        while True:
            try:
                said.append(next(epoch).samples)
            except StopIteration:
                break
            except UsageError as error:
                said.append([type(error).__name__, error.what[:60]])
        found[how] = {"said": said, "equal": is_equal_everywhere(runner.context.model)}
    return found


def _collate_as_last(items: Sequence[Any]) -> Any:
    """A micro-batch with one int32 label has all of them so: another dtype than planned."""
    dtype = torch.int32 if any(b.dtype == torch.int32 for _, b in items) else torch.int64
    return torch.stack([a for a, _ in items]), torch.stack([b.to(dtype) for _, b in items])


def an_error_of_the_loss(rank: int, world: int) -> Any:
    """Whatever one rank's loss, loader or optimizer raises ends all ranks with it."""

    def fails_at(place: str) -> Any:
        model = mlp()
        calls = [0]

        def loss(m: nn.Module, batch: Any) -> torch.Tensor:
            calls[0] += 1
            if place == "loss" and rank == 1 and calls[0] == 5:
                raise ValueError("a mistake of the loss")
            return default_loss(m, batch)

        def count(batch: Any) -> int:
            if place == "count" and rank == 1:
                raise ValueError("a mistake of the count")
            return len(batch[0])

        class Failing(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                if place == "optimizer" and rank == 1 and self.state.get("steps"):
                    raise RuntimeError("a mistake of the optimizer")
                self.state["steps"] = {"n": 1}
                return super().step(closure)

        def batches() -> Any:
            yield vectors(64)
            if place == "loader" and rank == 1:
                raise OSError("the disk is gone")
            yield from [vectors(64, seed=s) for s in range(2, 5)]

        def between(m: nn.Module) -> None:
            if place == "between" and rank == 1:
                raise KeyError("a mistake of the evaluation")

        optimizer = Failing(model.parameters(), lr=0.1)
        work = Workload(model, vectors(4), loss=loss, count=count, optimizer=optimizer, between_steps=between)
        runner = runner_for(work, UNEVEN[world], rank)
        return said_by(lambda: list(runner.epoch(batches())))

    return {place: fails_at(place) for place in ("loss", "count", "optimizer", "loader", "between")}


# -- plans


def a_plan_of_all_ranks(rank: int, world: int) -> Any:
    """512 are 512 over all ranks; one plan with all of them, which trains, and which a file keeps."""
    model = mlp(torch.float32)
    work = Workload(model, vectors(8, torch.float32), optimizer=lambda p: torch.optim.AdamW(p))
    made = fit_plan(
        work, target_batch=500, shares="equal", budget="4GiB", verify=False, max_micro_batch=100 + 50 * rank
    )
    again = Plan.from_json(made.to_json())
    runner = Runner(work, again, timeout_seconds=TIMEOUT)
    result = next(runner.epoch([vectors(512, torch.float32)]))
    return {
        "target": made.target_batch, "shares": made.shares, "split": made.split, "parallel": made.parallel,
        "splits": [entry.split for entry in made.ranks], "samples": result.samples, "own": result.split,
        "first": Plan.from_json(made.to_json()).for_rank(0).split, "why": made.provenance.reasons["shares"],
        "explain": "ranks" in made.explain(), "exactness": made.exactness,
    }  # fmt: skip


def a_plan_with_representations(rank: int, world: int) -> Any:
    """The loss of all ranks' representations is in each rank's memory."""

    def work() -> Workload:
        return Workload(Towers(0.0).float(), vectors(8, torch.float32), encode=two_views, loss=contrast)

    limits: dict[str, Any] = {"budget": "4GiB", "verify": False, "max_micro_batch": 200, "check": False}
    made = fit_plan(work(), target_batch=1600, **limits)
    with apart():
        alone = fit_plan(work(), target_batch=800, **limits)
    result = Runner(work(), made, timeout_seconds=TIMEOUT).step(vectors(800, torch.float32))
    more = made.predicted_peak_bytes - alone.predicted_peak_bytes
    return {"shares": made.shares, "samples": result.samples, "split": result.split, "more": more}


def shares_by_what_fits(rank: int, world: int) -> Any:
    model = ddp(mlp(torch.float32))
    work = Workload(model, vectors(8, torch.float32), optimizer=lambda p: torch.optim.AdamW(p))
    limits = {"budget": "4GiB", "check": False, "timing_seconds": 0}
    memory = fit_plan(work, target_batch=300, shares="memory", max_micro_batch=(30, 60, 10)[rank], **limits)
    speed = fit_plan(work, target_batch=300, shares="speed", **limits)
    given = fit_plan(work, target_batch=300, shares=(300 - 10 * (world - 1), *(10,) * (world - 1)), **limits)
    return {
        "memory": memory.shares, "speed": speed.shares, "why": speed.provenance.reasons["shares"],
        "given": given.shares, "parallel": given.parallel, "verified": given.verified,
    }  # fmt: skip
