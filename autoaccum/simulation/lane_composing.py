"""Compose windows in lanes of any split from a program.

No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..phases import BETWEEN, FIRST, OPTIMIZER
from .lane_program import LaneProgram, Made, bytes_by, kind_of
from .lane_windows import NotRegular, Stage, Stretch
from .recording import Event, Phase, Recording


def compose(program: LaneProgram, split: Sequence[int]) -> Recording:
    """Return the window of a split as a recording.

    Its forward and backward are one phase.

    Args:
        program: What was lifted.
        split: Samples in each lane; at least two.

    Raises:
        NotRegular: A block would end where none was recorded to end.
    """
    phases: list[tuple[str, list[Event]]] = [(FIRST, [])]
    for stage, _, events in stretches_of(program, split):
        if stage.name in (OPTIMIZER, BETWEEN):
            phases.append((stage.name, []))
        phases[-1][1].extend(events)
    return Recording(split[0], tuple(Phase(name, tuple(events)) for name, events in phases))


def stretches_of(program: LaneProgram, split: Sequence[int]) -> Iterator[tuple[Stage, int, list[Event]]]:
    """Yield each stretch of a window: stage, lane and events.

    Args:
        program: What was lifted.
        split: Samples in each lane; at least two.

    Raises:
        NotRegular: A block would end where none was recorded to end.
    """
    return _Composing(program, split).run()


class _Composing:
    """Write a window's events, stretch by stretch."""

    def __init__(self, program: LaneProgram, split: Sequence[int]) -> None:
        self.program, self.split, self.samples = program, split, sum(split)
        self.frees: dict[Stretch, dict[int, list[Event]]] = {}
        self.names = 0

    def run(self) -> Iterator[tuple[Stage, int, list[Event]]]:
        for stage, lane, kind in self.program.stretches(self.split):
            events: list[Event] = []
            self._write(events, stage, lane, kind)
            yield self.program.stages[stage], lane, events
        if any(self.frees.values()):
            raise NotRegular("a block would end before it is made")

    def _write(self, events: list[Event], stage: int, lane: int, kind: int) -> None:
        frees = self.frees.setdefault((stage, lane), {})
        n, lanes = self.split[lane], len(self.split)
        for place, block in enumerate(self.program.made[stage, kind]):
            if frees:
                events += frees.pop(place, ())
            size = bytes_by(block.rule, n, lanes, self.samples)
            self.names += 1
            events.append(Event(self.names, size, block.stream))
            if block.stage is not None:
                self._end(block, lane, Event(self.names, -size, block.stream))
        for place in sorted(frees):
            events += frees[place]
        del self.frees[stage, lane]

    def _end(self, block: Made, lane: int, event: Event) -> None:
        assert block.stage is not None
        target = block.relation.lane(lane, len(self.split))
        after = None if target is None else block.after.get(kind_of(target, len(self.split), self.program.edges))
        if target is None or after is None:
            raise NotRegular("a block would end in a lane where none was recorded to end")
        self.frees.setdefault((block.stage, target), {}).setdefault(after, []).append(event)
