"""A test that invents no index where nothing checks it, and whose crash is a verdict."""

from __future__ import annotations

import ctypes
import os
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import drained, one_thread  # noqa: F401
from torch import nn

from autoaccum import Workload, fit_plan
from autoaccum.exactness import check
from autoaccum.exactness.value_uses import ANY, KEPT, MOVED, watched
from autoaccum.processes import fork
from autoaccum.state import snapshot

ROWS, CPU, CUDA = 8, torch.device("cpu"), torch.device("cuda")
Loss = Callable[[nn.Module, Any], torch.Tensor]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(50, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)


def model() -> Bag:
    torch.manual_seed(0)
    return Bag()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def whole(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(2))


def ctc(m: Any, b: Any) -> torch.Tensor:
    log = m(b["x"]).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log, b["labels"], b["frames"], b["lens"], zero_infinity=True)


def speech(rows: int = ROWS) -> dict[str, torch.Tensor]:
    lens = torch.arange(rows) % 5 + 2
    labels = whole(6, rows, 6).masked_fill(torch.arange(6) >= lens[:, None], -1)
    return {"x": random(rows, 30, 6), "labels": labels, "frames": torch.full((rows,), 30), "lens": lens}


def bag(m: Any, b: Any) -> torch.Tensor:
    return m(F.embedding_bag(b["ids"].flatten(), m.table.weight, b["starts"])).pow(2).mean()


def grid(m: Any, b: Any) -> torch.Tensor:
    return m(F.grid_sample(b["image"], b["grid"], align_corners=False).flatten(1)).pow(2).mean()


def packed(m: Any, b: Any) -> torch.Tensor:
    x = nn.utils.rnn.pack_padded_sequence(b["x"], b["n"], batch_first=True, enforce_sorted=False)
    return m(m.inner(x)[1][0]).pow(2).mean()


BATCHES: dict[str, tuple[Loss, dict[str, torch.Tensor], tuple[str, ...]]] = {
    "ctc": (ctc, speech(), ("labels", "frames", "lens")),
    "embedding_bag": (bag, {"ids": whole(50, ROWS, 3), "starts": torch.arange(ROWS) * 3}, ("ids", "starts")),
    "grid_sample": (grid, {"image": random(ROWS, 1, 8, 8), "grid": random(ROWS, 2, 3, 2).tanh()}, ("grid",)),
    "packed lengths": (packed, {"x": random(ROWS, 9, 6), "n": torch.arange(ROWS) + 2}, ("n",)),
}


@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("name", BATCHES)
def test_what_is_not_checked_is_given_the_samples_own_rows_only(name: str, rows: int) -> None:
    """Lengths may be cut, too: a shorter one is never out of bounds."""
    loss, batch, kept = BATCHES[name]
    sample, given_to = {key: leaf[:rows] for key, leaf in batch.items()}, queue.SimpleQueue[Any]()

    def watching(m: nn.Module, b: Any) -> torch.Tensor:
        given_to.put({key: leaf.clone() for key, leaf in b.items()})
        return loss(m, b)

    check.check(Workload(model(), sample, loss=watching), isolated=False)
    seen = drained(given_to)
    assert len(seen) > 1
    for key in kept:
        own = sample[key].double()
        for given in seen:
            among = (given[key].double()[:, None] == own[None]).flatten(2).all(2) if own.dim() > 1 else None
            if among is not None:
                assert among.any(1).all(), (key, given[key])
            else:
                assert given[key].min() >= min(1, int(own.min())) and given[key].max() <= own.max()


def test_ctc_is_judged_and_not_broken() -> None:
    assert check.check(Workload(model(), speech(), loss=ctc)).words == "exact (tested on 8 samples)"
    few = check.check(Workload(model(), speech(3), loss=lambda m, b: ctc(m, b).sqrt()))
    assert few.kind in ("wrong denominator", "not decomposable")


def crash(m: nn.Module, b: Any) -> torch.Tensor:
    if len(b[0]) < ROWS:
        ctypes.string_at(0)
    return F.mse_loss(m(b[0]), b[1])


def leave(m: nn.Module, b: Any) -> torch.Tensor:
    if len(b[0]) < ROWS:
        os._exit(3)
    return F.mse_loss(m(b[0]), b[1])


@pytest.mark.parametrize(("loss", "how"), [(crash, "ended by SIGSEGV"), (leave, "exit code 3")])
def test_a_crash_is_a_verdict(loss: Loss, how: str) -> None:
    net, sample = model(), (random(ROWS, 6), random(ROWS, 6))
    before = snapshot.take(model=net)
    found = check.check(Workload(net, sample, loss=loss))
    assert found.kind == "unknown" and "the test crashed" in found.words and how in found.words and found.advice
    assert not before.differences()
    if loss is crash:
        plan = fit_plan(net, sample, loss=lambda m, b: loss(m, b) if b[0].dtype is torch.double else m(b[0]).mean(),
                        target_batch=16, budget="4GiB", verify=False)  # fmt: skip
        assert plan.exactness.startswith("unknown: the test crashed")


def test_how_a_copy_ended_is_said() -> None:
    with pytest.raises(fork.Died, match="SIGABRT"):
        fork.in_copy(os.abort)
    with pytest.raises(fork.ForkFailed, match="ZeroDivisionError"):
        fork.in_copy(lambda: 1 // 0)


def freedoms(loss: Callable[[Any], Any], leaf: torch.Tensor) -> tuple[str, str]:
    batch = {"leaf": leaf}
    with watched(batch) as uses:
        loss(leaf)
    return tuple(uses.freedom("batch['leaf']", device) for device in (CPU, CUDA))  # type: ignore[return-value]


TABLE, LOGITS = torch.randn(9, 4), torch.randn(8, 9)


@pytest.mark.parametrize(
    ("loss", "leaf", "freedom"),
    [
        (lambda y: F.cross_entropy(LOGITS, y), whole(9, 8), (ANY, ANY)),
        (lambda y: F.cross_entropy(LOGITS, y.clamp(min=0).view(-1)), whole(9, 8), (ANY, ANY)),
        (lambda y: LOGITS.gather(1, y[:, None]), whole(9, 8), (ANY, MOVED)),
        (lambda y: TABLE[y + 0], whole(9, 8), (ANY, MOVED)),
        (lambda y: F.embedding(y.to(torch.int32), TABLE), whole(9, 8), (ANY, MOVED)),
        (lambda y: F.one_hot(y, 9), whole(9, 8), (ANY, MOVED)),
        (lambda x: x[:, 0].long().float() @ LOGITS, random(8, 3), (ANY, ANY)),
        (lambda x: TABLE[x[:, 0].long()], whole(9, 8, 1).float(), (ANY, MOVED)),
        (lambda x: x[:3] @ TABLE[:4], random(8, 4), (ANY, ANY)),
        (lambda y: y.tolist(), whole(9, 8), (KEPT, KEPT)),
        (lambda y: y.numpy(), whole(9, 8), (KEPT, KEPT)),
        (lambda y: None, whole(9, 8), (ANY, KEPT)),
    ],
)  # fmt: skip
def test_what_reads_a_leaf_says_what_may_be_done_with_it(
    loss: Callable[[Any], Any], leaf: torch.Tensor, freedom: tuple[str, str]
) -> None:
    assert freedoms(loss, leaf) == freedom
