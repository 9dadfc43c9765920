"""A verified window, taken for a recording."""

from __future__ import annotations

from dataclasses import replace

import pytest
from strategies import recorded_programs

from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.simulation.from_verification import distinct_recordings, verified_recording
from autoaccum.simulation.program import StepProgram, lift, window
from autoaccum.simulation.recording import Event, Phase, Recording, name_blocks

PROGRAMS = [lift(each.recordings, each.first_step_events) for each in recorded_programs()]
ALIKE = [program for program in PROGRAMS if not program.later_growth_bytes]  # a third micro-batch leaves nothing more


def recorded(program: StepProgram, n: int, steps: int) -> Recording:
    """What a recorder would have written down of a window."""
    return Recording(n, tuple(window(program, (n,) * steps)), steps, 0.0)


def named(recording: Recording) -> list[tuple[str, int, int]]:
    """Its events, blocks named by the order in which they come to be."""
    events = [(phase.name, event) for phase in recording.phases for event in phase.events]
    blocks = name_blocks((event.block, event.bytes, event.stream) for _, event in events)
    return [(name, event.block, event.bytes) for (name, _), event in zip(events, blocks, strict=True)]


@pytest.mark.parametrize("program", ALIKE)
def test_a_window_of_three_is_taken_for_the_window_of_two_that_would_have_been_recorded(program: StepProgram) -> None:
    n = program.recorded_at + 5
    found = verified_recording(recorded(program, n, 3), (n, n, n), ())
    assert found is not None
    assert found.passes == 2
    assert named(found) == named(recorded(program, n, 2))


STEP = (Event(9, 64 << 20), Event(9, -(64 << 20)))


def small(n: int, *, optimizer: tuple[Event, ...] = STEP) -> Recording:
    """A window of two; the optimizer step keeps what it makes where it isn't freed."""
    first = Phase(FIRST, (Event(1, 10 * n), Event(2, 100), Event(1, -10 * n)))
    later = Phase(LATER, (Event(3, 10 * n), Event(3, -10 * n)))
    return Recording(n, (first, later, Phase(OPTIMIZER, (*optimizer, Event(2, -100)))), 2, 0.0)


def test_what_the_first_step_makes_for_good_is_left_out() -> None:
    seen = small(6, optimizer=(Event(8, 4096), *STEP))
    found = verified_recording(seen, (6, 6), [small(5)])
    assert found is not None
    assert found.phases == small(6).phases


def test_a_step_that_was_skipped_is_no_step_to_learn_from() -> None:
    assert verified_recording(small(6, optimizer=()), (6, 6), [small(5)]) is None
    scalar = (Event(10, 4), Event(10, -4))  # of the first step, or of all but the first
    assert verified_recording(small(6, optimizer=(*scalar, *STEP)), (6, 6), [small(5)]) is not None


@pytest.mark.parametrize("split", [(6,), (6, 5), (6, 6, 5)])
def test_one_micro_batch_or_two_sizes_are_no_recording(split: tuple[int, ...]) -> None:
    assert verified_recording(small(6), split, [small(5)]) is None


def test_a_size_that_is_known_already_teaches_nothing() -> None:
    assert verified_recording(small(5), (5, 5), [small(5)]) is None


def test_micro_batches_that_did_different_things_are_not_laid_over_each_other() -> None:
    seen = small(6)
    other = Phase(LATER, (Event(4, 61), Event(4, -61)))
    three = replace(seen, phases=(*seen.phases[:2], other, seen.phases[2]))
    assert verified_recording(three, (6, 6, 6), ()) is None


@pytest.mark.parametrize(
    ("known", "n", "kept"),
    [
        ((7, 11, 761, 1453), 1532, (7, 11, 761)),
        ((7, 11, 40), 45, (7, 11)),
        ((7, 11), 12, (7, 11)),
        ((5, 7, 99), 12, (5, 7, 99)),
    ],
)
def test_what_was_recorded_close_by_makes_room(known: tuple[int, ...], n: int, kept: tuple[int, ...]) -> None:
    found = distinct_recordings([Recording(m, (), 2, 0.0) for m in known], n)
    assert tuple(recording.micro_batch for recording in found) == kept


def test_tiles_stay_tiles_beside_a_verified_window() -> None:
    def tiles(n: int) -> Recording:
        size = -(-6144 * n // (20 << 20)) * (20 << 20)  # of a scratch that a convolution of 6,144 bytes a sample takes
        events = (Event(1, 6144 * n), Event(2, size), Event(2, -size), Event(1, -6144 * n))
        return Recording(n, (Phase(FIRST, events), Phase(LATER, events), Phase(OPTIMIZER, STEP)), 2, 0.0)

    known = [tiles(n) for n in (7001, 14401, 27509)]
    n = 28_800  # in as many tiles as 27,509
    sizes = {
        step.rule.at(2 * n) for step in lift([*distinct_recordings(known, n), tiles(n)]).phases[FIRST] if step.rule
    }
    assert max(sizes) == tiles(2 * n).phases[0].events[1].bytes
    spoilt = {step.rule.at(2 * n) for step in lift([*known, tiles(n)]).phases[FIRST] if step.rule}
    assert sizes != spoilt
