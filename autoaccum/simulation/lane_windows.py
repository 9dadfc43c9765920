"""Cut a recorded window in lanes into stretches.

Lanes run one at a time, and in the same order in each part between two meetings, so a window is a list of *stages*: one
stretch of each lane, or what all lanes share. In place of frees, each block has an end: the stretch in which it is
freed, and how many blocks that stretch had made by then. So one lane's stretches can be repeated for any number of
lanes. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from .recording import Event, Phase, Recording

ALL = -1  # the lane of what all lanes share
SEPARATOR = "|"
Stretch = tuple[int, int]  # a stage's index, and a lane


class NotRegular(Exception):
    """Say why a window in lanes doesn't follow from shorter ones."""


class Stage(NamedTuple):
    """What lanes do between two meetings, one by one or all together.

    Attributes:
        name: What it is: a forward, a backward, a meeting, or a phase of the window.
        part: Number of meetings before it.
        order: 1 where lanes run in their order, -1 where they go back, 0 where all lanes share it.
    """

    name: str
    part: int
    order: int

    def lanes(self, count: int) -> Sequence[int]:
        """Return the lanes in the order in which they run."""
        if not self.order:
            return (ALL,)
        return range(count) if self.order > 0 else range(count - 1, -1, -1)


class End(NamedTuple):
    """Where a block is freed.

    Attributes:
        stage: The stage's index.
        lane: The lane, or `ALL`.
        after: Number of blocks that this stretch makes before.
    """

    stage: int
    lane: int
    after: int


class Block(NamedTuple):
    """A block that a stretch makes, and its end, if any."""

    bytes: int
    stream: int
    end: End | None


@dataclass(frozen=True)
class LaneWindow:
    """A recorded window in lanes.

    Attributes:
        micro_batch: Samples in each lane.
        lanes: Number of lanes.
        stages: In their order.
        blocks: What each stretch makes.
        phases: Each lane's events, as one phase.
        moved: The bytes of each tensor that a stretch moves to the host, in order.
        recomputed_bytes: What the backward computed again, of saved tensors.
    """

    micro_batch: int
    lanes: int
    stages: tuple[Stage, ...]
    blocks: Mapping[Stretch, tuple[Block, ...]]
    phases: tuple[Phase, ...]
    moved: Mapping[Stretch, tuple[int, ...]]
    recomputed_bytes: int = 0

    @property
    def samples(self) -> int:
        """Samples in the window."""
        return self.micro_batch * self.lanes

    @property
    def moved_bytes(self) -> int:
        """What all stretches move to the host."""
        return sum(map(sum, self.moved.values()))


def phase_name(name: str, part: int, lane: int) -> str:
    """Return the name of a stretch in a recording."""
    return SEPARATOR.join((name, str(part), str(lane)))


def cut(recording: Recording, lanes: int, moved: Sequence[Sequence[int]] = ()) -> LaneWindow:
    """Cut a recording whose phases are stretches.

    Args:
        recording: Of one window in lanes of equal size; phases beside the stretches belong to all lanes.
        lanes: Number of lanes.
        moved: For each phase, the bytes of what it moves to the host.

    Raises:
        NotRegular: Lanes don't take turns in one order, or a block is freed that was there before.
    """
    places = [_place(phase.name) for phase in recording.phases]
    stages, stretches = _stages(places, lanes)
    blocks = _with_ends([phase.events for phase in recording.phases], stretches)
    of_lanes: list[list[Event]] = [[] for _ in range(lanes)]
    for (_, lane), phase in zip(stretches, recording.phases, strict=True):
        if lane != ALL:
            of_lanes[lane] += [event for event in phase.events if event.bytes]
    found = {stretch: tuple(sizes) for stretch, sizes in zip(stretches, moved, strict=False) if sizes}
    phases = tuple(Phase("lane", tuple(events)) for events in of_lanes)
    return LaneWindow(recording.micro_batch, lanes, stages, blocks, phases, found)


def _place(name: str) -> tuple[str, int, int]:
    parts = name.split(SEPARATOR)
    return (parts[0], int(parts[1]), int(parts[2])) if len(parts) == 3 else (name, 0, ALL)


def _stages(places: Sequence[tuple[str, int, int]], lanes: int) -> tuple[tuple[Stage, ...], list[Stretch]]:
    """Return the stages, and for each place its stretch."""
    stages: list[Stage] = []
    stretches: list[Stretch] = []
    for (name, part), run in groupby(places, key=lambda place: place[:2]):
        order = [lane for _, _, lane in run]
        sign = {(ALL,): 0, tuple(range(lanes)): 1, tuple(reversed(range(lanes))): -1}.get(tuple(order))
        if sign is None:
            raise NotRegular(f"lanes don't take turns: {order} in part {part} of the {name}")
        stretches += [(len(stages), lane) for lane in order]
        stages.append(Stage(name, part, sign))
    return tuple(stages), stretches


def _with_ends(
    events_of: Sequence[Sequence[Event]], stretches: Sequence[Stretch]
) -> Mapping[Stretch, tuple[Block, ...]]:
    """Return each stretch's blocks with their ends."""
    ends: dict[int, End] = {}
    for (stage, lane), events in zip(stretches, events_of, strict=True):
        made = 0
        for block, size, _ in events:
            if size < 0:
                if block < 0:
                    raise NotRegular(f"a block of {-size:,} bytes is kept from one window to the next")
                ends[block] = End(stage, lane, made)
            made += size > 0
    return {
        stretch: tuple(Block(size, stream, ends.get(block)) for block, size, stream in events if size > 0)
        for stretch, events in zip(stretches, events_of, strict=True)
    }


def course_of(phases: Sequence[Phase]) -> list[tuple[int, int, int]]:
    """Return bytes, stream and lifetime of each block, in order.

    The lifetime is the number of blocks that are made until it is freed. Equal for two windows whose frees between the
    same two allocations differ in their order alone.
    """
    made = 0
    begun: dict[int, int] = {}
    found: list[tuple[int, int, int]] = []
    for block, size, stream in _events(phases):
        if size > 0:
            begun[block] = made
            found.append((size, stream, 0))
            made += 1
        elif size < 0 and block in begun:
            index = begun.pop(block)
            found[index] = found[index][0], found[index][1], made - index
    return found


def _events(phases: Sequence[Phase]) -> Iterator[Event]:
    for phase in phases:
        yield from phase.events
