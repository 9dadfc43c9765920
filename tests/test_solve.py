"""The solver: splits, the fewest steps that fit by brute force, and its time."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Recorded, Truth, random_truth, recorded_programs, truths

from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.simulation.malloc import CpuRules, replay
from autoaccum.simulation.program import StepProgram, lift, window
from autoaccum.simulation.recording import Event, Phase, Recording, live_peak
from autoaccum.simulation.scaling import Rule
from autoaccum.simulation.solver import (
    MAX_UNEVEN_SIZES,
    Split,
    balanced,
    is_even,
    largest_micro_batch,
    rank_share,
    repeated_within,
    smallest_steps,
    split_within,
    uneven,
)

RECORDED = recorded_programs(200)
RULES = (CpuRules(None), CpuRules(4096))
Fits = Callable[[tuple[int, ...]], bool]


def by_hand(samples: int, steps: int) -> tuple[int, ...]:
    """A balanced split, written another way than the package's."""
    return tuple(samples // steps + (index < samples % steps) for index in range(steps))


def brute_force(fits: Fits, samples: int, least: int, most: int | None) -> tuple[int, ...] | None:
    """Tries every k, assuming nothing; of each the balanced split, then the others from the most even on."""
    found = []
    for steps in range(1, samples + 1):
        splits = [by_hand(samples, steps)] if steps * min(least, samples) <= samples else []
        for n in range(1, samples) if steps > 1 else ():
            rest = samples - n * (steps - 1)
            quarter = n - -(-samples // steps) <= -(-samples // steps) / 4 + 0.99  # rounded up
            if rest >= min(least, samples) and n - rest > 1 and quarter and fits((n, n)):
                splits.append((n,) * (steps - 1) + (rest,))
        found += [split for split in splits if max(split) <= (most or samples) and fits(split)][:1]
    return min(found, key=len, default=None)


def first_floor(program: StepProgram, n: int) -> int:
    return live_peak(window(program, (n,))[:1])


def later_floor(program: StepProgram, n: int) -> int:
    return live_peak(window(program, (n, n))[:2])


# Splits.


@given(samples=st.integers(1, 10**6), data=st.data())
def test_a_balanced_split_sums_and_its_sizes_differ_by_at_most_one(samples: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, min(samples, 5000)))
    split = balanced(samples, steps)
    assert len(split) == steps
    assert sum(split) == samples
    assert max(split) - min(split) <= 1
    assert list(split) == sorted(split, reverse=True)


@pytest.mark.parametrize(("samples", "steps"), [(4, 5), (4, 0), (0, 1), (4, -1)])
def test_what_cannot_be_split_is_refused(samples: int, steps: int) -> None:
    with pytest.raises(ValueError, match="can't be split"):
        balanced(samples, steps)


@given(samples=st.integers(1, 3000), micro_batch=st.integers(1, 4000))
def test_a_split_within_has_the_fewest_micro_batches_of_that_size(samples: int, micro_batch: int) -> None:
    split = split_within(samples, micro_batch)
    assert sum(split) == samples
    assert max(split) <= micro_batch
    assert len(split) == 1 or max(by_hand(samples, len(split) - 1)) > micro_batch


@given(world_size=st.integers(1, 64), extra=st.integers(0, 1000))
def test_shares_of_all_ranks_sum_to_the_target(world_size: int, extra: int) -> None:
    shares = [rank_share(world_size + extra, world_size, rank) for rank in range(world_size)]
    assert sum(shares) == world_size + extra
    assert max(shares) - min(shares) <= 1


def test_512_with_at_most_57_to_63_is_9_steps_of_57_and_56() -> None:
    for most in range(57, 64):
        assert split_within(512, most) == (57,) * 8 + (56,)


@given(samples=st.integers(1, 3000), size=st.integers(1, 4000), least=st.integers(1, 3))
def test_a_size_is_repeated_and_the_rest_is_no_smaller_than_allowed(samples: int, size: int, least: int) -> None:
    size = max(size, least)
    split = repeated_within(samples, size, least)
    assert sum(split) == samples and min(split) >= min(least, samples)
    assert list(split) == sorted(split, reverse=True)
    if split != split_within(samples, size, least):  # which has one sample more where there is no other way
        assert set(split[:-2]) <= {size} and len(split) == -(-samples // size)


@given(
    samples=st.integers(2, 5000), steps=st.integers(2, 90), least=st.integers(1, 2), most=st.none() | st.integers(1, 99)
)
def test_uneven_splits_repeat_one_size_and_are_few(samples: int, steps: int, least: int, most: int | None) -> None:
    found = list(uneven(samples, steps, min_size=least, max_size=most))
    assert len(found) <= MAX_UNEVEN_SIZES + 1
    for split in found:
        assert len(split) == steps and sum(split) == samples
        assert len(set(split[:-1])) == 1 and split[-1] < split[0] - 1 and not is_even(split)
        assert split[-1] >= least and split[0] <= (most or samples)
    assert [split[0] for split in found] == sorted({split[0] for split in found})


def test_64_in_three_steps_may_be_22_22_20_up_to_28_28_8() -> None:
    found = list(uneven(64, 3))
    assert found[0] == (22, 22, 20) and (24, 24, 16) in found and found[-1] == (28, 28, 8)


# The solver against brute force.


def solved_like_brute_force(
    rng: random.Random, program: StepProgram, samples: int, budget: int, rules: CpuRules
) -> None:
    peaks: dict[tuple[int, ...], bool] = {}
    broken = rng.random() if rng.random() < 0.3 else 0.0  # some splits fail though they should fit: nothing monotone

    def fits(split: tuple[int, ...]) -> bool:
        if split not in peaks:
            peaks[split] = replay(window(program, split), rules).peak_bytes <= budget and rng.random() >= broken
        return peaks[split]

    least, most = rng.choice([1, 2]), rng.choice([None, rng.randint(1, samples)])
    solution = smallest_steps(
        fits,
        lambda n: first_floor(program, n),
        samples=samples,
        budget_bytes=budget,
        min_size=least,
        max_size=most,
        later_floor=rng.choice([None, lambda n: later_floor(program, n)]),
    )
    expected = brute_force(fits, samples, least, most)
    assert (None if solution is None else solution.split) == expected


@pytest.mark.parametrize("seed", range(10))
def test_the_solver_equals_brute_force_on_a_thousand_generated_programs(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1000):
        program, samples, rules = random_truth(rng).program(), rng.randint(1, 10), rng.choice(RULES)
        low, high = (replay(window(program, split), rules).peak_bytes for split in ((1,) * samples, (samples,)))
        budget = rng.randint(int(0.8 * min(low, high)), int(1.1 * max(low, high)))
        solved_like_brute_force(rng, program, samples, budget, rules)


QUICK_DECADES = (0, 7, 13, 19)  # 40 programs; the others are slow


@pytest.mark.parametrize(
    "decade", [n if n in QUICK_DECADES else pytest.param(n, marks=pytest.mark.slow) for n in range(20)]
)
def test_the_solver_equals_brute_force_on_200_recorded_programs_at_ten_budgets(decade: int) -> None:
    for recorded in RECORDED[10 * decade : 10 * decade + 10]:
        solved_like_brute_force_at_ten_budgets(recorded)


def solved_like_brute_force_at_ten_budgets(recorded: Recorded) -> None:
    program, samples, rules = lift(recorded.recordings, recorded.first_step_events), 12, CpuRules(131072)
    first_step_events = Phase("prelude", recorded.first_step_events)

    @functools.cache
    def peak(split: tuple[int, ...]) -> int:
        return replay([first_step_events, *window(program, split)], rules).peak_bytes

    known = [peak(by_hand(samples, k)) for k in range(1, samples + 1)]
    low, high = min(known), max(known)
    steps = set()

    @functools.cache
    def floor(n: int) -> int:
        return live_peak([first_step_events, *window(program, (n,))])

    for i in range(10):
        budget = low + (high - low) * i // 9 - (i == 0)

        def fits(split: tuple[int, ...], budget: int = budget) -> bool:
            return peak(split) <= budget

        for least, most in ((1, None), (2, None), (1, 7)):
            solution = smallest_steps(fits, floor, samples=samples, budget_bytes=budget, min_size=least, max_size=most)
            expected = brute_force(fits, samples, least, most)
            assert (None if solution is None else solution.split) == expected
            steps.add(None if expected is None else len(expected))
    assert len(steps) > 3  # the budgets tell the programs' sizes apart


@given(samples=st.integers(1, 40), least=st.integers(1, 2), most=st.none() | st.integers(1, 40), bits=st.integers(0))
def test_the_solver_assumes_nothing_of_what_fits(samples: int, least: int, most: int | None, bits: int) -> None:
    def fits(split: tuple[int, ...]) -> bool:
        return bool(bits >> len(split) & 1)

    solution = smallest_steps(fits, lambda n: 0, samples=samples, budget_bytes=1, min_size=least, max_size=most)
    assert (None if solution is None else solution.split) == brute_force(fits, samples, least, most)


def all_splits(samples: int, steps: int, least: int, most: int) -> list[Split]:
    """Every way to write `samples` as `steps` sizes from `least` to `most`, larger first."""
    if steps == 1:
        return [(samples,)] if least <= samples <= most else []
    return [
        (first, *rest)
        for first in range(least, min(most, samples) + 1)
        for rest in all_splits(samples - first, steps - 1, least, first)
    ]


@given(
    samples=st.integers(2, 16),
    least=st.integers(1, 2),
    most=st.integers(2, 16),
    memory=st.randoms(use_true_random=False),
    share=st.floats(0.05, 0.95),
)
def test_no_more_steps_than_balanced_ones_and_never_fewer_than_any_split_takes(
    samples: int, least: int, most: int, memory: random.Random, share: float
) -> None:
    """Memory without any order: which splits fit is drawn for each."""
    drawn: dict[Split, bool] = {}

    def fits(split: Split) -> bool:
        return drawn.setdefault(split, memory.random() < share)

    found = smallest_steps(fits, lambda n: 0, samples=samples, budget_bytes=1, min_size=least, max_size=most)
    allowed = range(1, samples // least + 1)
    every = {k: [s for s in all_splits(samples, k, least, most) if fits(s)] for k in allowed}
    even = [k for k, splits in every.items() if by_hand(samples, k) in splits]
    if found is None:
        assert not even
        return
    split = found.split
    assert fits(split) and sum(split) == samples and min(split) >= least and max(split) <= most
    assert len(split) <= min(even, default=samples) and len(split) >= min(k for k, splits in every.items() if splits)
    assert is_even(split) or not fits(by_hand(samples, len(split)))


def small_llama(split: Split) -> bool:
    """What the replay says of a small Llama in 2 GiB: 127 and 128 leave gaps that later blocks don't fit into."""
    return max(split) <= 137 and not {127, 128} & set(split)


@pytest.mark.parametrize(
    ("samples", "split"),
    [
        (512, (129, 129, 129, 125)),
        (1024, (129,) * 7 + (121,)),
        (381, (129, 129, 123)),
        (254, (129, 125)),
        (510, (129, 129, 129, 123)),
        (520, (130,) * 4),
        (552, (111, 111, 110, 110, 110)),
    ],
)
def test_a_size_that_fits_is_repeated_where_the_balanced_split_does_not_fit(samples: int, split: Split) -> None:
    found = smallest_steps(small_llama, lambda n: 11 * n, samples=samples, budget_bytes=1600)
    assert found is not None
    assert found.split == split


@given(size=st.integers(0, 60), bits=st.integers(0), steps=st.integers(1, 3))
def test_the_largest_micro_batch_is_the_largest_whatever_fits_below_it(size: int, bits: int, steps: int) -> None:
    def fits(split: tuple[int, ...]) -> bool:
        assert len(split) == steps
        return bool(bits >> split[0] & 1)

    found = largest_micro_batch(fits, lambda n: n, budget_bytes=size, max_size=50, steps=steps)
    assert found == max((n for n in range(1, min(size, 50) + 1) if bits >> n & 1), default=0)


@given(
    truth=truths(), samples=st.integers(1, 12), rules=st.sampled_from(RULES), less=st.integers(1), more=st.integers(0)
)
def test_a_bigger_budget_never_gives_more_steps(
    truth: Truth, samples: int, rules: CpuRules, less: int, more: int
) -> None:
    program = truth.program()

    def steps(budget: int) -> float:
        found = smallest_steps(
            lambda split: replay(window(program, split), rules).peak_bytes <= budget,
            lambda n: first_floor(program, n),
            samples=samples,
            budget_bytes=budget,
        )
        return float("inf") if found is None else len(found.split)

    top = replay(window(program, (samples,)), rules).peak_bytes
    budget = less % (top + 1)
    assert steps(budget + more % (top + 1)) <= steps(budget)


def test_one_micro_batch_and_several_have_peaks_of_their_own() -> None:
    """Gradients are resident from the second micro-batch on: 10 fit as the only micro-batch, 9 as one of several."""
    program = Truth(temporaries=((Rule(0, per_sample=100), False),), gradients=(Rule(100),)).program()

    def fits(split: tuple[int, ...]) -> bool:
        return replay(window(program, split), CpuRules(None)).peak_bytes <= 1000

    def steps(samples: int) -> tuple[int, ...]:
        found = smallest_steps(fits, lambda n: first_floor(program, n), samples=samples, budget_bytes=1000)
        assert found is not None
        return found.split

    assert steps(10) == (10,)
    assert steps(19) == (10, 9)  # the first has no gradients beside it
    assert steps(20) == (7, 7, 6)
    assert [largest_micro_batch(fits, lambda n: 100 * n, budget_bytes=1000, max_size=99, steps=k) for k in (1, 2)] == [
        10,
        9,
    ]


def test_a_k_whose_floor_is_above_the_budget_is_not_tested() -> None:
    tested = []

    def fits(split: tuple[int, ...]) -> bool:
        tested.append(split)
        return split[0] <= 61

    found = smallest_steps(fits, lambda n: n, samples=512, budget_bytes=64)
    assert found is not None
    assert found.split == (57,) * 8 + (56,)
    assert tested == [(64,) * 8, found.split]
    assert found.tried == 2


def test_nothing_fits_is_none() -> None:
    assert smallest_steps(lambda split: False, lambda n: 0, samples=9, budget_bytes=1) is None
    assert smallest_steps(lambda split: True, lambda n: 0, samples=3, budget_bytes=1, min_size=2, max_size=2) is None


# Time.


def large_program(events: int = 10_000) -> StepProgram:
    """A program of that many events: activations that scale, their backward, gradients, optimizer temporaries."""

    def recording(n: int) -> Recording:
        names = iter(range(1, 10**9))
        gradients: list[Event] = []
        phases = []
        for name in (FIRST, LATER):
            made = [Event(next(names), (i % 37 + 1) * 4096 * n) for i in range(events * 19 // 100)]
            back: list[Event] = []
            for i, event in enumerate(reversed(made)):
                if i % 10 == 0:
                    gradient = Event(next(names), 2**20 + 4)
                    back.append(gradient)
                    gradients += [gradient] * (name == FIRST)
                    back += [Event(gradient.block, -gradient.bytes)] * (name == LATER)
                back.append(Event(event.block, -event.bytes))
            phases.append(Phase(name, (*made, *back)))
        last = [Event(next(names), 50_001) for _ in range(events // 12)]
        frees = [Event(event.block, -event.bytes) for event in (*last, *gradients)]
        return Recording(n, (*phases, Phase(OPTIMIZER, (*last, *frees))))

    recordings = [recording(11), recording(13)]
    assert sum(len(phase.events) for phase in recordings[0].phases) == pytest.approx(events, rel=0.1)
    return lift(recordings)


@pytest.mark.parametrize("size", [100, 10])
@pytest.mark.parametrize("target", [512, 100_000])
def test_a_program_of_10000_events_is_solved_in_a_second(target: int, size: int) -> None:
    """Each window twice, fresh and here, by a short window with the same peak, as fit.py does it; and with a
    `later_floor`, which fit.py did not hand on when this was written: without it, the last case tests 900 splits."""
    from autoaccum.planning.windows import _representative

    program, rules = large_program(), CpuRules(131072)

    def peak(split: tuple[int, ...]) -> int:
        return replay(window(program, _representative(program, split)), rules).peak_bytes

    budget = int(peak((size, size)) * 1.001)
    seconds = []
    for _ in range(5):  # one is enough: who shares the machine's caches makes the others 2.5 x as long
        started = time.process_time()  # other processes' own work is not counted
        found = smallest_steps(
            lambda split: all(peak(split) <= budget for _ in ("new_process", "this_process")),
            lambda n: replay(window(program, (n,)), rules).live_bytes,
            samples=target,
            budget_bytes=budget,
            later_floor=lambda n: live_peak(window(program, (n, n))[:2]),
        )
        seconds.append(time.process_time() - started)
        if seconds[-1] < 1:
            break
    assert found is not None
    assert found.split == split_within(target, size)
    print(f"{target}, {size} fit: {len(found.split)} steps, {found.tried} tried, {min(seconds):.2f} s")
    assert min(seconds) < 1  # a quarter of one by itself
