"""Cases of `tests/test_rank_lanes.py`: windows in lanes that meet those of other ranks (tests/rank_groups.py)."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from helpers_train import distance, vectors
from rank_cases import TIMEOUT, UNEVEN, ddp, gathered, is_equal_everywhere, plan, rows, said_by
from rank_faults import Boom, _timed, run_schedule
from rank_groups import Splits, plan_of_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoaccum
from autoaccum import Runner, Workload, fit_plan
from autoaccum.ranks import reduction
from autoaccum.ranks.shares import slice_of
from autoaccum.ranks.synchronized import alone
from autoaccum.workload import default_loss


class Steps(torch.optim.Optimizer):
    """Plain SGD that keeps a copy of every gradient, also of None."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.seen: list[list[torch.Tensor | None]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        self.seen.append([None if p.grad is None else p.grad.clone() for p in params])
        for p in params:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def net(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, conv: Any = nn.Conv2d, size: int = 6) -> nn.Module:
    torch.manual_seed(0)
    features = 3 * (size - 3) ** (1 if conv is nn.Conv1d else 2)
    return nn.Sequential(
        conv(2, 4, 3), norm(4), nn.Tanh(), conv(4, 3, 2), norm(3), nn.Flatten(), nn.Linear(features, 5)
    ).double()


def images(n: int, seed: int = 0, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, width, width, generator=g, dtype=torch.float64)
    return x * torch.linspace(0.2, 3, n)[:, None, None, None] + 0.5, torch.arange(n) % 5


def at_once(model: nn.Module, batch: Any, loss: Any) -> tuple[list[torch.Tensor | None], float]:
    """The gradient and the loss of one whole batch in one process; its statistics are updated."""
    model.zero_grad(set_to_none=True)
    with alone(model):
        out = loss(model, batch)
        out = out[0] / out[1] if isinstance(out, tuple) else out
        out.backward()
    return [p.grad for p in model.parameters()], float(out.detach())


def apart(model: nn.Module, twin: nn.Module) -> float:
    """The worst distance of two models' buffers."""
    pairs = [(a.double(), b.double()) for a, b in zip(model.buffers(), twin.buffers(), strict=True)]
    return max((float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs), default=0.0)


def trained(
    rank: int, model: nn.Module, batches: Sequence[Any], splits: Splits, loss: Any = default_loss,
    inside: Any = contextlib.nullcontext, whole: Any = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train windows of all ranks in lanes; the worst distance from one process with the whole batches."""
    inner = model.module if hasattr(model, "module") else model
    shares = tuple(map(sum, splits))
    optimizer = Steps(inner.parameters())
    more = {"batchnorm": "exact", **more}
    work = Workload(model, rows(batches[0], slice(0, 4)), loss=loss, optimizer=optimizer, **more)
    runner = Runner(work, plan_of_ranks(plan(), work, splits, rank), timeout_seconds=TIMEOUT)
    worst, results, none = 0.0, [], set()
    for number, batch in enumerate(batches):
        twin = copy.deepcopy(inner)
        with inside(number):
            results.append(runner.step(rows(batch, slice_of(shares, rank))))
        want, want_loss = at_once(twin, batch, whole or loss)
        got = optimizer.seen[-1]
        assert [each is None for each in got] == [each is None for each in want]
        none |= {i for i, each in enumerate(got) if each is None}
        reached = [i for i, each in enumerate(want) if each is not None]
        floor = 1e-3 * torch.cat([want[i].flatten() for i in reached]).norm()  # type: ignore[union-attr]
        reached = [i for i in reached if want[i].norm() > floor]  # type: ignore[union-attr]
        worst = max(
            worst, distance([got[i] for i in reached], [want[i] for i in reached]),  # type: ignore[misc]
            abs(float(results[-1].loss) - want_loss) / abs(want_loss), apart(inner, twin),
        )  # fmt: skip
    return {
        "worst": worst, "equal": is_equal_everywhere(inner), "splits": [each.split for each in results],
        "retries": [each.retries for each in results], "ranks_retried": [each.ranks_retried for each in results],
        "samples": [each.samples for each in results], "none": len(none),
        "norms": [int(m.num_batches_tracked) for m in inner.modules() if isinstance(m, nn.BatchNorm2d)],
    }  # fmt: skip


def batches(n: int, windows: int = 2) -> list[Any]:
    return [images(n, seed) for seed in range(windows)]


# -- exact


def whole_statistics(rank: int, world: int) -> Any:
    """Shares of 48 and 16 (or 42, 14 and 8) in other numbers of micro-batches."""
    found = {}
    for name, norm, wraps in (
        ("ddp", nn.BatchNorm2d, True),
        ("bare", lambda n: nn.BatchNorm2d(n, momentum=None, affine=False), False),
        ("synchronized", nn.SyncBatchNorm, False),  # DistributedDataParallel takes these on GPUs only
    ):
        model = net(norm)  # type: ignore[arg-type]
        found[name] = trained(rank, ddp(model) if wraps else model, batches(64), UNEVEN[world])
    return found


def one_each(rank: int, world: int) -> Any:
    """One micro-batch on each rank: what SyncBatchNorm does elsewhere."""
    return {"one each": trained(rank, net(nn.SyncBatchNorm), batches(8 * world), [(8,)] * world)}


class Heads(nn.Module):
    """Tokens' classes; a normalized head that no loss reaches, and a branch that only some ranks' losses reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 7)
        self.unused = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.side = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 7))
        self.double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.unused(x.flatten(0, 1))
        side = self.side(x.flatten(0, 1))
        return self.out(torch.tanh(self.norm(self.body(x).flatten(0, 1)))), side


def sentences(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(7, (n, 3), generator=g)
    labels[torch.rand(n, 3, generator=g) < 0.4] = -100
    return {"x": torch.randn(n, 3, 6, generator=g, dtype=torch.float64), "labels": labels}


def token_sum(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The side branch counts where a sample's first label is 1: on some ranks only."""
    (out, side), labels = model(batch["x"]), batch["labels"].flatten()
    total = F.cross_entropy(out, labels, ignore_index=-100, reduction="sum")
    some = (batch["labels"][:, :1] == 1).expand(-1, 3).flatten()
    if bool(some.any()):
        total = total + side[some].square().sum()
    return total, (labels != -100).sum()


def token_mean(model: Any, batch: Any) -> torch.Tensor:
    total, count = token_sum(model, batch)
    return total / count


def ragged_counts(rank: int, world: int) -> Any:
    """Labels that are ignored, all of one rank's, too: its samples are in the statistics all the same."""
    some, other = sentences(64), sentences(64, 1)
    for batch in (some, other):
        last = slice_of(tuple(map(sum, UNEVEN[world])), world - 1)
        batch["labels"][last][:, 0] = 2  # the side branch is not the last rank's
    other["labels"][slice_of(tuple(map(sum, UNEVEN[world])), world - 1)] = -100
    count = lambda batch: (batch["labels"] != -100).sum()  # noqa: E731
    return {
        "sum": trained(rank, Heads(), [some, other], UNEVEN[world], token_sum),
        "counted": trained(rank, ddp(Heads()), [some, other], UNEVEN[world], token_mean, count=count),
    }


def a_tail(rank: int, world: int) -> Any:
    """Ranks without samples: the rank with the largest share has all of the last window. Then none can be trained."""
    found = {}
    for name, splits in (("first", UNEVEN[world]), ("last", UNEVEN[world][::-1])):
        model = net()
        twin = copy.deepcopy(model)
        given = [*batches(64, 1), images(1, 7)]
        wrapped = ddp(model, broadcast_buffers=False)
        work = Workload(wrapped, images(4), optimizer=Steps(model.parameters()), batchnorm="exact")
        runner = Runner(work, plan_of_ranks(plan(), work, splits, rank), timeout_seconds=TIMEOUT)
        results = list(runner.epoch(given))
        for batch in given:
            gradients, _ = at_once(twin, batch, default_loss)
            with torch.no_grad():
                for p, gradient in zip(twin.parameters(), gradients, strict=True):
                    p.sub_(gradient, alpha=0.1)  # type: ignore[arg-type]
        parameters = distance(list(model.parameters()), list(twin.parameters()))
        found[name] = {
            "worst": max(parameters, apart(model, twin)), "equal": is_equal_everywhere(model),
            "samples": [each.samples for each in results], "here": [sum(each.split) for each in results],
        }  # fmt: skip
    return {"tails": found, "too few": too_few(rank, world)}


def too_few(rank: int, world: int) -> Any:
    """A last window of one sample has no variance: all leave it out, and go on."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).double()
    work = Workload(model, vectors(4), optimizer=Steps(model.parameters()), batchnorm="exact")
    runner = Runner(work, plan_of_ranks(plan(), work, UNEVEN[world], rank), timeout_seconds=TIMEOUT)
    said = said_by(lambda: list(runner.epoch([vectors(64), vectors(1)])))
    again = [each.samples for each in runner.epoch([vectors(64)])]
    return {"said": said, "again": again, "equal": is_equal_everywhere(model)}


class Recorded(nn.Module):
    """Dropout whose masks are kept, or given."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[torch.Tensor] = []
        self.given: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.given if self.given is not None else F.dropout(torch.ones_like(x), 0.3)
        self.masks.append(mask)
        return x * mask


def dropout_of_lanes(rank: int, world: int) -> Any:
    """Each lane of each rank drops out its own; one process with all of these masks has the same gradient."""
    torch.manual_seed(0)
    drop = Recorded()
    model = nn.Sequential(nn.Linear(6, 8), drop, nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()
    twin = copy.deepcopy(model)
    torch.manual_seed(10 + rank)
    batch, optimizer = vectors(64), Steps(model.parameters())
    work = Workload(model, vectors(4), optimizer=optimizer, batchnorm="exact")
    runner = Runner(work, plan_of_ranks(plan(), work, UNEVEN[world], rank), timeout_seconds=TIMEOUT)
    drop.masks.clear()
    runner.step(rows(batch, slice_of(tuple(map(sum, UNEVEN[world])), rank)))
    masks = torch.cat([mask for each in gathered(drop.masks) for mask in each])
    twin[1].given = masks  # type: ignore[assignment]
    want, _ = at_once(twin, batch, default_loss)
    return {
        "worst": max(distance(optimizer.seen[-1], want), apart(model, twin)),  # type: ignore[arg-type]
        "unlike": len({tuple(mask.flatten().tolist()) for mask in masks}), "equal": is_equal_everywhere(model),
    }  # fmt: skip


class Towers(nn.Module):
    """Two encoders, one with a normalization, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.text, self.scale = nn.Linear(6, 4), nn.Parameter(torch.tensor(1.0))
        self.double()


def clip_loss(model: Any, batch: Any) -> torch.Tensor:
    image = autoaccum.gather_window(F.normalize(model.image(batch[0]), dim=-1))
    text = autoaccum.gather_window(F.normalize(model.text(batch[0].flip(1)), dim=-1))
    label = autoaccum.gather_window(batch[1])
    wide = autoaccum.gather_window(torch.ones(len(batch[0]), 700, dtype=torch.float64))  # no page has room for it
    logits = model.scale.exp() * image @ text.T * wide.mean()
    return -(logits.log_softmax(1) * (label[:, None] == label)).sum(1).mean()


def gathered_rows(rank: int, world: int) -> Any:
    """A contrastive loss over the rows of all ranks."""
    given = [vectors(64, seed=seed) for seed in (1, 2)]
    more = {"batch_interactions": "exact"}
    return {"rows": trained(rank, ddp(Towers()), given, UNEVEN[world], clip_loss, **more)}


class Checkpointed(nn.Module):
    """A block that runs again in the backward, and an instance normalization with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(nn.SyncBatchNorm)
        self.first = nn.InstanceNorm2d(2, track_running_stats=True).double()
        self.repeats = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for module in self.inner[:5]:  # type: ignore[index]
            x = checkpoint(module, x, use_reentrant=False) if self.repeats else module(x)
        return self.inner[5:](x)  # type: ignore[index,no-any-return]


def checkpointed_blocks(rank: int, world: int) -> Any:

    def whole(model: Any, batch: Any) -> torch.Tensor:
        model.repeats = False  # or each normalization would update its running statistics twice
        return default_loss(model, batch)

    return {"checkpointed": trained(rank, Checkpointed(), batches(64), UNEVEN[world], whole=whole)}


# -- failures


@contextlib.contextmanager
def running_out(model: nn.Module, place: str, number: int = 0) -> Iterator[None]:
    """Run out of memory once, in one place of a window, in one of its micro-batches."""
    left, passes = [place], [0]

    def in_forward(module: nn.Module, args: Any, out: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return out
        passes[0] += 1
        if passes[0] <= number or left[0] not in ("forward", "backward"):
            return out
        where, left[0] = left[0], ""
        if where == "backward":
            return Boom.apply(out)  # type: ignore[no-untyped-call]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (injected)")

    prepare = reduction.Reduction.prepare

    def preparing(own: Any, wide: Any) -> None:
        if left[0] == "reduction":
            left[0] = ""
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        prepare(own, wide)

    handle = list(model.modules())[-4].register_forward_hook(in_forward)  # between the two normalizations
    with mock.patch.object(reduction.Reduction, "prepare", preparing):
        yield
    handle.remove()


def out_of_memory(rank: int, world: int) -> Any:
    """One rank runs out of memory in the second window: all start it over, that one in smaller micro-batches."""
    found = {}
    for place, number in (("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1), ("reduction", 0)):
        model = net()

        def inside(window: int, model: Any = model, place: str = place, number: int = number) -> Any:
            fails = window == 1 and rank == world - 1
            return running_out(model, place if fails else "", number)

        splits: Splits = [(8,) * 3, (8, 8)] if world == 2 else [(8, 8), (8,), (8, 8)]
        total = sum(map(sum, splits))
        found[f"{place} {number}"] = trained(rank, ddp(model), batches(total, 3), splits, inside=inside)
    return found


def schedules_100(rank: int, world: int) -> Any:
    """Run seeded schedules of faults, as without lanes."""
    return [run_schedule(seed, rank, world, "lanes") for seed in range(100)]


def never_fits(rank: int, world: int) -> Any:
    """The smallest micro-batch of one rank doesn't fit: all end."""
    model = net()
    work = Workload(model, images(4), optimizer=Steps(model.parameters()), batchnorm="exact")
    runner = Runner(work, plan_of_ranks(plan(), work, [(4, 4)] * world, rank), timeout_seconds=TIMEOUT)

    def fail(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    model[3].register_forward_hook(fail)  # type: ignore[index]
    return said_by(lambda: runner.step(images(8)))


class Unlike(nn.Module):
    """One rank goes by another way, or comes to its end before the others do."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.inner, self.other, self.rank, self.how = net(), nn.BatchNorm2d(4).double(), rank, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner[0](x)  # type: ignore[index]
        if self.rank == 1 and self.how == "mistake" and torch.is_grad_enabled():
            raise ValueError("a mistake of the model")
        if self.rank == 1 and self.how == "order":
            out = self.other(out)
        elif not (self.rank == 1 and self.how == "end"):
            out = self.inner[1](out)  # type: ignore[index]
        for module in self.inner[2:4] if self.rank == 1 and self.how == "end" else self.inner[2:5]:  # type: ignore[index]
            out = module(out)
        return self.inner[5:](out)  # type: ignore[index,no-any-return]


def refused(rank: int, world: int) -> Any:
    """What ends all ranks, or is refused before anything is trained."""
    found: dict[str, Any] = {"never fits": never_fits(rank, world)}
    for how in ("order", "end", "mistake"):
        work = Workload(Unlike(rank, how), images(4), optimizer=lambda p: Steps(p), batchnorm="exact")
        runner = Runner(work, plan_of_ranks(plan(), work, [(4, 4)] * world, rank), timeout_seconds=TIMEOUT)
        found[how] = said_by(lambda runner=runner: runner.step(images(8)))  # type: ignore[misc]

    class Own(nn.SyncBatchNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    cases = {
        "encode": Workload(
            net(), images(4), encode=lambda m, b: m(b[0]), loss=lambda m, r: r.mean(), batchnorm="exact"
        ),
        "own": Workload(net(Own), images(4), batchnorm="exact"),
        "merged": Workload(net(nn.SyncBatchNorm), images(4), batchnorm="merged"),
        "unlike choices": Workload(net(), images(4), batchnorm="exact" if rank else "frozen"),
    }
    return found | {name: said_by(lambda w=w: fit_plan(w, target_batch=16)) for name, w in cases.items()}  # type: ignore[misc]


def a_rank_is_killed(rank: int, world: int) -> Any:
    """The last rank is killed while the others wait for it in a meeting of the backward."""
    model = net()
    work = Workload(model, images(4), optimizer=Steps(model.parameters()), batchnorm="exact")
    runner = Runner(work, plan_of_ranks(plan(), work, [(4, 4)] * world, rank), timeout_seconds=20.0)
    runner.step(images(8))
    if rank == world - 1:
        model[3].register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[index]
    return _timed(lambda: runner.step(images(8)))


def a_rank_is_killed_in_its_forward(rank: int, world: int) -> Any:
    return _gone(rank, world, 20.0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def a_rank_stops_answering(rank: int, world: int) -> Any:
    return _gone(rank, world, 2.0, lambda: time.sleep(6))


def _gone(rank: int, world: int, timeout: float, at: Callable[[], None]) -> Any:
    """Train a window in whose forward the last rank does something between two meetings."""
    model = net()
    work = Workload(model, images(4), optimizer=Steps(model.parameters()), batchnorm="exact")
    runner = Runner(work, plan_of_ranks(plan(), work, [(4, 4)] * world, rank), timeout_seconds=timeout)
    runner.step(images(8))
    if rank == world - 1:
        model[3].register_forward_hook(lambda *_: at())  # type: ignore[index]
    return _timed(lambda: runner.step(images(8)))


def precisions(rank: int, world: int) -> Any:
    """Single precision; and bf16 autocast with a scaler, of which one rank overflows in the second window."""
    given = [(x.float(), y) for x, y in batches(64)]
    found = {"fp32": trained(rank, ddp(net().float()), given, UNEVEN[world])}
    model = net().float()
    part, optimizer = slice_of(tuple(map(sum, UNEVEN[world])), rank), Steps(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    work = Workload(
        model, rows(given[0], slice(0, 4)), optimizer=optimizer, batchnorm="exact", precision="bf16", scaler=scaler
    )
    runner = Runner(work, plan_of_ranks(plan(), work, UNEVEN[world], rank), timeout_seconds=TIMEOUT)
    worst, stepped, scales = 0.0, [], []
    for window in range(3):
        twin = copy.deepcopy(model)
        x, y = rows(given[0], part)
        fails = window == 1 and rank == 1
        result = runner.step((x * float("inf") if fails else x, y))
        stepped.append(result.stepped)
        scales.append(scaler.get_scale())
        if window == 0:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                want, _ = at_once(twin, given[0], default_loss)
            flat = [torch.cat([g.flatten() for g in side]) for side in (optimizer.seen[-1], want)]  # type: ignore[union-attr]
            worst = distance(flat[:1], flat[1:])
        if window == 1:  # the statistics of an infinite input last
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()
    found["bf16"] = {"worst": worst, "equal": is_equal_everywhere(model), "stepped": stepped, "scales": scales}
    return found


# -- plans


def planned(rank: int, world: int) -> Any:
    """Each rank plans alone; a SyncBatchNorm talks to nobody meanwhile."""
    model = net(nn.SyncBatchNorm).float()
    x, y = images(40 * world)
    batch = x.float(), y
    work = Workload(model, rows(batch, slice(0, 4)), batchnorm="exact", optimizer=lambda p: torch.optim.SGD(p, 0.1))
    made = fit_plan(work, target_batch=40 * world, shares="equal", budget="4GiB", max_micro_batch=(16, 40, 20)[rank])
    twin = copy.deepcopy(model)
    result = next(Runner(work, made, timeout_seconds=TIMEOUT).epoch([batch]))
    with alone(twin):
        default_loss(twin, batch)
    return {
        "split": made.split, "own": result.split, "samples": result.samples, "statistics": apart(model, twin),
        "equal": is_equal_everywhere(model), "left": [name for name in vars(model[1]) if name == "forward"],  # type: ignore[index]
    }  # fmt: skip


def planned_rows(rank: int, world: int) -> Any:
    """A loss over the rows of all ranks needs to know how many."""

    def work() -> Workload:
        batch = vectors(8, torch.float32)
        return Workload(Towers().float(), batch, loss=clip_loss, batch_interactions="exact")

    limits: dict[str, Any] = {"budget": "4GiB", "verify": False, "max_micro_batch": 200, "check": False}
    made = fit_plan(work(), target_batch=1600, **limits)
    result = Runner(work(), made, timeout_seconds=TIMEOUT).step(vectors(800, torch.float32))
    no_target = said_by(lambda: fit_plan(work(), **limits))
    return {"samples": result.samples, "split": result.split, "no target": no_target}
