"""Step programs lifted from recordings: windows of any split, event for event."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PRIMES, Recorded, Truth, recorded_programs, traced, truths

from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.simulation.program import StepProgram, as_recorded, lift, window
from autoaccum.simulation.recording import Event, Phase, Recording, kept_blocks, live_peak, name_blocks
from autoaccum.simulation.scaling import Rule, size_rules

RECORDED = recorded_programs()
WINDOWS = (1, 2, 3, 7)


def own_events(recording: Recording) -> list[tuple[str, int]]:
    """A recording's events, those of blocks left out that it didn't allocate itself."""
    made = {event.block for phase in recording.phases for event in phase.events if event.bytes > 0}
    return [(phase.name, event.bytes) for phase in recording.phases for event in phase.events if event.block in made]


def check_sound(phases: list[Phase]) -> Counter[int]:
    """Each block is allocated once, freed at most once, after that, whole; returns the sizes that are left."""
    live: dict[int, int] = {}
    seen: set[int] = set()
    for event in (event for phase in phases for event in phase.events):
        if event.bytes > 0:
            assert event.block not in seen
            seen.add(event.block)
            live[event.block] = event.bytes
        else:
            assert live.pop(event.block) == -event.bytes
    return Counter(live.values())


# What lifting must find out, size by size.


def predicted(rule: Rule, n: int, m: int, at: int, others: tuple[Rule, ...] = ()) -> int:
    """What is said of `rule` at `at`, by recordings at n and m in which `others` stand beside it."""
    every = (rule, *others)
    return size_rules([r.at(n) for r in every], n, [r.at(m) for r in every], m)[rule.at(n)].at(at)


@pytest.mark.parametrize(("n", "m"), [(7, 5), (13, 11), (31, 17), (101, 53)])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(4099),
        Rule(7 * 13 * 31 * 101 * 5),  # a constant that the prime happens to divide
        Rule(0, per_sample=4096),
        Rule(0, per_pair=64),
        Rule(100_003, per_sample=4096),  # a workspace of a + b n
    ],
)
def test_a_rule_is_given_back_exactly(rule: Rule, n: int, m: int) -> None:
    assert [predicted(rule, n, m, at) for at in (1, 2, n, 2 * n, 1000)] == [
        rule.at(at) for at in (1, 2, n, 2 * n, 1000)
    ]


def test_a_constant_that_the_prime_divides_stays_apart_from_what_scales() -> None:
    constant, scaling = Rule(7 * 1000), Rule(0, per_sample=4096)
    assert predicted(constant, 7, 5, 70, (scaling, Rule(3))) == 7000
    assert predicted(scaling, 7, 5, 70, (constant, Rule(3))) == 4096 * 70


def test_where_two_explanations_stand_there_as_often_the_one_that_scales_is_taken() -> None:
    # 700 at n=7 is a constant or 100 n; at m=5 both 700 and 500 stand there, each once.
    assert size_rules([700], 7, [700, 500], 5)[700] == Rule(0, per_sample=700, divisor=7)
    assert size_rules([4900], 7, [4900, 2500], 5)[4900].per_pair > 0


@pytest.mark.parametrize("per_sample", [50, 197, 1000])
def test_rows_padded_to_sixteen_are_predicted_within_a_rounding(per_sample: int) -> None:
    def padded(n: int) -> int:
        return -(-per_sample * n // 16) * 16 * 512

    rules = size_rules([padded(31)], 31, [padded(17)], 17)
    for at in (31, 37, 62):
        assert rules[padded(31)].at(at) == pytest.approx(padded(at), rel=0.03)
    assert rules[padded(31)].at(31) == padded(31)


def test_a_saturated_workspace_stays_where_it_was_saturated_in_both_recordings() -> None:
    cap = 108 * 2**20
    sizes = {n: [min(10 * 2**20 * n, cap), 4096 * n] for n in (17, 31)}
    assert size_rules(sizes[31], 31, sizes[17], 17)[cap].at(100) == cap


@pytest.mark.parametrize("cap", [108 * 2**20, 31 * 2**20, 31 * 31 * 2**15 + 1])
def test_a_workspace_that_saturated_between_the_recordings_is_never_under_its_size(cap: int) -> None:
    slope = cap // 20  # saturated at 31, not yet at 17
    sizes = {n: [min(slope * n, cap), 4096 * n] for n in (17, 31)}
    rule = size_rules(sizes[31], 31, sizes[17], 17)[cap]
    assert all(rule.at(n) >= min(slope * n, cap) for n in (31, 40, 80))


@given(
    sizes=st.lists(st.integers(1, 10**7), min_size=1, max_size=30), others=st.lists(st.integers(1, 10**7), max_size=30)
)
def test_every_size_has_a_rule_that_says_itself_at_its_own_micro_batch_and_never_falls(
    sizes: list[int], others: list[int]
) -> None:
    rules = size_rules(sizes, 13, others, 7)
    assert set(rules) == set(sizes)
    for size, rule in rules.items():
        assert rule.at(13) == size
        assert all(a <= b for a, b in itertools.pairwise(rule.at(n) for n in (1, 2, 5, 13, 14, 26, 1000)))


# What lifting must find out, program by program.


@given(truth=truths(scale=1_000_003), primes=st.sampled_from(list(itertools.combinations(PRIMES, 2))))
def test_a_lifted_program_at_its_recorded_size_is_the_recording_event_for_event(
    truth: Truth, primes: tuple[int, int]
) -> None:
    low, high = primes
    recording = truth.recording(high)
    for program in (lift([recording, truth.recording(low)]), as_recorded(recording)):
        written = without_leftover(program, window(program, (high, high)))
        assert traced(written) == own_events(recording) == truth.window((high, high))
        assert live_peak(written) == live_peak(
            [Phase(p.name, tuple(e for e in p.events if e.block > 0)) for p in recording.phases]
        )


def without_leftover(program: StepProgram, phases: list[Phase]) -> list[Phase]:
    """The phases without the blocks that the window before left behind, which come first."""
    left = {event.block for event in phases[0].events[: len(program.leftover)]}
    return [Phase(p.name, tuple(e for e in p.events if e.block not in left)) for p in phases]


def test_what_the_window_before_left_behind_is_there_until_the_first_micro_batch_frees_it() -> None:
    def recording(n: int) -> Recording:
        first = (Event(1, 100 * n), Event(-1, -100 * n))
        later = (Event(2, 100 * n), Event(1, -100 * n))
        return Recording(n, (Phase(FIRST, first), Phase(LATER, later), Phase(OPTIMIZER, ())))

    program = lift([recording(5), recording(7)])
    for split in ((9,), (9, 9, 8)):
        phases = window(program, split)
        assert [event.bytes for event in phases[0].events] == [100 * split[-1], 900, -100 * split[-1]]
        assert check_sound(phases) == Counter({100 * split[-1]: 1})
        assert live_peak(phases) == 900 + 100 * max(split[-1], split[1] if len(split) > 1 else 0)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
def test_a_real_model_lifted_is_its_recording_event_for_event_at_the_recorded_size(recorded: Recorded) -> None:
    low, high = recorded.recordings
    for program in (lift([low, high], recorded.first_step_events), as_recorded(high, recorded.first_step_events)):
        written = without_leftover(program, window(program, (high.micro_batch,) * 2))
        assert traced(written) == own_events(high)
        lives = [
            list(itertools.accumulate(size for _, size in events)) for events in (traced(written), own_events(high))
        ]
        assert lives[0] == lives[1]


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
def test_a_real_model_lifted_says_what_the_smaller_recording_holds(recorded: Recorded) -> None:
    low, high = recorded.recordings
    said = live_peak(window(lift([low, high]), (low.micro_batch,) * 2))
    own = live_peak(window(as_recorded(low), (low.micro_batch,) * 2))
    assert said == pytest.approx(own, rel=0.01)


@given(truth=truths(), k=st.sampled_from(WINDOWS), size=st.integers(1, 20), larger=st.integers(0, 6))
def test_a_window_of_any_split_does_what_the_training_step_does(truth: Truth, k: int, size: int, larger: int) -> None:
    split = tuple(size + 1 if i < larger % k else size for i in range(k))
    assert traced(window(truth.program(), split)) == truth.window(split)


@given(truth=truths(scale=1_000_003), k=st.sampled_from(WINDOWS), primes=st.sampled_from([(5, 7), (7, 11), (11, 13)]))
@settings(max_examples=200)
def test_windows_of_a_lifted_program_free_what_they_allocated_and_end_as_the_recording(
    truth: Truth, k: int, primes: tuple[int, int]
) -> None:
    recordings = [truth.recording(n) for n in primes]
    program, n = lift(recordings), primes[1]
    left = check_sound(window(program, (n,) * k))
    assert left == Counter(event.bytes for event in kept_blocks([e for p in recordings[1].phases for e in p.events]))
    assert traced(without_leftover(program, window(program, (n,) * k))) == truth.window((n,) * k)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
@pytest.mark.parametrize("k", WINDOWS)
def test_windows_of_a_real_model_free_what_they_allocated_and_end_as_the_recording(recorded: Recorded, k: int) -> None:
    low, high = recorded.recordings
    program = lift([low, high], recorded.first_step_events)
    split = (high.micro_batch,) * k
    left = check_sound(window(program, split))
    kept = Counter(event.bytes for event in kept_blocks([e for p in high.phases for e in p.events]))
    assert left == kept
    own = {event.block for phase in window(program, split) for event in phase.events}
    assert own.isdisjoint(event.block for event in recorded.first_step_events)


def kept_activation(*, also_growing: bool = False) -> Truth:
    mine = Rule(0, per_sample=1000)
    return Truth(temporaries=((Rule(0, per_sample=300), True),), carried=(mine,), growing=(mine,) * also_growing)


@pytest.mark.parametrize("also_growing", [False, True])
def test_a_module_that_keeps_its_last_activation_keeps_one_however_many_micro_batches(also_growing: bool) -> None:
    truth = kept_activation(also_growing=also_growing)
    program = lift([truth.recording(5), truth.recording(7)])
    for k in WINDOWS:
        assert check_sound(window(program, (9,) * k)) == Counter({9000: 1})
        assert traced(window(program, (9,) * k)) == truth.window((9,) * k)


def test_a_list_that_grows_before_the_activation_is_kept_takes_no_activations_place() -> None:
    """Both of one size: a micro-batch replaces the activation (2 by 4), the optimizer step ends the list (1, 3)."""

    def recording(n: int) -> Recording:
        first = (Event(1, 1000 * n), Event(2, 1000 * n))
        later = (Event(3, 1000 * n), Event(4, 1000 * n), Event(2, -1000 * n))
        last = (Event(1, -1000 * n), Event(3, -1000 * n))
        return Recording(n, (Phase(FIRST, first), Phase(LATER, later), Phase(OPTIMIZER, last)))

    program = lift([recording(5), recording(7)])
    for k in WINDOWS:
        assert check_sound(window(program, (9,) * k)) == Counter({9000: 1})


def test_a_block_carried_over_a_change_of_size_is_freed_with_the_size_it_was_made_with() -> None:
    split = (9, 9, 8, 8, 8)
    phases = window(lift([kept_activation().recording(5), kept_activation().recording(7)]), split)
    assert traced(phases) == kept_activation().window(split)
    lives = list(itertools.accumulate(event.bytes for phase in phases for event in phase.events))
    assert lives[-1] == 8000


def test_a_list_that_grows_until_the_optimizer_step_grows_with_every_micro_batch() -> None:
    truth = Truth(growing=(Rule(0, per_sample=1000),), optimizer=(Rule(50),))
    program = lift([truth.recording(5), truth.recording(7)])
    assert program.later_growth_bytes == 7000
    for k in WINDOWS:
        phases = window(program, (3,) * k)
        assert live_peak(phases) == 3000 * k + 50
        assert check_sound(phases) == Counter()


def test_what_runs_between_windows_comes_last_and_frees_what_the_optimizer_step_left() -> None:
    phases = (
        Phase(FIRST, (Event(1, 70),)),
        Phase(LATER, (Event(2, 70), Event(2, -70))),
        Phase(OPTIMIZER, (Event(3, 9),)),
        Phase("between", (Event(4, 8), Event(3, -9), Event(4, -8), Event(1, -70))),
    )
    program = as_recorded(Recording(7, phases))
    assert [name for name, _ in traced(window(program, (7,)))] == [FIRST, OPTIMIZER] + ["between"] * 4
    assert check_sound(window(program, (7,) * 4)) == Counter()


@pytest.mark.parametrize("seed", range(20))
def test_the_floor_of_a_size_never_falls(seed: int) -> None:
    recorded = RECORDED[seed]
    program: StepProgram = lift(recorded.recordings, recorded.first_step_events)
    sizes = sorted(random.Random(seed).sample(range(1, 200), 8))
    floors = [live_peak(window(program, (n,))) for n in sizes]
    assert floors == sorted(floors)


# Recordings.


def test_a_block_has_a_name_of_its_own_though_its_address_is_used_again() -> None:
    events = name_blocks([(100, 8, 0), (100, -8, 0), (100, 16, 1), (200, -5, 0), (100, -16, 1)])
    assert events == [Event(1, 8), Event(1, -8), Event(2, 16, 1), Event(-1, -5), Event(2, -16, 1)]
    assert kept_blocks(events[:3]) == (Event(2, 16, 1),)
    assert live_peak([Phase(FIRST, tuple(events[:3]))]) == 16
