"""Windows of many micro-batches: replayed until a state returns, and to the byte as though all were replayed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Truth, random_truth, recorded_programs

from autoaccum.phases import BETWEEN, BUILD, FIRST, LATER, OPTIMIZER
from autoaccum.planning.evidence import Evidence
from autoaccum.planning.training_simulator import TrainingSimulator
from autoaccum.simulation import training_run
from autoaccum.simulation.cuda_allocator.allocator import EMPTY, CachingAllocator, CudaRules
from autoaccum.simulation.cuda_allocator.ties import TIE_RULES
from autoaccum.simulation.cuda_allocator.transitions import Transitions
from autoaccum.simulation.program import as_recorded, lift
from autoaccum.simulation.recording import Event, Phase, Recording
from autoaccum.simulation.scaling import Rule
from autoaccum.simulation.solver import balanced
from autoaccum.simulation.training_run import Training, TrainingReplay, replay_training, training_of

MiB = 2**20
SCALE = 1 << 13  # of rules: blocks of a few KiB to some hundred MiB
RULES = (
    CudaRules(),
    CudaRules(max_split_size_bytes=32 * MiB),
    CudaRules(expandable_segments=True),
    CudaRules(garbage_collection_threshold=0.5, allowed_bytes=400 * MiB),
    CudaRules(roundup_power2_divisions=(4,) * 16),
)


def in_full(training: Training, split: tuple[int, ...], rules: CudaRules, windows: int = 6) -> TrainingReplay:
    """All phases of all windows, one after the other, without looking at any state but those at windows' ends."""
    allocator, writer = CachingAllocator(rules), training_run.TrainingWriter(training)
    peaks: dict[str, int] = {}
    peak, retries, failed, before = 0, [0], None, None
    for window in range(-1, windows):
        for phase in phases_of(training, writer, split, window):
            found = allocator.run(phase)
            peaks[phase.name] = max(peaks.get(phase.name, 0), found.peak_reserved_bytes)
            peak, retries[-1] = max(peak, found.peak_allocated_bytes), retries[-1] + found.retries
            if found.out_of_memory:
                failed = phase.name
                break
        if window < 0:
            retries.clear()
        after = None if failed else state(allocator, writer)
        if failed or (window >= 2 and (after == before or retries[-1])):
            break
        before = after
        if window + 1 < windows:
            retries.append(0)
    return TrainingReplay(max(peaks.values()), peak, peaks, tuple(retries), failed)


def phases_of(training: Training, writer: Any, split: tuple[int, ...], window: int) -> Iterator[Phase]:
    if window < 0:
        yield from [Phase(BUILD, training.build)] * bool(training.build)
        return
    yield writer.first_of_all(split[0]) if window == 0 else writer.first(split[0], split[-1])
    for size, run in groupby(split[1:]):
        yield from writer.later(size, len(list(run)))
    yield writer.first_optimizer_step() if window == 0 else writer.phase(OPTIMIZER, split[-1])
    if BETWEEN in training.program.phases:
        yield writer.phase(BETWEEN, split[-1])


def state(allocator: CachingAllocator, writer: Any) -> object:
    live = [(role, event) for role in sorted(writer.live) for event in writer.live[role]]
    return [(role, event.bytes) for role, event in live], allocator.state_key(event.block for _, event in live)


def counted(training: Training, split: tuple[int, ...], rules: CudaRules) -> tuple[TrainingReplay, int]:
    """A replay, and of how many phases."""
    run, phases = CachingAllocator.run, []

    def counting(self: CachingAllocator, phase: Phase) -> Any:
        phases.append(phase.name)
        return run(self, phase)

    with mock.patch.object(CachingAllocator, "run", counting):
        return replay_training(training, split, rules), len(phases)


def training_of_truth(truth: Truth, build_bytes: int = 3 * MiB) -> Training:
    program = lift([truth.recording(5), truth.recording(7)])
    return training_of(program, truth.recording(3), (Event(1, build_bytes),))


def splits(rng: random.Random) -> tuple[int, ...]:
    """Runs of equal micro-batches, of up to 40 each."""
    size = rng.randint(2, 9)
    return (size,) * rng.randint(2, 40) + (size - 1,) * rng.choice((0, 1, 2, 17))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32), st.sampled_from(RULES), st.sampled_from(TIE_RULES), st.sampled_from([None, 1.0, 0.9, 0.7])
)
def test_a_long_window_is_to_the_byte_its_full_replay(
    seed: int, rules: CudaRules, tie: Any, part: float | None
) -> None:
    """With room, and at capacities between what is alive and what is reserved: retries are the same in number, too."""
    rng = random.Random(seed)
    training, split = training_of_truth(random_truth(rng, scale=SCALE)), splits(rng)
    rules = replace(rules, tie_rule=tie, addresses_down=seed % 2 == 1)
    expected = in_full(training, split, rules)
    assert replay_training(training, split, rules) == expected
    if part is not None:
        tight = replace(rules, capacity_bytes=int(expected.peak_reserved_bytes * part))
        assert replay_training(training, split, tight) == in_full(training, split, tight)


@pytest.mark.slow
def test_real_models_windows_are_to_the_byte_their_full_replays() -> None:
    """Recorded models, whose sizes become large enough for segments of their own."""
    for number, recorded in enumerate(recorded_programs(3)):
        larger = [
            replace(each, phases=tuple(Phase(p.name, tuple(grown(e) for e in p.events)) for p in each.phases))
            for each in recorded.recordings
        ]
        training = training_of(lift(larger), larger[0], ())
        for split in ((7,) * 13, (6,) * 5 + (5,) * 6):
            rules = CudaRules(tie_rule=TIE_RULES[number % 3])
            expected = in_full(training, split, rules)
            assert replay_training(training, split, rules) == expected
            tight = replace(rules, capacity_bytes=int(expected.peak_reserved_bytes * 0.95))
            assert replay_training(training, split, tight) == in_full(training, split, tight)


@pytest.mark.slow
@pytest.mark.parametrize("tie", TIE_RULES)
def test_a_window_of_thousands_takes_as_long_as_one_of_some(tie: Any) -> None:
    for recorded in (recorded_programs(4)[index] for index in (0, 1, 3)):
        training = training_of(lift(recorded.recordings), recorded.recordings[0], ())
        assert training.program.later_growth_bytes <= 0
        _, phases = counted(training, (7,) * 5_000, CudaRules(tie_rule=tie))
        assert phases < 2_000, recorded.name  # of up to 30,000 in six windows; most take 12


def grown(event: Event) -> Event:
    return Event(event.block, event.bytes * 509, event.stream)


def test_two_blocks_that_take_turns_are_a_cycle_of_two() -> None:
    """Each micro-batch keeps its last output until the next has made its own, in the other's place."""
    truth = Truth(temporaries=((Rule(30 * MiB), True),), carried=(Rule(12 * MiB),), carried_end=True)
    training = training_of_truth(truth)
    found, phases = counted(training, (7,) * 400, CudaRules())
    assert phases < 60 and found == in_full(training, (7,) * 400, CudaRules())


def test_retries_of_cycles_that_are_left_out_are_counted() -> None:
    """Two large blocks of unlike streams, for one of which there is room: each empties the other's cache."""
    one, other, kept = Event(1, 30 * MiB), Event(2, 40 * MiB, 7), Event(3, 12 * MiB)
    micro_batch = tuple(each for e in (one, other) for each in (e, e._replace(bytes=-e.bytes)))
    again = tuple(e._replace(block=10 + e.block) for e in micro_batch)
    last = Phase(OPTIMIZER, (Event(3, -kept.bytes),))
    recording = Recording(7, (Phase(FIRST, (kept, *micro_batch)), Phase(LATER, again), last))
    training, rules = training_of(as_recorded(recording), recording, ()), CudaRules(capacity_bytes=60 * MiB)
    expected = in_full(training, (7,) * 100, rules)
    found, phases = counted(training, (7,) * 100, rules)
    assert found == expected and min(found.retries) > 100 and phases < 40


def test_windows_that_share_stretches_are_to_the_byte_their_full_replays() -> None:
    """A search's windows, one after the other: what one showed is not replayed for the next."""
    for seed in range(6):
        rng, truth = random.Random(seed), random_truth(random.Random(seed), scale=SCALE)
        evidence = Evidence()
        evidence.recordings[:] = [truth.recording(5), truth.recording(7)]
        evidence.first_step = truth.recording(3)
        simulator = TrainingSimulator(evidence, (Event(1, 3 * MiB),), CudaRules(), EMPTY)
        training = training_of_truth(truth)
        most = replay_training(training, (9, 9, 9), CudaRules()).peak_reserved_bytes
        tight = rng.choice([None, *(int(most * part) for part in (0.6, 0.8, 0.95))])
        wanted = [(balanced(31, k), None if k == 20 else tight) for k in range(12, 31)]
        expected = [in_full(training, split, CudaRules(capacity_bytes=capacity)) for split, capacity in wanted]
        assert [simulator.replay(*each) for each in wanted] == expected


@pytest.mark.parametrize("seed", range(3))
def test_a_fraction_of_this_process_is_no_limit_to_what_a_window_would_take(seed: int) -> None:
    """A recording is tried where its window's peak is within the budget: a peak that the fraction cut off always is."""
    truth = random_truth(random.Random(seed), scale=SCALE)
    evidence = Evidence()
    evidence.recordings[:] = [truth.recording(5), truth.recording(7)]
    evidence.first_step = truth.recording(3)

    def simulator(rules: CudaRules) -> TrainingSimulator:
        return TrainingSimulator(evidence, (Event(1, 3 * MiB),), rules, EMPTY)

    free = simulator(CudaRules())
    allowed = free.replay((7, 7), None).peak_reserved_bytes
    limited = simulator(CudaRules(allowed_bytes=allowed))
    assert limited.replay((53, 53), allowed).out_of_memory is not None
    for capacity in (None, allowed - MiB, allowed, 2 * allowed):
        assert limited.replay((53, 53), capacity) == free.replay((53, 53), capacity), capacity
    assert limited.replay((53, 53), None).peak_reserved_bytes > allowed


@pytest.mark.parametrize(("capacity", "most"), [(110 * MiB, 3), (None, 30)])
def test_a_search_over_numbers_of_steps_replays_each_stretch_once(capacity: int | None, most: int) -> None:
    """Windows of two and one samples: the second micro-batch has no memory, or all have."""
    truth = Truth(temporaries=((Rule(0, per_sample=30 * MiB), True),), gradients=(Rule(20 * MiB),))
    training, known, rules = training_of_truth(truth), Transitions(), CudaRules(capacity_bytes=capacity)
    with mock.patch.object(CachingAllocator, "run", autospec=True, side_effect=CachingAllocator.run) as run:
        for steps in range(85, 160):
            found = replay_training(training, balanced(163, steps), rules, known=known)
            assert found.out_of_memory == (LATER if capacity else None)
    assert run.call_count <= most


@pytest.mark.parametrize("growing", [Rule(0, per_sample=1 * MiB), Rule(3 * MiB)])
def test_where_micro_batches_leave_blocks_behind_they_are_merged_as_before(growing: Rule) -> None:
    training, known = (
        training_of_truth(Truth(temporaries=((Rule(30 * MiB), False),), growing=(growing,))),
        Transitions(),
    )
    for count in (30, 31, 9, 30):
        for capacity in (None, 250 * MiB):
            rules = CudaRules(capacity_bytes=capacity)
            own = known if capacity is None else Transitions()
            assert replay_training(training, (9,) * count, rules, known=own) == in_full(training, (9,) * count, rules)
