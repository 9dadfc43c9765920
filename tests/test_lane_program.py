"""Windows in lanes, lifted from short ones: composed for any split, they are what such a window does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoaccum.phases import FIRST, OPTIMIZER
from autoaccum.simulation.lane_composing import compose
from autoaccum.simulation.lane_keeping import least_moved_parts, moved_by_part
from autoaccum.simulation.lane_program import SHORT, LaneProgram, lift_lanes
from autoaccum.simulation.lane_windows import ALL, LaneWindow, NotRegular, course_of, cut, phase_name
from autoaccum.simulation.recording import Event, Phase, Recording, live_peak


@dataclasses.dataclass(frozen=True)
class Layer:
    """One part of a toy net: a convolution, and the meeting behind it.

    Attributes:
        sample_bytes: Of its output, for each sample.
        weight_bytes: Of its weight's gradient.
        stays: Whether its output stays on the device for the backward, or moves.
        ahead: How many stretches ahead its own fetch what comes back.
        skips: Whether its output is needed by the last layer, too.
    """

    sample_bytes: int
    weight_bytes: int
    stays: bool = False
    ahead: int = 0
    skips: bool = False


class Machine:
    """Make and free blocks, by phase."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, list[Event]]] = []
        self.moved: list[list[int]] = []
        self.sizes: dict[int, int] = {}

    def phase(self, name: str) -> None:
        self.phases.append((name, []))
        self.moved.append([])

    def stretch(self, name: str, part: int, lane: int = ALL) -> None:
        self.phase(phase_name(name, part, lane))

    def make(self, size: int) -> int:
        block = len(self.sizes) + 1
        self.sizes[block] = size
        self.phases[-1][1].append(Event(block, size))
        return block

    def free(self, *blocks: int | None) -> None:
        for block in blocks:
            if block is not None:
                self.phases[-1][1].append(Event(block, -self.sizes[block]))

    def recording(self, n: int) -> Recording:
        return Recording(n, tuple(Phase(name, tuple(events)) for name, events in self.phases))


def toy_window(net: Sequence[Layer], split: Sequence[int]) -> Machine:
    """Run a window of a toy net: what a lane keeps, hands on and fetches ahead, as lanes do."""
    run, lanes = Machine(), range(len(split))
    run.phase(FIRST)
    outs: list[int | None] = [None for _ in lanes]
    saved: dict[tuple[int, int], int] = {}
    skipped: list[tuple[int, int]] = []
    for part, layer in enumerate(net):
        rows = []
        for lane in lanes:
            run.stretch("forward", part, lane)
            out = run.make(layer.sample_bytes * split[lane])
            run.free(outs[lane])
            outs[lane] = out
            rows.append(run.make(4096))
            if layer.stays or layer.skips:
                saved[part, lane] = run.make(layer.sample_bytes * split[lane])
                if layer.skips:
                    skipped.append((part, lane))
            else:
                run.moved[-1].append(layer.sample_bytes * split[lane])
        run.stretch("meeting", part)
        together = run.make(2048 * len(split))
        merged = run.make(4096)
        run.free(*rows, together)
        run.free(merged) if part == len(net) - 1 else saved.update({(part, ALL): merged})
    losses = []
    for lane in lanes:
        run.stretch("loss", 0, lane)
        losses.append(run.make(4))
        run.free(outs[lane])
    run.stretch("start back", 0)
    gradients: dict[int, int] = {}
    incoming: dict[int, int] = {}
    order = [(part, lane) for part in reversed(range(len(net))) for lane in reversed(lanes)]
    fetched: dict[tuple[int, int], int] = {}
    for part, layer in reversed(list(enumerate(net))):
        if part < len(net) - 1:
            run.stretch("meeting back", part)
            run.free(run.make(1024 * len(split)), saved.pop((part, ALL)))
        for lane in reversed(lanes):
            run.stretch("backward", part, lane)
            back = saved.pop((part, lane), fetched.pop((part, lane), None))
            if back is None:
                back = run.make(layer.sample_bytes * split[lane])
            following = order[order.index((part, lane)) :][layer.ahead : layer.ahead + 1]
            for other in following if layer.ahead else ():
                if other not in saved and other not in fetched:
                    fetched[other] = run.make(net[other[0]].sample_bytes * split[other[1]])
            gradient = run.make(layer.weight_bytes)
            if part in gradients:
                run.free(gradient)
            else:
                gradients[part] = gradient
            after = run.make(layer.sample_bytes * split[lane])
            run.free(incoming.get(lane), back)
            incoming[lane] = after
    run.stretch("end", 0)
    run.free(*incoming.values(), *losses)
    run.phase(OPTIMIZER)
    run.free(run.make(256), *gradients.values())
    return run


def toy_cut(net: Sequence[Layer], n: int, lanes: int) -> LaneWindow:
    run = toy_window(net, (n,) * lanes)
    return cut(run.recording(n), lanes, run.moved)


def recorded(net: Sequence[Layer]) -> list[LaneWindow]:
    """Return the windows that planning records, without those of two to four lanes."""
    return [toy_cut(net, n, lanes) for n, lanes in ((5, 7), (5, 5), (7, 5))]


def lifted(net: Sequence[Layer], lanes: int) -> LaneProgram:
    """Return the program that planning uses for windows of so many lanes."""
    return lift_lanes([toy_cut(net, n, lanes) for n in (5, 7)] if lanes <= SHORT else recorded(net))


LAYERS = st.builds(
    Layer,
    sample_bytes=st.integers(1, 2**20).map(lambda size: 4 * size),
    weight_bytes=st.integers(1, 2**16).map(lambda size: 4 * 35 * size + 4),  # no multiple of the recorded sizes
    stays=st.booleans(),
    skips=st.booleans(),
)
SPLITS = st.tuples(st.integers(2, 40), st.integers(2, 9)).flatmap(
    lambda pair: st.integers(0, pair[1] - 1).map(
        lambda larger: (pair[0] + 1,) * larger + (pair[0],) * (pair[1] - larger)
    )
)


@settings(max_examples=60, deadline=None)
@given(net=st.lists(LAYERS, min_size=1, max_size=5), split=SPLITS)
def test_a_composed_window_is_what_such_a_window_does(net: list[Layer], split: tuple[int, ...]) -> None:
    program = lifted(net, len(split))
    found, expected = compose(program, split), toy_window(net, split)
    assert [phase.name for phase in found.phases] == [FIRST, OPTIMIZER]
    assert course_of(found.phases) == course_of(expected.recording(split[0]).phases)
    assert list(program.moved_sizes(split)) == [size for phase in expected.moved for size in phase]


@settings(max_examples=30, deadline=None)
@given(
    net=st.lists(LAYERS, min_size=2, max_size=4),
    ahead=st.sampled_from((1, 2)),
    n=st.integers(1, 50),
    lanes=st.integers(2, 9),
)
def test_what_is_fetched_ahead_ends_in_the_lane_that_it_is_for(
    net: list[Layer], ahead: int, n: int, lanes: int
) -> None:
    net = [dataclasses.replace(layer, ahead=ahead, stays=False, skips=False) for layer in net]
    program = lifted(net, lanes)
    assert lanes <= SHORT or program.edges == ((1, 1) if ahead == 1 else (2, 2))
    expected = toy_window(net, (n,) * lanes).recording(n)
    assert course_of(compose(program, (n,) * lanes).phases) == course_of(expected.phases)


@settings(max_examples=30, deadline=None)
@given(
    net=st.lists(LAYERS, min_size=1, max_size=5), n=st.integers(1, 50), lanes=st.integers(5, 9), share=st.floats(0, 1)
)
def test_as_many_parts_move_as_have_to(net: list[Layer], n: int, lanes: int, share: float) -> None:
    net = [dataclasses.replace(layer, stays=False, skips=False) for layer in net]
    split, own = (n,) * lanes, max(layer.sample_bytes * n for layer in net)

    def peak(parts: int) -> int:
        kept = [dataclasses.replace(layer, stays=part >= parts) for part, layer in enumerate(net)]
        return live_peak(toy_window(kept, split).recording(n).phases)

    room = int(peak(len(net)) + share * (peak(0) - peak(len(net))))
    program = lifted(net, lanes)
    assert moved_by_part(program, split) == [layer.sample_bytes * n * lanes for layer in net]
    parts = least_moved_parts(program, split, room)
    assert peak(parts) <= room + own  # which of a stretch's own moments is its peak isn't looked at
    assert parts == 0 or peak(parts - 1) > room - own


def test_what_is_gone_before_the_widest_layer_goes_back_costs_nothing() -> None:
    net, split = [Layer(4000, 1236), *[Layer(400, 36)] * 4], (7,) * 5
    room = live_peak(toy_window(net, split).recording(7).phases)  # where all moves, and no more
    assert least_moved_parts(lifted(net, 5), split, room) == 1


def test_an_end_that_was_not_recorded_is_refused() -> None:
    net = [Layer(4000, 1236, ahead=2), Layer(400, 36, ahead=2), Layer(800, 76, ahead=2)]
    program = lift_lanes([toy_cut(net, n, lanes) for n, lanes in ((5, 6), (5, 5), (7, 5))])
    with pytest.raises(NotRegular, match="where none was recorded to end"):
        compose(program, (7,) * 8)  # a lane between, two before another one between: six lanes have no such pair


NET = [Layer(4000, 1236), Layer(400, 36, stays=True)]


def test_a_window_of_other_meetings_is_refused() -> None:
    with pytest.raises(NotRegular, match="meet at other places"):
        lift_lanes([*recorded(NET)[:2], toy_cut(NET[:1], 7, 5)])


def test_a_window_that_keeps_more_at_a_larger_size_is_refused() -> None:
    larger = [NET[0], dataclasses.replace(NET[1], stays=False)]
    with pytest.raises(NotRegular, match="part 1 of the forward makes 2 to 3 blocks"):
        lift_lanes([*recorded(NET)[:2], toy_cut(larger, 7, 5)])


def test_a_size_that_nothing_explains_is_refused() -> None:
    window = toy_cut(NET, 7, 5)
    meeting = next(index for index, stage in enumerate(window.stages) if stage.name == "meeting")
    first, *others = window.blocks[meeting, ALL]
    odd = {**window.blocks, (meeting, ALL): (first._replace(bytes=first.bytes + 1), *others)}
    with pytest.raises(NotRegular, match="isn't explained"):
        lift_lanes([*recorded(NET)[:2], dataclasses.replace(window, blocks=odd)])


def test_lanes_that_take_no_turns_are_refused() -> None:
    phases = [Phase(phase_name("forward", 0, lane), ()) for lane in (0, 2, 1)]
    with pytest.raises(NotRegular, match="take turns"):
        cut(Recording(5, tuple(phases)), 3)


def test_a_block_kept_between_windows_is_refused() -> None:
    with pytest.raises(NotRegular, match="kept from one window to the next"):
        cut(Recording(5, (Phase(FIRST, (Event(-1, -512),)),)), 3)
