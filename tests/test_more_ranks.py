"""From how many ranks on a sharded model fits: blocks get the sizes of other ranks; the search ends at the first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.planning import more_ranks
from autoaccum.ranks.shard_sizes import Sizes
from autoaccum.simulation.program import as_recorded
from autoaccum.simulation.recording import Event, Phase, Recording

REDUCING, GATHERING = 7, 9
SIZES = Sizes(shards={400: 100, 20: 5}, gathered={400: 380, 800: 760})  # 400 is both, as on two ranks


def window() -> Recording:
    """A block is gathered and given back, its gradient reduced into a shard, and the optimizer makes a state."""
    gathered, activation, reduced = Event(1, 400, GATHERING), Event(2, 33), Event(3, 400, REDUCING)
    freed = tuple(each._replace(bytes=-each.bytes) for each in (gathered, activation))
    first = Phase(FIRST, (gathered, activation, reduced, *freed))
    later = Phase(LATER, (Event(4, 800), Event(5, 400, REDUCING), Event(4, -800), Event(5, -400, REDUCING)))
    return Recording(2, (first, later, Phase(OPTIMIZER, (Event(6, 400), Event(3, -400, REDUCING)))), passes=2)


def test_a_size_of_both_kinds_is_a_shard_s_where_gradients_are_reduced_and_in_the_optimizer_s_step() -> None:
    there = more_ranks._Resizing(SIZES, window())
    first, later, optimizer = ([event.bytes for event in phase.events] for phase in there.recording(window()).phases)
    assert first == [380, 33, 100, -380, -33]
    assert later == [760, 100, -760, -100]
    assert optimizer == [100, -100]
    assert [e.bytes for e in there.events([Event(1, 400), Event(2, 20), Event(1, -400)], OPTIMIZER)] == [100, 5, -100]


def test_a_program_s_constant_sizes_are_those_of_other_ranks() -> None:
    there = more_ranks._Resizing(SIZES, window())
    program = there.program(as_recorded(window()))
    sizes = {name: [s.rule.at(2) for s in steps if s.rule is not None] for name, steps in program.phases.items()}
    assert sizes == {FIRST: [380, 33, 100], LATER: [760, 100], OPTIMIZER: [100]}


@pytest.mark.parametrize("fewest", [3, 8, 9, 19, 64, 127])
@pytest.mark.parametrize("guess", [3, 10, 24, 200])
def test_the_fewest_ranks_are_found_from_any_guess(monkeypatch: pytest.MonkeyPatch, fewest: int, guess: int) -> None:
    asked: list[int] = []
    here = cast(Any, SimpleNamespace(request=SimpleNamespace(world_size=2)))
    monkeypatch.setattr(more_ranks, "_can_be_resized", lambda predictor: True)
    monkeypatch.setattr(more_ranks, "fits_on", lambda predictor, ranks: asked.append(ranks) or ranks >= fewest)
    assert more_ranks.least_ranks(here, guess) == fewest
    assert len(asked) <= 16 and min(asked) > 2
    monkeypatch.setattr(more_ranks, "fits_on", lambda predictor, ranks: False)
    assert more_ranks.least_ranks(here, guess) == 0
    monkeypatch.setattr(more_ranks, "_can_be_resized", lambda predictor: False)
    assert more_ranks.least_ranks(here, guess) is None
