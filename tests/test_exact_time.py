"""The exactness test ends in time: in single precision where double would be too slow, and untested where both are."""

from __future__ import annotations

import queue
import time
from typing import Any

import pytest
import torch
from helpers_train import base_plan, drained
from torch import nn

from autoaccum import Workload
from autoaccum.exactness import check
from autoaccum.exactness.time_limit import OutOfTime, TimeLimit

TURNS = 300_000  # of an addition each: seconds, in operators of microseconds
LIMIT_SECONDS = 3.0
SLACK_SECONDS = 4.0  # for a forked copy, on a busy machine


class Slow(nn.Module):
    """Take seconds in some precisions, as convolutions in double precision do."""

    def __init__(self, *slow: torch.dtype) -> None:
        super().__init__()
        self.slow, self.inner = slow, nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for _ in range(TURNS if x.dtype in self.slow else 0):
                x + 1
        return self.inner(x)


class SlowBackward(torch.autograd.Function):
    """Take seconds in the backward pass alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> torch.Tensor:
        for _ in range(TURNS):
            given + 1
        return given


def work(model: nn.Module, loss: Any = None) -> Workload:
    torch.manual_seed(0)
    given: dict[str, Any] = {} if loss is None else {"loss": loss}
    return Workload(model, (torch.randn(8, 5), torch.arange(8) % 3), **given)


def test_where_double_precision_is_too_slow_the_test_is_in_single() -> None:
    started = time.monotonic()
    found = check.check(work(Slow(torch.float64)), limit_seconds=LIMIT_SECONDS)
    assert found.words == "exact (tested on 8 samples)"
    assert 1e-9 < found.error < 1e-5  # rounding of single precision
    assert time.monotonic() - started < LIMIT_SECONDS / 2 + SLACK_SECONDS
    quick = check.check(work(Slow()), limit_seconds=LIMIT_SECONDS)
    assert quick.exact and quick.error < 1e-12  # in double precision


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_each_precision_is_too_slow_the_plan_says_that_it_is_untested(where: str) -> None:
    model = Slow(torch.float64, torch.float32) if where == "forward" else Slow()
    if where == "backward":
        slow = work(model, lambda m, b: nn.functional.cross_entropy(SlowBackward.apply(m(b[0])), b[1]))
    else:
        slow = work(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    started = time.monotonic()
    found = check.check(slow, limit_seconds=1.0)
    assert time.monotonic() - started < 1.0 + SLACK_SECONDS
    assert found.words == "unknown: the test takes longer than 1 s"
    assert found.advice == ("Run autoaccum check, which takes the time that it needs.",)
    assert not found.exact and not found.samples
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert check.with_verdict(base_plan(), found).exactness == found.words


def test_what_differs_is_said_even_where_no_time_is_left_to_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over the batch in place of the mean, explained by a function that takes too long."""

    def explained(*_: object) -> Any:
        while True:
            torch.zeros(1) + 1

    monkeypatch.setattr(check, "_verdict", explained)
    summed = work(Slow(), lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum"))
    found = check.check(summed, limit_seconds=1.0)
    assert found.words.startswith("not exact: off by") and found.words.endswith("no time to determine why")
    assert found.kind == check.INEXACT and found.samples == 8


def test_a_plan_waits_for_its_test_as_long_as_planning_took_or_twenty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, progress = list[Any](), list[str]()

    def checked(workload: Workload, *, limit_seconds: float | None, **more: Any) -> check.Verdict:
        limits.append(limit_seconds)
        return check.unknown("a stub")

    with monkeypatch.context() as patched:
        patched.setattr(check, "check", checked)
        for seconds in (0.0, 3.0, 90.0):
            check.check_plan(base_plan(), work(Slow()), planning_seconds=seconds)
    assert limits == [20.0, 20.0, 90.0]
    check.check(work(Slow()), limit_seconds=20.0, progress=progress.append)
    assert progress == ["testing whether the gradient is the large batch's, for 20 s at most"]


def test_a_part_of_the_limit_ends_before_the_whole() -> None:
    limit, host = TimeLimit.of(60.0), torch.device("cpu")
    with limit.held(host), pytest.raises(OutOfTime), limit.held(host, 1e-3):
        for _ in range(TURNS):
            torch.zeros(1) + 1
    with TimeLimit.of(None).held(host):
        assert float(torch.ones(1) + 1) == 2


def test_single_precision_is_computed_in_full_and_the_settings_come_back() -> None:
    seen = queue.SimpleQueue[tuple[str, bool]]()  # what else a loss holds is put back as it was

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.put((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return model(batch[0]).square().mean()  # type: ignore[no-any-return]

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        assert check.check(work(Slow(), loss), isolated=False).exact
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert set(drained(seen)) == {("highest", False)}
