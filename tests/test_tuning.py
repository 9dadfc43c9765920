"""Tuning's rooms: blocks, configurations applied and put back, the space, memory, the search."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_fields import changed_plan
from strategies import made_up_plan
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoaccum import NotConfirmed, Plan, PlanMismatch, Runner, SearchSpace, UsageError, Workload, configure, fit_plan
from autoaccum.configuration import LARGEST, Configuration, allocator_settings
from autoaccum.plan import PeakRow, window_peak_bytes
from autoaccum.simulation.solver import CAPACITY_MARGIN, split_within
from autoaccum.tuning import checkpointing as blocks
from autoaccum.tuning import session, timing
from autoaccum.tuning.apply import configured, implementations, plain
from autoaccum.tuning.finals import LEADER_TIME_RATIO, MAX_LEADERS, contenders, in_turn, time_in_turn
from autoaccum.tuning.fit_check import FitAnswer, FitChecker, answer_from
from autoaccum.tuning.request import TuningRequest
from autoaccum.tuning.result import Trial, TuningResult, ranked, summary
from autoaccum.tuning.search import Search, pareto_numbers
from autoaccum.tuning.space import (
    choices_for,
    combinations,
    micro_batches,
    neighbours,
    plain_values,
    read_space,
    size_of,
)
from autoaccum.tuning.study import open_study, read_trials, timing_lock
from autoaccum.window import step

MIB = 1 << 20


class Block(nn.Module):
    """A residual block with chance in it, and batch statistics where asked."""

    def __init__(self, width: int = 12, norm: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(width, 24), nn.Linear(24, width), nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.drop(self.two(torch.relu(self.one(self.norm(x)))))


class Stateful(Block):
    """A second forward isn't the first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        self.calls += 1
        return super().forward(x * self.calls, scale=scale)


def stack_of(make: Callable[[], nn.Module], count: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ModuleList([]), *[make() for _ in range(count)], nn.Linear(12, 3))


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], count: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList([make() for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.last(x)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.ReLU()) for c in (3, 4, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def workload(model: nn.Module | None = None, **more: Any) -> Workload:
    model = Net(Block) if model is None else model
    torch.manual_seed(1)
    shape = (6, 3, 8, 8) if isinstance(model, Images) else (6, 8)
    return Workload(model, (torch.randn(shape), torch.randint(3, (6,))), **more)


def test_blocks_are_the_longest_run_of_one_class() -> None:
    found = blocks.find_blocks(Net(Block))
    assert found is not None and (found.path, found.kind, len(found.modules)) == ("blocks", "Block", 5)
    mixed = nn.Sequential(
        nn.ModuleList([Block(), Stateful(), Stateful(), Stateful()]), nn.ModuleList([Block(), Block()])
    )
    found = blocks.find_blocks(mixed)
    assert found is not None and (found.path, found.kind, len(found.modules)) == ("0", "Stateful", 3)
    assert blocks.find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) is None
    assert blocks.find_blocks(nn.Sequential(Block(), nn.Linear(12, 12))) is None


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_under_checkpointing_is_the_plain_one_bit_for_bit(every: int, norm: bool, precision: str) -> None:
    """With dropout and batch normalization: same draws, and running statistics counted once."""
    work = workload(Net(lambda: Block(norm=norm)), precision=precision)
    assert blocks.gradient_differs(work, every) is None

    def trained(every: int) -> tuple[dict[str, torch.Tensor], int]:
        other = replace(work, model=copy.deepcopy(work.model), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        context = step.open_context(other)
        pieces = [tuple(leaf[:3] for leaf in work.sample), tuple(leaf[3:] for leaf in work.sample)]
        torch.manual_seed(2)
        with blocks.checkpointed(other.model, every):
            forwards = count_forwards(other.model)
            step.train_window(context, pieces, (3, 3))
        return other.model.state_dict(), forwards[0]

    one, plain_forwards = trained(0)
    other, forwards = trained(every)
    assert forwards - plain_forwards == 2 * len(range(0, 5, every))  # in each micro-batch, each of them once more
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def count_forwards(model: nn.Module) -> list[int]:
    seen = [0]

    def count(*_: Any) -> None:
        seen[0] += 1

    for block in model.blocks:  # type: ignore[union-attr]
        block.one.register_forward_hook(count)
    return seen


def test_a_block_whose_second_forward_is_another_is_found_out() -> None:
    assert "gradient of" in (blocks.gradient_differs(workload(Net(Stateful)), 1) or "")


def test_what_testing_checkpointing_touches_is_put_back() -> None:
    work = workload(Net(lambda: Block(norm=True)).eval())
    before, rng = copy.deepcopy(work.model.state_dict()), torch.get_rng_state()
    blocks.gradient_differs(work, 1)
    assert all(torch.equal(value, before[name]) for name, value in work.model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and not work.model.training
    assert all(p.grad is None for p in work.model.parameters())


def test_without_gradients_a_checkpointed_block_runs_once_and_a_copy_of_it_trains_itself() -> None:
    model = Net(Block)
    with blocks.checkpointed(model, 1):
        twin = copy.deepcopy(model)
        forwards = count_forwards(model)
        with torch.no_grad():
            model(torch.randn(2, 8))
        assert forwards == [5]
        twin(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in twin.parameters())


ALL = Configuration("bf16", 2, True, "fused", compile=True, loader_workers=2)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [lambda: Net(Block), Images])
def test_a_configured_workload_is_put_back_bit_for_bit(make: Callable[[], nn.Module], fails: bool) -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(TensorDataset(torch.randn(8, 8)), batch_size=2)
    work = workload(model, optimizer=optimizer, loader=loader)

    def state() -> Any:
        tensors = {name: (t.stride(), t.clone()) for name, t in model.state_dict().items()}
        attributes = [sorted(vars(module)) for module in model.modules()]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in (*optimizer.param_groups, optimizer.defaults)]
        return tensors, attributes, copy.deepcopy(groups), loader.num_workers, loader.prefetch_factor

    before = state()
    try:
        with configured(work, ALL) as changed:
            assert changed.precision == "bf16" and optimizer.param_groups[0]["fused"] and loader.num_workers == 2
            assert changed.configuration is not None and "checkpointing every 2nd block" in changed.configuration
            inside = state()
            assert inside[1] != before[1]
            if isinstance(model, Images):
                assert model.layers[0][0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
            if fails:
                raise RuntimeError("something of the user's")
    except RuntimeError:
        assert fails
    after = state()
    assert all(torch.equal(t, after[0][name][1]) and s == after[0][name][0] for name, (s, t) in before[0].items())
    assert before[1:] == after[1:] and all(
        p is q for p, q in zip(model.parameters(), work.model.parameters(), strict=True)
    )


def test_channels_last_gives_the_same_gradient_up_to_rounding() -> None:
    def gradient(last: bool) -> torch.Tensor:
        work = workload(Images().double())
        work = replace(work, sample=(work.sample[0].double(), work.sample[1]))
        with configured(work, Configuration(channels_last=last)) as changed:
            loss = nn.functional.cross_entropy(changed.model(changed.sample[0]), changed.sample[1])
            loss.backward()
            return torch.cat([p.grad.flatten() for p in work.model.parameters() if p.grad is not None])

    one, other = gradient(False), gradient(True)
    assert (one - other).norm() <= 1e-12 * one.norm()


@pytest.mark.parametrize("how", ["loop", "foreach", "fused"])
def test_an_optimizer_gets_the_implementation_and_the_same_step(how: str) -> None:
    work = workload()
    with configured(work, Configuration(optimizer=how)) as changed:
        optimizer = step.open_context(changed).optimizer
        group = optimizer.param_groups[0]
        assert (bool(group["foreach"]), bool(group["fused"])) == (how == "foreach", how == "fused")
        assert plain(changed).optimizer == how
        before = [p.detach().clone() for p in work.model.parameters()]
        for p in work.model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = [(a - b).abs().max() for a, b in zip(work.model.parameters(), before, strict=True)]
        assert all(abs(float(each) - 1e-3) < 1e-4 for each in moved)  # AdamW's first step is its learning rate


def test_what_an_optimizer_has_no_implementation_for_is_refused_in_words() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

    work = workload(optimizer=Own)
    assert implementations(step.open_context(work).optimizer) == ()
    with (
        pytest.raises(UsageError, match="Own has no 'fused' implementation"),
        configured(work, replace(ALL, loader_workers=None)) as changed,
    ):
        step.open_context(changed)
    model = Net(Block)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(UsageError, match="has state already"), configured(workload(model, optimizer=optimizer), ALL):
        pass


def test_fp16_gets_a_scaler_and_other_precisions_lose_it() -> None:
    with configured(workload(), Configuration("fp16")) as changed:
        assert changed.scaler is not None
        own = changed.scaler
    with configured(workload(precision="fp16", scaler=own), Configuration("fp16")) as changed:
        assert changed.scaler is own
    with configured(workload(precision="fp16", scaler=own), Configuration("bf16")) as changed:
        assert changed.scaler is None


def test_what_changes_numbers_is_named_and_checkpointing_is_not() -> None:
    base = Configuration("fp32", optimizer="loop")
    assert Configuration("fp32", 1, False, "loop", True, loader_workers=3, micro_batch=4).numerics(base) == {}
    assert set(ALL.numerics(base)) == {"precision", "channels_last", "optimizer", "compile"}


def test_a_plan_file_with_a_configuration_comes_back_and_one_without_is_read(tmp_path: Path) -> None:
    plan = made_up_plan()
    assert Plan.from_json(plan.to_json()) == plan
    assert Configuration.from_values(plan.schedule.configuration).checkpointing == 2
    old = json.loads(plan.to_json())
    del old["schedule"]["configuration"]
    assert Plan.from_json(json.dumps(old)).schedule.configuration == {}


def test_the_runner_takes_a_tuned_plan_with_its_configuration_only() -> None:
    configuration = Configuration("bf16", 1, optimizer="foreach")
    work = workload()
    with configured(work, configuration) as changed:
        plan = fit_plan(
            changed, target_batch=12, max_micro_batch=6, budget="8GiB", verify=False, train_in_new_process=True
        )
    assert plan.exactness.startswith(("exact", "same distribution"))
    plan = changed_plan(plan, configuration=configuration.values())
    with pytest.raises(PlanMismatch, match="configuration: planned 'bf16, checkpointing every block, foreach"):
        Runner(replace(work, precision="bf16", optimizer=lambda p: torch.optim.AdamW(p, foreach=True)), plan)
    ready = configure(work, plan)
    batch = tuple(torch.cat([leaf, leaf]) for leaf in work.sample)
    assert Runner(ready, plan).step(batch).split == (6, 6)
    assert "forward" in vars(work.model.blocks[0])  # type: ignore[index, arg-type]
    own = changed_plan(plan, configuration={**plan.schedule.configuration, "depth": 3})
    with pytest.raises(UsageError, match="no choice named 'depth'"):
        configure(workload(), own)


# The space.

FACTS: dict[str, Any] = {
    "plain": Configuration("fp32", optimizer="loop").values(), "optimizer": "AdamW",
    "implementations": ("loop", "foreach", "fused"), "blocks": "4 Block in blocks", "merges": False, "images": True,
    "loader": True, "least": 1, "fingerprint": {},
}  # fmt: skip


def choices(space: SearchSpace | None = None, **facts: Any) -> tuple[dict[str, Any], list[str]]:
    return choices_for(space or SearchSpace(), FACTS | facts, 64, on_cuda=False, virtual=False)


def test_the_space_is_narrowed_to_what_there_is_and_says_what_was_left_out() -> None:
    found, left_out = choices()
    assert found["micro_batch"] == (LARGEST, 4, 8, 16, 32) and found["checkpointing"] == (0, 1, 2) and not left_out
    assert "expandable_segments" not in found and "loader_workers" not in found and found["compile"] == (False,)
    found, left_out = choices(blocks=None, images=False, implementations=("loop",))
    assert (found["checkpointing"], found["channels_last"], found["optimizer"]) == ((0,), (False,), ("loop",))
    assert [text.split(":")[0] for text in left_out] == ["checkpointing", "optimizer", "channels_last"]
    assert "merged" in choices(merges=True)[1][0]
    virtual = choices_for(SearchSpace(compile=(False, True)), FACTS, 64, on_cuda=True, virtual=True)
    assert virtual[0]["compile"] == (False,) and virtual[0]["expandable_segments"] == (False, True)
    assert virtual[0]["precision"] == ("fp32", "bf16", "fp16") and "compiled for a virtual GPU" in virtual[1][0]
    assert micro_batches(512, 1) == (LARGEST, 4, 8, 16, 32, 64, 128) and micro_batches(3, 2) == (LARGEST,)


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ({"precision": ()}, "empty: there is no choice for precision"),
        ({"precision": ("fp8",)}, "cannot be 'fp8'"),
        ({"checkpointing": (0, -1)}, "checkpointing cannot be -1"),
        ({"micro_batch": (0,)}, "micro_batch cannot be 0"),
        ({"micro_batch": ("all",)}, "micro_batch cannot be 'all'"),
        ({"optimizer": ["loop"]}, "list, not a tuple"),
        ({"compile": (1,)}, "compile cannot be 1"),
        ({"optimizer": ("loop", "loop")}, "same choice twice"),
    ],
)
def test_a_space_that_can_not_be_is_refused_in_words(how: dict[str, Any], shown: str) -> None:
    with pytest.raises(UsageError, match=shown):
        SearchSpace(**how)


def test_the_space_is_read_from_the_command_line() -> None:
    found = read_space(["precision=fp32, bf16", "channels-last=no", "micro_batch=largest,8", "checkpointing=0,1"])
    assert found == SearchSpace(("fp32", "bf16"), (0, 1), (False,), micro_batch=(LARGEST, 8))
    for text, shown in (("speed=1", "names nothing"), ("precision", "names nothing"), ("precision=", "empty")):
        with pytest.raises(UsageError, match=shown):
            read_space([text])
    with pytest.raises(UsageError, match="given twice"):
        read_space(["precision=fp32", "precision=bf16"])


@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), min_size=1
    )
)
def test_neighbours_differ_in_one_choice_and_lead_everywhere(options: dict[str, list[int]]) -> None:
    grid = {name: tuple(values) for name, values in options.items()}
    everything = [json.dumps(each) for each in combinations(grid)]
    assert len(everything) == len(set(everything)) == size_of(grid)
    first = plain_values(grid, {})
    assert first == {name: values[0] for name, values in grid.items()}
    reached, waiting = {json.dumps(first)}, [first]
    while waiting:
        values = waiting.pop()
        for near in neighbours(values, grid):
            assert sum(near[name] != values[name] for name in grid) == 1
            if json.dumps(near) not in reached:
                reached.add(json.dumps(near))
                waiting.append(near)
    assert reached == set(everything)


# Memory.


def recorded(per_sample: int = MIB, budget: int = 100 * MIB, samples: int = 64, least: int = 1) -> dict[str, Any]:
    """A recording whose peaks are 20 MiB and so much a sample."""
    rows = [
        {"micro_batch": n, "first_bytes": 0, "later_bytes": 0, "optimizer_bytes": 0, "between_bytes": 0}
        for n in range(1, 65)
    ]
    for row in rows:
        row["first_bytes"] = row["later_bytes"] = 10 * MIB + per_sample * row["micro_batch"]
    usable = int(budget * (1 - CAPACITY_MARGIN))
    fitting = [n for n in range(1, 65) if 20 * MIB + per_sample * n <= usable]
    split = split_within(samples, max(fitting, default=1), least)
    table = {"rows": rows, "baseline_bytes": 10 * MIB, "history_bytes": 0, "malloc_overhead": 0.0, "sample_bytes": 0,
             "world_size": 1, "least": least, "most": None}  # fmt: skip
    peak = 20 * MIB + per_sample * split[0]
    return {"why": "", "split": list(split), "peak_bytes": peak, "budget_bytes": budget, "table": table}


@given(st.integers(1, 64), st.integers(30 * MIB, 200 * MIB), st.integers(1, 2))
def test_an_answer_is_what_the_table_of_peaks_says(n: int, budget: int, least: int) -> None:
    shown = recorded(budget=budget, least=least)
    answer = answer_from(shown, n, 64)
    assert answer.split == split_within(64, n, least)
    row = PeakRow(answer.split[0], *[10 * MIB + MIB * answer.split[0]] * 2, 0)
    peak = 10 * MIB + window_peak_bytes(row, row, row, len(answer.split))
    assert answer.peak_bytes == peak and answer.fits == (peak <= int(budget * (1 - CAPACITY_MARGIN)))
    assert answer.fits or "at most" in answer.why
    largest = answer_from(shown, LARGEST, 64)
    assert (largest.fits and len(largest.split) <= len(answer.split)) or not answer.fits


def test_one_recording_serves_all_that_needs_memory_alike() -> None:
    made: list[Configuration] = []
    kept: dict[str, Any] = {}

    def record(configuration: Configuration) -> dict[str, Any]:
        made.append(configuration)
        return recorded()

    memory = FitChecker(record, kept.get, kept.__setitem__)
    for size in (LARGEST, 4, 8, 64):
        for workers in (None, 0, 2):
            memory.answer(Configuration(micro_batch=size, loader_workers=workers), 64)
    assert len(made) == 1 and memory.questions == 12
    memory.answer(Configuration(checkpointing=1), 64)
    assert len(made) == 2 and len(kept) == 2
    again = FitChecker(record, kept.get, kept.__setitem__)  # another process, the same study
    again.answer(Configuration(checkpointing=1, micro_batch=8), 64)
    assert len(made) == 2 and again.recordings == 0


# The search, on a machine that is made up.

GRID = {
    "precision": ("fp32", "bf16"), "micro_batch": (LARGEST, 4, 8, 16, 32), "checkpointing": (0, 1, 2),
    "optimizer": ("loop", "foreach", "fused"),
}  # fmt: skip
PLAIN = {"precision": "fp32", "micro_batch": LARGEST, "checkpointing": 0, "optimizer": "loop"}


def seconds(configuration: Configuration, answer: FitAnswer) -> float:
    cost = {"fp32": 1.0, "bf16": 0.6}[configuration.precision] + {"loop": 0.2, "foreach": 0.15, "fused": 0.1}[
        configuration.optimizer
    ]
    return cost * (1 + 0.2 * bool(configuration.checkpointing)) * (1 + abs(answer.split[0] - 16) / 100)


class Machine:
    """Times by a formula; recordings by `recorded`, with half the memory for checkpointing and for bf16."""

    def __init__(self, budget: int = 60 * MIB, fails_at: int | None = None) -> None:
        self.budget, self.fails_at = budget, fails_at
        self.timed: list[Configuration] = []

    def record(self, configuration: Configuration) -> dict[str, Any]:
        factor = (1 if configuration.precision == "fp32" else 2) * (2 if configuration.checkpointing else 1)
        return recorded(4 * MIB // factor, self.budget)

    def time(self, configuration: Configuration, answer: FitAnswer, best: float | None) -> list[float]:
        if len(self.timed) == self.fails_at:
            self.fails_at = None
            raise KeyboardInterrupt
        self.timed.append(configuration)
        assert answer.fits
        return [seconds(configuration, answer)] * 3


def search(
    machine: Machine,
    *,
    sampler: str = "tpe",
    trials: int = 1000,
    file: str | None = None,
    virtual: bool = False,
    **how: Any,
) -> Search:
    identity = {"target_batch": 64} | how.pop("identity", {})
    study = open_study(file, identity, sampler, how.pop("pareto", False), seed=0)
    return Search(
        study=study, choices=how.pop("choices", GRID), plain=how.pop("plain", PLAIN),
        base={"precision": "fp32"}, samples=64,
        fit_checker=FitChecker(machine.record, lambda key: None, lambda key, shown: None),
        timer=None if virtual else machine.time, sampler=sampler, trials=trials,
        until=how.pop("until", None), seed=0, report=lambda text: None, **how,
    )  # fmt: skip


def best_of(found: Search) -> Trial:
    return min((t for t in read_trials(found.study) if t.counts), key=lambda t: t.order(found.ranking))


def test_the_grid_tries_all_and_what_can_not_fit_is_never_run() -> None:
    machine = Machine()
    found = search(machine, sampler="grid")
    found.run()
    trials = read_trials(found.study)
    assert len(trials) == size_of(GRID) == len({json.dumps(dict(t.configuration), sort_keys=True) for t in trials})
    pruned = [t for t in trials if t.state == "pruned"]
    assert {(t.configuration["precision"], t.configuration["checkpointing"], t.micro_batch) for t in pruned} == {
        ("fp32", 0, 16), ("fp32", 0, 32), ("fp32", 1, 32), ("fp32", 2, 32), ("bf16", 0, 32),
    }  # fmt: skip
    assert all(
        "8 steps of at most 8 fit" in t.why
        for t in pruned
        if t.configuration["precision"] == "fp32" and not t.configuration["checkpointing"]
    )
    assert len(machine.timed) == sum(t.state == "measured" for t in trials)
    same = [t for t in trials if t.state == "same"]  # the largest that fits under bf16 and checkpointing is 32
    assert len(machine.timed) + len(pruned) + len(same) == len(trials)
    states = [t.state.name for t in found.study.get_trials()]
    assert states.count("PRUNED") == len(pruned) and all(
        "pruned because" in t.user_attrs for t in found.study.get_trials() if t.state.name == "PRUNED"
    )


def test_identical_configurations_are_answered_from_the_study() -> None:
    machine = Machine(budget=1000 * MIB)
    found = search(machine, sampler="grid", choices=GRID | {"micro_batch": (LARGEST, 64)})
    found.run()
    trials = read_trials(found.study)
    assert [t.state for t in trials].count("same") == len(machine.timed) == len(trials) // 2
    assert all(t.step_seconds is not None and "the same as trial" in t.why for t in trials if t.state == "same")


@pytest.mark.parametrize("budget", [60 * MIB, 1000 * MIB])
def test_the_best_of_the_grid_is_found_in_a_quarter_of_its_trials(budget: int) -> None:
    grid = search(Machine(budget), sampler="grid")
    grid.run()
    machine = Machine(budget)
    found = search(machine, trials=size_of(GRID) // 4)
    found.run()
    trials = read_trials(found.study)
    assert len([t for t in trials if t.state != "same"]) == size_of(GRID) // 4
    assert dict(trials[0].configuration) == {"precision": "fp32", **PLAIN}  # the plain one is there to compare with
    assert best_of(found).step_seconds == best_of(grid).step_seconds


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_choices_that_do_not_depend_on_each_other_are_settled_in_one_pass_over_their_options(chance: Any) -> None:
    choices = GRID | {"micro_batch": (64, 32)}
    costs = {name: {option: chance.uniform(1, 2) for option in options} for name, options in choices.items()}

    class Separable(Machine):
        def time(self, configuration: Configuration, answer: FitAnswer, best: float | None) -> list[float]:
            values = {name: getattr(configuration, name) for name in choices}
            return [math.prod(costs[name][value] for name, value in values.items())] * 3

    machine = Separable(budget=1000 * MIB)
    plain = PLAIN | {"micro_batch": 64}
    found = search(machine, choices=choices, plain=plain, trials=1 + sum(len(each) - 1 for each in choices.values()))
    found.run()
    assert best_of(found).step_seconds == pytest.approx(math.prod(min(each.values()) for each in costs.values()))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_sampler_ends_when_all_was_tried_and_times_nothing_twice(sampler: str) -> None:
    small = GRID | {"micro_batch": (LARGEST, 8), "optimizer": ("loop", "fused")}
    machine = Machine()
    found = search(machine, sampler=sampler, choices=small)
    found.run()
    known = {json.dumps(dict(t.configuration)) for t in read_trials(found.study)}
    assert len(known) == size_of(small) and len(machine.timed) == len(set(map(repr, machine.timed)))


def test_memory_alone_ranks_by_steps_then_bytes_() -> None:
    found = search(Machine(), sampler="grid", virtual=True)
    found.run()
    best, everything = best_of(found), read_trials(found.study)
    assert len(everything) == size_of(GRID) and {t.state for t in everything} == {"ranked", "pruned", "same"}
    steps = min(t.accumulation_steps or 99 for t in everything if t.counts)
    least = min(t.peak_bytes or 0 for t in everything if t.counts and t.accumulation_steps == steps)
    assert (best.accumulation_steps, best.peak_bytes) == (steps, least) and best.step_seconds is None
    values = [t.value for t in found.study.get_trials() if t.state.name == "COMPLETE"]
    assert found.study.best_trial.number == best.number or min(values) == found.study.trials[best.number].value


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path) -> None:
    file = str(tmp_path / "study.db")
    small = GRID | {"micro_batch": (LARGEST, 8), "optimizer": ("fused",)}
    machine = Machine(fails_at=5)
    first = search(machine, sampler="grid", file=file, choices=small)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    killed = first.study.ask()  # as a worker leaves it that was killed
    killed.set_user_attr("process", "elsewhere:0")
    search(machine, sampler="grid", file=file, choices=small).run()
    search(machine, sampler="grid", file=file, choices=small).run()
    once = [repr(each) for each in machine.timed]
    reference = Machine()
    search(reference, sampler="grid", choices=small).run()
    assert len(once) == len(set(once)) and set(once) == {repr(each) for each in reference.timed}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_search() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored

    class Dropping(Machine):
        def time(self, configuration: Configuration, answer: FitAnswer, best: float | None) -> list[float]:
            if len(self.timed) == 2:
                weakref.finalize(Machine(), os.kill, os.getpid(), signal.SIGINT)  # nobody else has it: it dies here
            return super().time(configuration, answer, best)

    machine = Dropping()
    with pytest.raises(KeyboardInterrupt):
        search(machine, sampler="grid").run()
    assert len(machine.timed) == 3
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_study_for_something_else_is_refused_in_words(tmp_path: Path) -> None:
    file = str(tmp_path / "study.db")
    search(Machine(), trials=1, file=file).run()
    with pytest.raises(UsageError, match="target_batch: 64 there, 128 here"):
        search(Machine(), file=file, identity={"target_batch": 128})
    with pytest.raises(UsageError, match="objectives: 1 there, 2 here"):
        search(Machine(), file=file, pareto=True)
    (tmp_path / "text.db").write_text("this is no database, and long enough to be looked at " * 20)
    with pytest.raises(UsageError, match="can't be used"):
        search(Machine(), file=str(tmp_path / "text.db"))


def test_a_timeout_begins_no_further_trial_and_failures_are_reported() -> None:
    machine = Machine()
    search(machine, until=time.monotonic()).run()
    assert machine.timed == []

    class Broken(Machine):
        def time(self, configuration: Configuration, answer: FitAnswer, best: float | None) -> list[float]:
            if configuration.precision == "bf16":
                raise RuntimeError("no kernel for that\nand more lines")
            return super().time(configuration, answer, best)

    found = search(Broken(), trials=12)
    found.run()
    failed = [t for t in read_trials(found.study) if t.state == "failed"]
    assert failed and {t.why for t in failed} == {"no kernel for that"} and best_of(found).step_seconds


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_pareto_set_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    trials = [Trial(i, "measured", {}, 1, 1, float(s), 3, b) for i, (s, b) in enumerate(points)]
    found = pareto_numbers(trials, "seconds")
    for i, (s, b) in enumerate(points):
        beaten = any(x <= s and y <= b and (x < s or y < b) for x, y in points)
        assert (i in found) == (not beaten)


def test_with_two_objectives_optunas_own_pareto_set_is_ours() -> None:
    found = search(Machine(), sampler="grid", pareto=True)
    found.run()
    mine = pareto_numbers(read_trials(found.study), found.ranking)
    theirs = {t.number for t in found.study.best_trials if read_trials(found.study)[t.number].counts}
    assert len(mine) > 1 and mine == theirs


def test_who_times_waits_for_who_times(tmp_path: Path) -> None:
    order: list[str] = []

    def other() -> None:
        with timing_lock(str(tmp_path / "a.db"), order.append):
            order.append("second")

    with timing_lock(str(tmp_path / "a.db")):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == [f"waiting for another tuning, which holds {tmp_path / 'a.db.lock'}", "first", "second"]
    found = search(Machine(), trials=1, lock=lambda: timing_lock(str(tmp_path / "a.db")))
    found.run()
    assert best_of(found).counts


# Those that lead, in turn.

SMALL = GRID | {"micro_batch": (LARGEST,), "checkpointing": (0,)}


def luck(configuration: Configuration) -> float:
    """The best one, bf16 with the fused optimizer, is unlucky by itself; one that is 7 % slower is lucky."""
    how = (configuration.precision, configuration.optimizer)
    return {("bf16", "fused"): 1.2, ("bf16", "foreach"): 0.95}.get(how, 1.0)


class Moody(Machine):
    """A machine that is faster or slower than it should be for whoever is timed by itself, and slow in turns."""

    def __init__(self, mood: Callable[[Configuration], float], fails: str = "") -> None:
        super().__init__(budget=1000 * MIB)
        self.mood, self.fails, self.rounds = mood, fails, 0

    def time(self, configuration: Configuration, answer: FitAnswer, best: float | None) -> list[float]:
        return [self.mood(configuration) * each for each in super().time(configuration, answer, best)]

    def turns(self, asked: dict[int, tuple[Configuration, FitAnswer]], most_seconds: float) -> Any:
        self.rounds += 1
        fine = {number: pair for number, pair in asked.items() if pair[0].optimizer != self.fails}
        failed = {number: "it broke" for number in asked if number not in fine}
        return {number: [1.1 * seconds(*pair)] * 7 for number, pair in fine.items()}, failed


def moody_search(machine: Moody, room_bytes: int = 1 << 40, **how: Any) -> Search:
    found = search(machine, sampler="grid", turn_timer=machine.turns, **how)
    found.run()
    time_in_turn(found, 2000, room_bytes)
    return found


def test_a_lucky_one_falls_back_in_turn_with_others_and_who_was_unlucky_wins() -> None:
    found = moody_search(Moody(luck), choices=SMALL)
    timed_alone, trials = read_trials(found.study, timed_alone=True), read_trials(found.study)
    assert ranked(timed_alone, "seconds")[0].configuration["optimizer"] == "foreach"
    best = ranked(trials, "seconds")[0]
    assert (best.configuration["precision"], best.configuration["optimizer"], best.turns) == ("bf16", "fused", 7)
    assert best.step_seconds == pytest.approx(1.1 * 0.7 * 1.48)
    assert trials[0].turns == 7 and trials[0].step_seconds == pytest.approx(1.1 * 1.2 * 1.48)  # what is gained is fair
    tuned = TuningResult(made_up_plan(), tuple(trials), "seconds", size_of(SMALL), plain=0)
    shown = summary(tuned)
    assert (
        "measured; the leading ones and the plain one in turn, 7 rounds of 4" in shown and "1.71 times as fast" in shown
    )
    assert tuned.table().count("(in turn)") == 4


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_whatever_the_moods_the_best_of_those_in_turn_wins(chance: Any) -> None:
    factors = {json.dumps(values): chance.uniform(0.8, 1.25) for values in combinations(GRID)}
    machine = Moody(lambda chosen: factors[json.dumps({name: chosen.values()[name] for name in GRID})])
    found = moody_search(machine)
    timed_alone, trials = read_trials(found.study, timed_alone=True), read_trials(found.study)
    in_turn = [t for t in trials if t.turns]
    chosen = {t.number for t in contenders(timed_alone, 0, 1 << 40, 1000)}
    assert {t.number for t in in_turn} == chosen and 2 <= len(chosen) <= MAX_LEADERS + 1 and 0 in chosen
    slowest = max(t.step_seconds or 0 for t in timed_alone if t.number in chosen and t.number != 0)
    others = [t for t in timed_alone if t.state == "measured" and t.number not in chosen]
    fastest = min(t.step_seconds or 0 for t in timed_alone if t.state == "measured")
    assert all((t.step_seconds or 0) >= min(slowest, LEADER_TIME_RATIO * fastest) for t in others)
    best = ranked(trials, "seconds")[0]
    least = min(t.step_seconds or 0 for t in in_turn)
    assert best.turns and (best.step_seconds or 0) <= 1.01 * least


def test_turns_are_kept_and_taken_where_memory_has_room_for_all(tmp_path: Path) -> None:
    machine = Moody(luck)
    file = str(tmp_path / "study.db")
    for _ in range(2):
        found = moody_search(machine, choices=SMALL, file=file)
        assert ranked(read_trials(found.study), "seconds")[0].configuration["optimizer"] == "fused"
        assert machine.rounds == 1
    peak = max(t.peak_bytes or 0 for t in read_trials(found.study))
    for room, least in ((peak, 0), (2 * peak, 2), (3 * peak, 3)):
        trials = read_trials(moody_search(machine, room, choices=SMALL).study)
        count = sum(t.turns > 0 for t in trials)
        assert count >= least and bool(trials[0].turns) == (count > 0)
        assert sum(t.peak_bytes or 0 for t in trials if t.turns) <= room
    timed_alone = read_trials(found.study, timed_alone=True)
    counts = []
    for allowed in (5, 15, 20, 30, 100):  # a step takes a second or two
        chosen = contenders(timed_alone, 0, 1 << 40, allowed)
        assert 7 * sum(t.step_seconds or 0 for t in chosen) <= allowed  # of each two, one, and the fewest rounds, four
        counts.append(len(chosen))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] >= 4
    virtual = search(machine, sampler="grid", choices=SMALL, virtual=True)
    virtual.run()
    time_in_turn(virtual, 60, 1 << 40)
    assert not any(t.turns for t in read_trials(virtual.study))


def test_who_fails_in_turn_is_no_winner() -> None:
    trials = read_trials(moody_search(Moody(luck, fails="fused"), choices=SMALL).study)
    failed = [t for t in trials if t.state == "failed"]
    assert failed and all(t.why == "in turn with others: it broke" for t in failed)
    assert ranked(trials, "seconds")[0].configuration["optimizer"] == "foreach"


def test_where_the_winners_plan_is_not_confirmed_the_next_best_in_turn_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = read_trials(moody_search(Moody(luck), choices=SMALL).study)
    trials = [replace(t, turns=0, step_seconds=0.5) if t.turns == 0 else t for t in trials]  # faster, by themselves
    tried: list[Any] = []

    def call(task: str, arguments: dict[str, Any], **how: Any) -> dict[str, Any]:
        tried.append(arguments["values"])
        if len(tried) == 1:
            raise NotConfirmed("it took more")
        return {"plan": made_up_plan().to_json()}

    monkeypatch.setattr(session, "call", call)
    request = TuningRequest(64, SearchSpace())
    _, winner, refused = session._Session(lambda message: None, "mine", request).confirmed(trials)
    first, second = (ranked(left, "seconds")[0] for left in (trials, [t for t in trials if t.number not in refused]))
    assert refused == {first.number: "it took more"} and winner == second and winner.turns and len(tried) == 2


def test_contenders_take_turns_in_copies_that_live_on(tmp_path: Path) -> None:
    log = tmp_path / "turns"

    def windows(name: str, seconds: float, fails_at: int = 99, how: Callable[[], None] = lambda: None) -> Any:
        made = os.getpid()
        for number in range(99):
            assert os.getpid() == made
            if number == fails_at:
                how()
                raise RuntimeError("three are\nenough")
            with log.open("a") as file:
                file.write(name)
            yield seconds

    works = {
        "a": lambda: windows("a", 0.3),
        "b": lambda: windows("b", 0.25),
        "c": lambda: windows("c", 0.07),
        "x": lambda: windows("x", 0.3, fails_at=3),
        "y": lambda: windows("y", 0.3, fails_at=0, how=lambda: os._exit(1)),
    }
    seconds, failed = in_turn(works, max_seconds=0)
    assert seconds == {"a": [0.3] * 4, "b": [0.25] * 4, "c": pytest.approx([0.07] * 4)}
    assert failed == {"x": "RuntimeError: three are", "y": "it died without a word"}
    # Three windows of c take as long as a turn has to. The first turn of each isn't counted.
    assert log.read_text()[:18] == "abcccx" + "abcccx" + "bcccxa"
    assert in_turn({"x": works["y"]}, max_seconds=0) == ({}, {"x": "it died without a word"})


def test_of_those_as_good_as_the_best_what_changes_fewest_numbers_comes_first() -> None:
    def trial(number: int, seconds: float, *numerics: str) -> Trial:
        named = dict.fromkeys(numerics, "changed")
        return Trial(number, "measured", {}, 8, 1, seconds, 3, MIB, numerics=named)

    fast, near, plain_one = trial(0, 1.0, "precision", "optimizer"), trial(1, 1.005, "optimizer"), trial(2, 1.009)
    slower = trial(3, 1.011)
    assert [t.number for t in ranked([slower, plain_one, near, fast], "seconds")] == [2, 0, 1, 3]
    assert [t.number for t in ranked([slower, near, fast], "seconds")] == [1, 0, 3]
    assert [t.number for t in ranked([slower, fast], "seconds")] == [0, 3]


def test_the_table_and_the_summary_tell_ranks_reasons_and_what_changes_numbers() -> None:
    found = search(Machine(), trials=20)
    found.run()
    trials = tuple(read_trials(found.study))
    tuned = TuningResult(made_up_plan(), trials, "seconds", size_of(GRID), ("left out: a thing",), plain=0)
    table = tuned.table().splitlines()
    assert table[1].split()[0] == "1" and f"{tuned.best.step_seconds:.4g}" in table[1]
    assert sum("(plain)" in line for line in table) == 1 and sum("pruned: " in line for line in table) >= 1
    shown = summary(tuned)
    assert "times as fast as the plain one" in shown and "autocast in bf16" in shown and "left out: a thing" in shown
    data = json.loads(tuned.to_json())
    assert data["kind"] == "autoaccum tuning" and len(data["trials"]) == len(trials)


def test_the_allocators_other_settings_are_kept() -> None:
    both = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:False"}
    assert allocator_settings(both) == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}
    assert allocator_settings({}) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def test_run_sets_the_allocators_variable_where_the_plan_was_tuned_with_it() -> None:
    from autoaccum.cli.run import _environment

    plan = made_up_plan()
    assert _environment(plan) is None
    settings = {"device_name": "NVIDIA A100", "configuration": {"expandable_segments": True}}
    shown = _environment(changed_plan(plan, **settings)) or {}
    assert "expandable_segments:True" in shown["PYTORCH_CUDA_ALLOC_CONF"] and "PATH" in shown


def test_windows_are_timed_after_two_that_do_not_count_and_a_hopeless_one_is_left_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    trained: list[tuple[int, ...]] = []

    def train(context: Any, pieces: Any, sizes: tuple[int, ...]) -> None:
        trained.append(tuple(sizes))
        assert [len(piece[0]) for piece in pieces] == list(sizes)
        clock[0] += 9.0 if len(trained) <= 2 else 0.25

    monkeypatch.setattr(timing.step, "train_window", train)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def timed(**how: Any) -> list[float]:
        trained.clear()
        return timing.timed_windows(workload(), (4, 3), **{"best": None, "from_loader": False} | how)

    assert timed() == [0.25] * 4 and trained == [(4, 3)] * 6  # a second's worth
    assert timed(best=0.2) == [0.25] * 4 and timed(best=0.1) == [0.25] * 2
    assert timed(max_windows=2, min_windows=1) == [0.25] * 2


def test_windows_from_the_loader_are_whole_ones_epoch_after_epoch() -> None:
    data = TensorDataset(torch.randn(10, 8), torch.randint(3, (10,)))
    work = workload(loader=lambda: DataLoader(data, batch_size=2))
    found = [window.sizes for window, _ in zip(timing._from_loader(work, (2, 2)), range(5), strict=False)]
    assert found == [(2, 2)] * 5
    short = timing._from_loader(work, (8, 8))
    assert [sum(next(short).sizes) for _ in range(3)] == [10, 10, 10]
