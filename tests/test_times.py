"""The knee: what rounds of times say and don't say, and that planning measures them and goes by them."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_fields import changed_plan
from strategies import made_up_plan
from torch import nn

from autoaccum import Plan, UsageError, Workload, fit_plan
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.plan import PeakRow, TimedSize
from autoaccum.planning import timing as times
from autoaccum.planning.request import PlanRequest
from autoaccum.planning.resolved_request import resolve
from autoaccum.planning.target import RecordingTarget
from autoaccum.reporting import frames, what_if
from autoaccum.simulation.knee import describe, interval, knee
from autoaccum.window.step import open_context

MIB = 2**20

CPU = CpuDevice(torch.device("cpu"))


def timed(rounds: dict[int, list[float]]) -> tuple[TimedSize, ...]:
    return tuple(TimedSize(n, sorted(each)[len(each) // 2], len(each), tuple(each)) for n, each in rounds.items())


def noisy(seconds: dict[int, float], noise: float, rounds: int, seed: int = 0) -> tuple[TimedSize, ...]:
    """Every round in another mood of the machine, up to twice as slow, and each size off by the noise."""
    rng = random.Random(seed)
    moods = [rng.uniform(1, 2) for _ in range(rounds)]
    return timed({n: [m * s * rng.uniform(1 - noise, 1 + noise) for m in moods] for n, s in seconds.items()})


@pytest.mark.parametrize("seconds", [(1.0, 1.0, 9.0, 0.1), (5.0, 1.0, 1.0, 0.1), (0.0, 0.0, 1.0, 0.0)], ids=str)
def test_a_hiccup_of_the_machine_makes_no_step_of_negative_seconds(
    seconds: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round's first micro-batch, later ones and optimizer step; the last is as large as the first."""
    watch = times.Stopwatch(CPU, list(seconds))
    subject: Any = SimpleNamespace(tile=lambda n: None, context=None)
    clock = iter([0.0, sum(seconds)])
    monkeypatch.setattr(times, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(times.step, "train_window", lambda *args, **how: None)
    found = times._round(subject, watch, [8, 16, 8], [8, 16], 64)
    assert all(each >= part * 64 / n for (n, each), part in zip(found.items(), seconds[1:3], strict=True))


# What the times say.


@pytest.mark.parametrize("n", range(1, 40))
def test_the_interval_holds_the_median_with_95_percent_whatever_the_distribution(n: int) -> None:
    found = interval(list(range(1, n + 1)))
    if found is None:
        assert 2 * 0.5**n > 0.05  # even the lowest and the highest miss it more often
        return
    low, high = found
    assert low + high == n + 1

    def missed(j: int) -> float:
        return 2 * sum(math.comb(n, i) for i in range(j)) / 2**n

    assert missed(low) <= 0.05 < missed(low + 1)


def test_rounds_that_are_distinguished_give_one_knee() -> None:
    times = noisy({2: 2.0, 4: 1.2, 8: 1.004, 16: 1.0, 32: 1.03}, noise=0.002, rounds=12)
    found = knee(times)
    assert found is not None and found.timed.micro_batch == 8 and found.is_sure and found.rounds == 12
    assert found.fastest.micro_batch in (8, 16)


def test_noise_beyond_a_percent_is_not_decided() -> None:
    times = noisy({2: 2.0, 4: 1.001, 8: 1.004, 16: 1.0, 32: 1.002}, noise=0.05, rounds=12)
    found = knee(times)
    assert found is not None and not found.is_sure and 2 not in found.candidates and len(found.candidates) > 1
    plan = changed_plan(made_up_plan(), timed_sizes=times, micro_batch=32)
    assert re.search(r"^\d+ by the medians of 12 rounds; noise leaves [\d, and]+ possible", describe(plan) or "")
    apart = tuple(replace(size, round_seconds=()) for size in times)
    assert "not timed in turn" in (describe(changed_plan(plan, timed_sizes=apart)) or "")
    flat = changed_plan(plan, timed_sizes=noisy({4: 1.001, 8: 1.0, 16: 1.0}, noise=0.05, rounds=12))
    assert "no difference that could be measured between 4, 8 and 16 (12 rounds)" in (describe(flat) or "")


def test_five_rounds_are_too_few_to_tell_a_percent_and_six_are_not() -> None:
    seconds = {4: 2.0, 8: 1.0, 16: 1.0}
    few, enough = (knee(noisy(seconds, noise=0.0001, rounds=rounds)) for rounds in (5, 6))
    assert few is not None and not few.is_sure and few.candidates == (4, 8, 16)
    assert enough is not None and enough.is_sure and enough.timed.micro_batch == 8
    assert "too few to resolve" in (describe(made_up_plan(timed_sizes=noisy(seconds, 0.0001, 5))) or "")


@settings(max_examples=200, deadline=None)
@given(
    seconds=st.dictionaries(st.integers(1, 64), st.floats(0.5, 2), min_size=1, max_size=8),
    rounds=st.integers(1, 15),
    noise=st.floats(0, 0.1),
)
def test_the_knee_is_the_smallest_within_a_percent_and_one_of_its_candidates(
    seconds: dict[int, float], rounds: int, noise: float
) -> None:
    found = knee(noisy(seconds, noise, rounds))
    assert found is not None
    within = [each.timed.micro_batch for each in found.compared if each.ratio <= 1.01]
    assert found.timed.micro_batch == min(within)
    assert found.fastest.micro_batch in within and found.candidates
    assert found.is_sure <= (rounds >= 6)
    assert min(found.candidates) <= found.timed.micro_batch


def test_what_the_knee_frees_is_the_difference_of_the_tables_rows() -> None:
    rows = (PeakRow(8, 10 * MIB, 20 * MIB, 5 * MIB), PeakRow(64, 80 * MIB, 100 * MIB, 5 * MIB))
    plan = made_up_plan(
        peaks=rows,
        micro_batch=64,
        split=(64,) * 4,
        malloc_overhead=0.0,
        timed_sizes=noisy({8: 1.0, 64: 1.0}, 0.0001, 9),
    )
    assert "8 would free 80.0 MiB (predicted)" in (describe(plan) or "")


# That planning measures them.


class Seen:
    """Sizes in order. No list in the loss's closure: planning puts back what a loss holds, and so its lists."""

    __slots__ = ("sizes",)

    def __init__(self) -> None:
        self.sizes: list[int] = []


def workload(cost: Callable[[int], float], clock: list[float], least: int = 1) -> tuple[Workload, list[int]]:
    """A model whose micro-batches take what `cost` says, on a clock that nothing else moves."""
    seen = Seen()
    rng = random.Random(1)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        n = len(batch[0])
        if n < least and n != 2:  # with two samples planning itself begins
            raise ValueError("a model of somebody's that can't take so few samples")
        seen.sizes.append(n)
        clock[0] += cost(n) * rng.uniform(0.999, 1.001)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 4))
    return Workload(model, (torch.randn(4, 64), torch.randint(4, (4,))), loss=loss), seen.sizes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(times, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def flat_from(size: int) -> Callable[[int], float]:
    return lambda n: max(size, n) / 1000


def rounds(work: Workload, sizes: list[int], samples: int, seconds: float = 100.0) -> dict[int, tuple[float, ...]]:
    subject = RecordingTarget(open_context(work), work, CPU, None)
    found = times._rounds(subject, sizes, samples, seconds)
    return {n: tuple(each[n] for each in found) for n in found[0]} if found else {}


def test_an_optimizer_step_is_put_together_from_its_micro_batches(clock: list[float]) -> None:
    work, _ = workload(flat_from(8), clock)
    found = rounds(work, [1, 2, 4, 8, 16, 32], samples=64)
    assert list(found) == [1, 2, 4, 8, 16, 32]
    for n, seconds in found.items():
        assert len(seconds) == 15 and seconds == pytest.approx([64 / n * flat_from(8)(n)] * 15, rel=0.01)


def test_the_sizes_are_the_splits_own_and_those_into_powers_of_two_that_fit() -> None:
    assert times.candidate_sizes((57,) * 8 + (56,), 1) == (1, 2, 4, 8, 16, 32, 57)
    assert times.candidate_sizes((57,) * 8 + (56,), 2, lambda split: split[0] != 8) == (2, 4, 16, 32, 57)
    assert times.candidate_sizes((1000,), 1) == (8, 16, 32, 63, 125, 250, 500, 1000)
    assert times.candidate_sizes((1, 1), 1) == (1,)


def test_a_micro_batch_that_is_the_whole_batch_is_timed_as_it_is(clock: list[float]) -> None:
    work, seen = workload(flat_from(8), clock)
    found = rounds(work, [8, 16], samples=16, seconds=0.1)
    assert found[16] == pytest.approx([0.016] * len(found[16]), rel=0.01)
    assert seen[1:4] == [8, 8, 16]  # after two samples that ask what the loss counts


def test_sizes_that_the_model_cannot_take_are_left_out(clock: list[float]) -> None:
    work, _ = workload(flat_from(1), clock, least=3)
    assert list(rounds(work, [1, 2, 4, 8], samples=64)) == [2, 4, 8]
    assert all(p.grad is None for p in work.model.parameters())
    assert list(rounds(workload(flat_from(1), clock, least=5)[0], [1, 2, 4, 8], samples=64)) == [2, 8]
    assert rounds(workload(flat_from(1), clock, least=9)[0], [1, 4, 8], samples=64) == {}


def test_timing_ends_with_its_time(clock: list[float]) -> None:
    work, _ = workload(lambda n: n / 1000, clock)
    began = clock[0]
    found = rounds(work, [1, 32], samples=64, seconds=0.5)  # a round takes 34 ms
    assert len(found[1]) == 13 and 0.4 < clock[0] - began <= 0.5
    assert len(rounds(work, [1, 32], samples=64, seconds=0.0)[1]) == 1


def planned(work: Workload, **asked: Any) -> Plan:
    return fit_plan(work, target_batch=64, max_micro_batch=32, check=False, **asked)


def test_fastest_takes_the_knee_verified_and_everything_agrees_with_it(clock: list[float]) -> None:
    work, seen = workload(flat_from(8), clock)
    before = [p.clone() for p in work.model.parameters()]
    plan = planned(work, objective="fastest")
    assert plan.split == (8,) * 8 and plan.verified and plan.request.objective == "fastest"
    assert seen[-3:] == [8, 8, 8]  # the last that ran is the verification of that split
    assert "8 is the smallest micro-batch within 1 %" in plan.provenance.reasons["accumulation_steps"]
    assert "2 steps of up to 32 fit too" in plan.explain() and plan.largest_micro_batch == 32
    assert "this CPU" in plan.provenance.reasons["times"] and "\nknee" in plan.explain()
    table = what_if.table_of(plan)
    assert table is not None and what_if.answer(table, 64, plan.memory.budget.bytes).split == ((8, 8),)
    own = frames(plan)["plans"].query("accumulation_steps == 2")
    assert list(own["fits"]) == [True]
    assert all(torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True))
    assert all(p.grad is None for p in work.model.parameters())
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_keeps_to_the_fewest_steps_and_tells_the_knee_or_why_it_has_none(clock: list[float]) -> None:
    work, seen = workload(flat_from(8), clock)
    plan = planned(work, timing_seconds=100)
    assert plan.split == (32, 32) and plan.request.objective == "fewest-steps"
    found = knee(plan.timing.timed_sizes)
    assert found is not None and found.timed.micro_batch == 8 and found.is_sure
    short = planned(work, timing_seconds=1e-6)
    assert short.timing.timed_sizes == () and "timing_seconds=" in short.explain()
    seen.clear()
    assert planned(work, timing_seconds=0).timing.timed_sizes == () and len(seen) < 40


def test_what_has_no_times_is_refused_for_fastest_and_never_timed() -> None:
    work, _ = workload(flat_from(1), [0.0])
    for verify, computes in ((True, False), (False, True)):
        with pytest.raises(UsageError, match="without times"):
            resolve(PlanRequest(target_batch=64, objective="fastest", verify=verify), work, computes=computes)
    with pytest.raises(UsageError, match="without times"):
        fit_plan(work, objective="fastest")
    with pytest.raises(UsageError, match="not known"):
        fit_plan(work, target_batch=8, objective="largest")
    with pytest.raises(UsageError, match="timing_seconds is nan"):
        fit_plan(work, target_batch=8, timing_seconds=float("nan"))


@pytest.mark.parametrize(
    "args",
    [
        ["--objective", "quickest"],
        ["--objective", "fastest", "--target-batch", "8", "--gpu", "a100-40gb"],
        ["--objective", "fastest"],
    ],
)
def test_the_command_refuses_it_before_torch_is_loaded(args: list[str]) -> None:
    code = "import sys; sys.modules['torch'] = None; from autoaccum.cli import main; main()"
    out = subprocess.run([sys.executable, "-c", code, "plan", *args], capture_output=True, text=True)
    assert out.returncode == 2 and "objective" in out.stderr and out.stderr.count("\n") <= 3
