"""What lives at the peak, and the timeline: against windows whose truth is known, and recordings of real models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Truth, recorded_programs, truths

from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.simulation.breakdown import CATEGORIES, composition, process_composition
from autoaccum.simulation.program import StepProgram, lift, window
from autoaccum.simulation.recording import Event, Phase, Recording
from autoaccum.simulation.scaling import Rule
from autoaccum.simulation.timeline import timeline

RECORDED = {each.name: lift(each.recordings, each.first_step_events) for each in recorded_programs()}
SPLITS = ((8,), (8, 8), (9, 9, 8))


def recording(n: int) -> Recording:
    """Two micro-batches with everything in them, and their optimizer step.

    Saved activation 100 a sample, a forward's temporary 30, the loss 4, its gradient 4, then backward: a temporary of
    50 a sample, and the parameter's gradient of 1000.
    """
    blocks = iter(range(1, 100))

    def micro_batch(gradient: int | None) -> tuple[list[Event], int]:
        data, saved, passing, loss, ones, back, new = (next(blocks) for _ in range(7))
        events = [Event(data, 7 * n), Event(saved, 100 * n), Event(passing, 30 * n), Event(passing, -30 * n)]
        events += [Event(loss, 4), Event(ones, 4), Event(back, 50 * n), Event(new, 1000), Event(saved, -100 * n)]
        if gradient is not None:
            events.append(Event(new, -1000))
        events += [Event(each, -size) for each, size in ((back, 50 * n), (ones, 4), (loss, 4), (data, 7 * n))]
        return events, new

    first, gradient = micro_batch(None)
    later, _ = micro_batch(gradient)
    scratch = next(blocks)
    step = [Event(scratch, 500), Event(scratch, -500), Event(gradient, -1000)]
    return Recording(n, (Phase(FIRST, tuple(first)), Phase(LATER, tuple(later)), Phase(OPTIMIZER, tuple(step))))


def made_up_program() -> StepProgram:
    return lift([recording(5), recording(7)], first_step_events=(Event(1, 2000), Event(2, 60), Event(2, -60)))


def test_each_category_is_reported_by_when_its_blocks_live() -> None:
    found = composition(made_up_program(), (10, 10), inputs=(7,))
    assert found[FIRST] == {
        "optimizer state": 2000, "gradients": 1000, "data": 70, "activations": 1004, "temporaries": 504,
    }  # fmt: skip
    assert found[LATER] == {
        "optimizer state": 2000, "gradients": 1000, "data": 70, "activations": 1004, "temporaries": 1504,
    }  # fmt: skip
    assert found[OPTIMIZER] == {"optimizer state": 2000, "gradients": 1000, "temporaries": 500}


def held(made: Recording) -> Recording:
    """The same window, whose last micro-batch's data are held into the optimizer step, as token ids are."""
    first, later, step = made.phases
    data = later.events[0]
    freed = Event(data.block, -data.bytes)
    kept = tuple(event for event in later.events if event != freed)
    return Recording(made.micro_batch, (first, Phase(LATER, kept), Phase(OPTIMIZER, (*step.events, freed))))


def reaching_more(made: Recording) -> Recording:
    """The same window, of which each later micro-batch reaches another parameter: its gradient stays until the step."""
    first, later, step = made.phases
    new = next(event for event in later.events if event.bytes == 1000)
    freed = Event(new.block, -1000)
    kept = tuple(event for event in later.events if event != freed)
    return Recording(made.micro_batch, (first, Phase(LATER, kept), Phase(OPTIMIZER, (*step.events, freed))))


def test_a_long_run_of_micro_batches_that_each_leave_a_gradient_has_its_composition() -> None:
    program = lift([reaching_more(recording(n)) for n in (5, 7)])
    found = composition(program, (10,) * 20, inputs=(7,))  # of which the middle is one phase
    assert found[LATER]["data"] == 70
    assert sum(found[LATER].values()) > 20 * 1000


def test_data_held_through_the_step_are_data_and_not_gradients() -> None:
    program = lift(
        [held(recording(5)), held(recording(7))], first_step_events=(Event(1, 2000), Event(2, 60), Event(2, -60))
    )
    found = composition(program, (10, 10))
    assert found[LATER] == composition(made_up_program(), (10, 10), inputs=(7,))[LATER]
    assert found[OPTIMIZER] == {"optimizer state": 2000, "gradients": 1000, "data": 70, "temporaries": 500}


def test_a_librarys_workspace_is_no_optimizer_state_and_there_from_the_start() -> None:
    def with_workspace(n: int) -> Recording:
        plain = recording(n)
        first = (Event(90, 8000), *plain.phases[0].events)  # nothing frees it, and no later micro-batch makes one
        return Recording(n, (Phase(FIRST, first), *plain.phases[1:]))

    first_step_events = (Event(1, 2000), Event(2, 8000))  # the first window made the state, and its own workspace
    found = composition(lift([with_workspace(5), with_workspace(7)], first_step_events=first_step_events), (10, 10))
    for phase in (FIRST, LATER, OPTIMIZER):
        assert (found[phase]["workspaces"], found[phase]["optimizer state"]) == (8000, 2000)
    assert found[FIRST]["activations"] == composition(made_up_program(), (10, 10))[FIRST]["activations"]


def test_without_inputs_nothing_is_data() -> None:
    found = composition(made_up_program(), (10, 10))
    assert "data" not in found[FIRST] and found[FIRST]["activations"] == 1074
    assert "data" not in composition(made_up_program(), (10, 10), inputs=(8,))[FIRST]


def test_what_one_micro_batch_keeps_for_the_next_is_an_activation() -> None:
    truth = Truth(temporaries=((Rule(10), False),), gradients=(Rule(300),), carried=(Rule(0, per_sample=40),))
    found = composition(truth.program(), (5, 5))
    assert found[FIRST] == {"gradients": 300, "activations": 200}


@settings(max_examples=60, deadline=None)
@given(truth=truths(), split=st.sampled_from(SPLITS))
def test_the_parts_sum_to_what_is_alive_at_once(truth: Truth, split: tuple[int, ...]) -> None:
    assert_sums(truth.program(), split)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("split", SPLITS)
def test_of_real_models_too(name: str, split: tuple[int, ...]) -> None:
    assert_sums(RECORDED[name], split)
    found = composition(RECORDED[name], split)
    assert found[FIRST]["activations"] > 0 and found[OPTIMIZER]["gradients"] > 0
    first_order = {phase: parts.get("optimizer state", 0) for phase, parts in found.items()}
    assert len(set(first_order.values())) == 1  # it is there in every phase alike


def assert_sums(program: StepProgram, split: tuple[int, ...]) -> None:
    live = sum(
        e.bytes
        for e in program.first_step_events
        if e.bytes > 0 and Event(e.block, -e.bytes) not in program.first_step_events
    )
    highest: dict[str, int] = {}
    for phase in window(program, split):
        highest[phase.name] = max(highest.get(phase.name, 0), live)
        for event in phase.events:
            live += event.bytes
            highest[phase.name] = max(highest[phase.name], live)
    found = composition(program, split)
    assert {name: sum(parts.values()) for name, parts in found.items()} == highest
    parts = timeline(program, split)
    assert [part.phase for part in parts if part.phase in (FIRST, LATER)] == [FIRST, LATER, LATER][: len(split)]
    drawn: dict[str, int] = {}
    for part in parts:
        drawn[part.phase] = max(drawn.get(part.phase, 0), *part.bytes)
    assert drawn == highest  # a peak is never thinned away


def test_adam_keeps_two_states_for_each_gradient_and_sgd_none() -> None:
    for name, program in RECORDED.items():
        parts = composition(program, (8, 8))[LATER]
        if name.endswith("AdamW"):
            assert 1.9 < parts["optimizer state"] / parts["gradients"] < 2.3, name


def test_the_whole_process_adds_up_to_each_phases_peak() -> None:
    phases = {FIRST: 10_000, LATER: 12_000, OPTIMIZER: 9_000}
    found = process_composition(
        composition(made_up_program(), (10, 10)), phases, baseline_bytes=4000, parameter_bytes=1000, input_bytes=70
    )
    assert {name: sum(parts.values()) for name, parts in found.items()} == phases
    assert found[FIRST]["process"] == 3000 and found[FIRST]["parameters"] == 1000
    assert found[FIRST]["cached"] == 10_000 - 4000 - 70 - (2000 + 1000 + 1070 + 508)
    assert [list(parts) for parts in found.values()] == [[c for c in CATEGORIES if c in p] for p in found.values()]


def test_a_timeline_has_few_points_however_long_the_window() -> None:
    for program in RECORDED.values():
        parts = timeline(program, (9,) * 40)
        assert sum(len(part.bytes) for part in parts) <= 360 and len(parts) <= 5
