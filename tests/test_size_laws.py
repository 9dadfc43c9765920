"""Laws of sizes that neither stand still nor are proportional: steps, tiles, ends, and sizes of two meanings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.simulation.from_verification import without_state
from autoaccum.simulation.program import lift, window
from autoaccum.simulation.recording import Event, Phase, Recording
from autoaccum.simulation.scaling import Rule, size_rules
from autoaccum.simulation.size_laws import reduction_buffers, saturating

MiB = 1 << 20
Size = Callable[[int], int]


def tiles(per_sample: int, unit: int, most: int = 1 << 30) -> Size:
    return lambda n: min(most, -(-per_sample * n // unit)) * unit


def ruled(sizes: list[Size], at: list[int], *, reductions: bool | None = None, inputs: list[int] | None = None) -> Size:
    """What is said of the first of these sizes at another micro-batch, by recordings `at` these, the nearest last."""
    *smaller, m, n = at
    recorded = {each: [size(each) for size in sizes] for each in at}
    rules = size_rules(
        recorded[n], n, recorded[m], m, [(each, recorded[each]) for each in reversed(smaller)],
        reductions=reductions, inputs=inputs or (),
    )  # fmt: skip
    return rules[recorded[n][0]].at


def test_tiles_are_distinguished_from_coarser_ones_by_what_nothing_else_explains() -> None:
    # 12 tiles at 139 samples are 6 of twice the size, too; and two of them stand at 11, where they are another's.
    unit = 20 * MiB
    sizes = [tiles(1769472, unit), tiles(221184, unit), *(lambda n, b=b: b * n for b in (1769472, 221184))]
    found = ruled(sizes, [7, 11, 89, 139], reductions=False)
    assert [found(n) for n in (89, 139, 180, 221)] == [sizes[0](n) for n in (89, 139, 180, 221)]


def test_two_recordings_give_a_workspaces_law_where_it_holds_copies_of_two_tensors() -> None:
    """As on an H200: 401,408 and 1,605,632 bytes a sample, beside a constant that leaves room for larger ones."""
    tensors = (401_408, 802_816, 1_605_632, 3_211_264)
    sizes: list[Size] = [lambda n: 25_010_271 + 2_007_040 * n, *(lambda n, b=b: b * n for b in tensors)]
    new: Size = lambda n: 4_003_164 if n == 43 else 13 * 401_408  # noqa: E731  # another kernel's: 13 has no partner
    found = ruled([*sizes, new], [13, 43], reductions=False)
    assert [found(n) for n in (13, 43, 113)] == [sizes[0](n) for n in (13, 43, 113)]


def test_a_workspace_of_a_new_kernel_is_predicted_no_lower_than_it_may_become() -> None:
    tensors = (401_408, 1_605_632, 3_211_264)
    new: Size = lambda n: 8_848_039 + 2_007_040 * n if n >= 43 else 3_000_017  # noqa: E731
    sizes: list[Size] = [new, *(lambda n, b=b: b * n for b in tensors)]
    found = ruled(sizes, [11, 13, 43], reductions=False)
    assert found(43) == new(43) and new(113) <= found(113) <= 1.1 * new(113)


@given(
    unit=st.integers(1, 40),
    slopes=st.lists(st.integers(5, 400), min_size=1, max_size=3, unique=True),
    n=st.sampled_from([83, 139, 211, 509]),
)
def test_tiles_are_what_they_were_where_they_were_recorded_and_never_fall(unit: int, slopes: list[int], n: int) -> None:
    scales = [slope * 8192 for slope in slopes]
    sizes = [tiles(scale, unit * MiB) for scale in scales] + [lambda n, b=scale: b * n for scale in scales]
    m = next(p for p in (251, 109, 73, 43) if p < 0.55 * n)
    found = ruled(sizes, [7, 11, m, n], reductions=False)
    assert found(n) == sizes[0](n)
    assert all(found(size) <= found(size + 1) for size in range(n - 3, n + 40))


def test_tiles_that_came_to_their_end_between_recordings_stay_there() -> None:
    unit = 20 * MiB
    sizes = [tiles(3538944, unit, most=16), lambda n: 3538944 * n]
    found = ruled(sizes, [7, 11, 73, 167], reductions=False)
    assert found(222) == 16 * unit
    assert found(73) == sizes[0](73)


def test_what_has_the_same_tiles_ends_where_others_ended() -> None:
    unit = 20 * MiB
    early, late = tiles(3538944, unit, most=16), tiles(1769472, unit, most=16)

    def phase(n: int) -> Phase:
        sizes = [early(n), late(n), 3538944 * n, 1769472 * n]
        return Phase(FIRST, tuple(Event(index + 1, size) for index, size in enumerate(sizes)))

    program = lift([Recording(n, (phase(n),)) for n in (11, 73, 167)])
    rule = program.phases[FIRST][1].rule
    assert rule is not None
    assert (rule.at(167), rule.at(222)) == (15 * unit, 16 * unit)


@pytest.mark.parametrize("element_bytes", [4, 2])
def test_a_buffer_of_a_reduction_follows_the_rows_that_it_reads(element_bytes: int) -> None:
    # A vision transformer's bias of 384: 197 rows a sample, 64 of them to a block, 512 bytes a column of partial sums.
    def buffer(n: int) -> int:
        return 512 * 384 * -(-197 * n // 64)

    found = ruled([buffer], [7, 11, 31, 37], reductions=True, inputs=[197 * 384 * element_bytes, 197 * 1000])
    assert [found(n) for n in (31, 37, 60, 80)] == [buffer(n) for n in (31, 37, 60, 80)]


def test_a_buffer_of_a_reduction_ends_at_whole_rows_of_blocks() -> None:
    # 132 multiprocessors run 16 blocks of 128 threads each, whose partial sums take 64 KiB. A row of blocks covers all
    # outputs: rows of 2 and of 24 blocks fill the device, and of 9 the last row is not whole.
    def ended(row: int) -> int:
        return -(-132 * 16 // row) * row * 65536

    assert ended(2) == ended(24) < ended(9)
    growing, row = 87 * 24 * 65536, 24 * 65536
    rules = {
        ended(2): Rule(ended(2)),
        ended(9): Rule(0, per_sample=1806336, max_bytes=ended(9), unit_bytes=3 * 65536),
        growing: Rule(0, per_sample=1204224, unit_bytes=row),
    }
    sizes = [ended(2), ended(2), ended(9), growing]
    found = saturating(sizes, rules, [[ended(2)]], reductions=True)
    assert found == {growing: rules[growing]._replace(max_bytes=ended(24))}


def test_a_buffer_of_a_reduction_is_known_by_the_counters_beside_it() -> None:
    buffer, counters, other = Event(1, 4 * MiB), Event(2, 1024), Event(3, 4 * MiB)
    events = [buffer, counters, Event(2, -1024), Event(1, -4 * MiB), other, Event(3, -4 * MiB)]
    assert reduction_buffers(events) == {1}
    assert reduction_buffers([other, Event(3, -4 * MiB), counters]) == set()


def recorded(n: int, *, weight: int, per_sample: int, buffer: int | None = None) -> Recording:
    """A weight's gradient, an activation, and where asked for a reduction's buffer with its counters."""
    scratch = [Event(3, buffer), Event(4, 64), Event(4, -64), Event(3, -buffer)] if buffer else []
    events = (Event(1, per_sample * n), *scratch, Event(2, weight), Event(1, -per_sample * n))
    return Recording(n, (Phase(FIRST, events), Phase(OPTIMIZER, (Event(2, -weight),))))


def test_a_weight_as_large_as_an_activation_is_distinguished_by_its_place() -> None:
    # At 3 samples both are 3 MiB, and at 2 there are sizes that speak for either.
    program = lift([recorded(n, weight=3 * MiB, per_sample=MiB) for n in (2, 3)])
    assert [event.bytes for event in window(program, (5,))[0].events if event.bytes > 0] == [5 * MiB, 3 * MiB]


def test_a_buffer_as_large_as_a_weight_is_distinguished_by_its_counters() -> None:
    # The buffer is 11 steps of 2 MiB at 41 samples; so many bytes has the weight, too.
    def at(n: int) -> Recording:
        return recorded(n, weight=22 * MiB, per_sample=1000, buffer=2 * MiB * -(-n // 4))

    program = lift([at(n) for n in (7, 13, 41)])
    found = [event.bytes for event in window(program, (60,))[0].events if event.bytes >= MiB]
    assert found == [30 * MiB, 22 * MiB]


def test_the_first_step_without_the_state_it_makes_iswithout_state() -> None:
    later = Phase(LATER, (Event(2, 70), Event(2, -70)))
    step = Phase(OPTIMIZER, (Event(3, 500), Event(4, 9), Event(4, -9), Event(1, -100)))
    found = without_state(Recording(2, (Phase(FIRST, (Event(1, 100),)), later, step)))
    assert found.phases[:2] == (Phase(FIRST, (Event(1, 100),)), later)
    assert found.phases[2].events == (Event(4, 9), Event(4, -9), Event(1, -100))


def test_a_rule_that_steps_may_saturate_until_its_end_is_known() -> None:
    assert Rule(0, per_sample=5, unit_bytes=64).may_saturate
    assert not Rule(0, per_sample=5, unit_bytes=64, max_bytes=640).may_saturate
    assert not Rule(0, per_sample=5, divisor=7).may_saturate
