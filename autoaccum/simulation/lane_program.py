"""Lift windows in lanes, by samples and number of lanes.

Windows are recorded at a few sizes and numbers of lanes. What one lane does is one program, the same for each lane
between the first ones and the last ones; it is lifted like a micro-batch (program.py). What all lanes share is lifted
by its place: such sizes follow the number of lanes and the window's samples. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .lane_windows import ALL, Block, LaneWindow, NotRegular, Stage, Stretch
from .program import lift_phase
from .scaling import Rule

Edges = tuple[int, int]
EDGES: tuple[Edges, ...] = ((1, 1), (1, 2), (2, 1), (2, 2))  # lanes at both ends that differ from those between
SHORT = 4  # windows of so many lanes, and of fewer, are programs of their own: no lane there is only between
MIDDLE = 10**6  # the kind of a lane between them
SAME, NEXT, BEFORE, FROM_FIRST, FROM_LAST, SHARED = "same", "next", "before", "from first", "from last", "shared"


class WindowRule(NamedTuple):
    """Bytes by the number of lanes k and the window's samples N.

    `constant + (per_lane k + per_sample N + per_pair N N) // divisor`, and `per_own n N` for n samples of the lane.
    """

    constant: int
    per_lane: int = 0
    per_sample: int = 0
    per_pair: int = 0
    per_own: int = 0
    divisor: int = 1

    def of(self, n: int, lanes: int, samples: int) -> int:
        """Return the bytes for a lane of n samples."""
        scaled = self.per_lane * lanes + self.per_sample * samples + self.per_pair * samples * samples
        return self.constant + (scaled + self.per_own * n * samples) // self.divisor


def bytes_by(rule: Rule | WindowRule, n: int, lanes: int, samples: int) -> int:
    """Return a rule's bytes for a lane of n samples."""
    return rule.at(n) if isinstance(rule, Rule) else rule.of(n, lanes, samples)


class Relation(NamedTuple):
    """The lane in which a block ends, relative to its own."""

    kind: str
    distance: int = 0

    def lane(self, lane: int, lanes: int) -> int | None:
        """Return that lane; None where there is none.

        Args:
            lane: The lane that makes the block.
            lanes: Number of lanes.
        """
        if self.kind == SHARED:
            return ALL
        found = {
            SAME: lane, NEXT: lane + 1, BEFORE: lane - self.distance,
            FROM_FIRST: self.distance, FROM_LAST: lanes - 1 - self.distance,
        }[self.kind]  # fmt: skip
        return found if 0 <= found < lanes else None


class Made(NamedTuple):
    """A block that a kind of stretch makes.

    Attributes:
        rule: Its bytes.
        stream: Its stream.
        stage: The index of the stage in which it is freed; None where nothing frees it.
        relation: The lane in which it is freed.
        after: By that lane's kind, the number of blocks that its stretch makes before.
    """

    rule: Rule | WindowRule
    stream: int
    stage: int | None
    relation: Relation
    after: Mapping[int, int]


@dataclass(frozen=True)
class LaneProgram:
    """A window in lanes whose sizes follow the split.

    Attributes:
        recorded_at: Samples in each lane of the recording that its sizes are lifted from.
        edges: Lanes at the beginning and the end that differ from those between them.
        stages: In their order.
        made: What each stage makes, by the kind of lane.
        moved: By stage and kind of lane, the sizes of what moves to the host.
    """

    recorded_at: int
    edges: Edges
    stages: tuple[Stage, ...]
    made: Mapping[Stretch, tuple[Made, ...]]
    moved: Mapping[Stretch, tuple[Rule | WindowRule, ...]]

    def stretches(self, split: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield each stretch: its stage's index, its lane, the lane's kind."""
        for index, stage in enumerate(self.stages):
            for lane in stage.lanes(len(split)):
                yield index, lane, kind_of(lane, len(split), self.edges)

    def moved_sizes(self, split: Sequence[int]) -> Iterator[int]:
        """Yield the bytes of each tensor that moves to the host."""
        for stage, lane, kind in self.stretches(split):
            yield from self.moved_by((stage, kind), lane, split)

    def moved_by(self, stretch: Stretch, lane: int, split: Sequence[int]) -> Iterator[int]:
        """Yield the bytes of each tensor that one stretch moves.

        Args:
            stretch: Its stage's index, and its lane's kind.
            lane: Its lane.
            split: Samples in each lane.
        """
        rules = self.moved.get(stretch, ())
        yield from (bytes_by(rule, split[lane], len(split), sum(split)) for rule in rules)


def kind_of(lane: int, lanes: int, edges: Edges) -> int:
    """Return a lane's kind: by the first, by the last, or between."""
    if lane == ALL:
        return ALL
    back = lanes - 1 - lane
    if lane < edges[0] and lane <= back:
        return lane
    return -2 - back if back < edges[1] else MIDDLE


def lift_lanes(windows: Sequence[LaneWindow]) -> LaneProgram:
    """Make a program from recorded windows.

    Args:
        windows: At two sizes or more with the same number of lanes, and at one of them with another one; each of five
            lanes or more, and one of seven: there a lane between ends a block in another one between. Or all of the
            same number up to four: there each lane is of its own kind. The largest is the program.

    Raises:
        NotRegular: They are not one program.
    """
    ordered = sorted(windows, key=lambda window: (window.micro_batch, window.lanes))
    for window in ordered:
        if window.stages != ordered[-1].stages:
            raise NotRegular("lanes meet at other places, or train others, at another size")
    counts = {window.lanes for window in ordered}
    if len(counts) == 1 and max(counts) <= SHORT:
        return _Lifting(ordered, EDGES[-1]).run()
    reason = ""
    for edges in EDGES:
        between = {window.micro_batch for window in ordered if window.lanes > sum(edges)}
        if len(between) < 2:
            break
        try:
            return _Lifting(ordered, edges).run()
        except NotRegular as error:
            reason = str(error)
    raise NotRegular(reason or "too few lanes were recorded")


@dataclass
class _Seen:
    """One block in one stretch, in a window."""

    window: LaneWindow
    lane: int
    block: Block


@dataclass
class _Lifting:
    """Lift windows, the largest last, with so many lanes at the ends."""

    windows: Sequence[LaneWindow]
    edges: Edges

    def run(self) -> LaneProgram:
        base = self.windows[-1]
        made, moved = {}, {}
        kinds = {kind_of(lane, window.lanes, self.edges) for window in self.windows for lane in range(window.lanes)}
        rules = {kind: iter(self._rules_of(kind)) for kind in sorted(kinds)}
        for index, stage in enumerate(base.stages):
            for kind in sorted(kinds) if stage.order else (ALL,):
                made[index, kind] = tuple(
                    self._made(seen, next(rules[kind]) if kind in rules else None, index)
                    for seen in self._side_by_side(index, kind)
                )
                sizes = self._moved(index, kind)
                if sizes:
                    moved[index, kind] = sizes
        return LaneProgram(base.micro_batch, self.edges, base.stages, made, moved)

    def _lanes(self, kind: int) -> Iterator[tuple[LaneWindow, int]]:
        """Yield where lanes of a kind were recorded."""
        for window in self.windows:
            for lane in (ALL,) if kind == ALL else range(window.lanes):
                if kind_of(lane, window.lanes, self.edges) == kind:
                    yield window, lane

    def _side_by_side(self, stage: int, kind: int) -> Iterator[list[_Seen]]:
        """Yield each block of a stage with all its recordings."""
        seen = [(window, lane, window.blocks[stage, lane]) for window, lane in self._lanes(kind)]
        counts = {len(blocks) for _, _, blocks in seen}
        if len(counts) > 1:
            raise NotRegular(f"{self._title(stage)} makes {min(counts)} to {max(counts)} blocks, by the window")
        for place in range(min(counts)):
            yield [_Seen(window, lane, blocks[place]) for window, lane, blocks in seen]

    def _title(self, index: int) -> str:
        stage = self.windows[-1].stages[index]
        return f"part {stage.part} of the {stage.name}"

    def _made(self, seen: list[_Seen], rule: Rule | None, stage: int) -> Made:
        streams = {each.block.stream for each in seen}
        stages = {None if each.block.end is None else each.block.end.stage for each in seen}
        if len(streams) > 1 or len(stages) > 1:
            raise NotRegular(
                f"{self._title(stage)} makes a block of {seen[-1].block.bytes:,} bytes that ends elsewhere"
            )
        found = _size(seen, rule)
        if found is None:
            sizes = sorted({each.block.bytes for each in seen})
            raise NotRegular(f"{self._title(stage)} makes a block whose size isn't explained: {sizes} bytes")
        relation, after = self._end(seen, stage)
        return Made(found, streams.pop(), stages.pop(), relation, after)

    def _end(self, seen: list[_Seen], stage: int) -> tuple[Relation, dict[int, int]]:
        """Return the lane in which a block ends, and the place there."""
        relations: list[Relation] | None = None
        after: dict[int, int] = {}
        for window, lane, end in ((each.window, each.lane, each.block.end) for each in seen):
            if end is None:
                return Relation(SHARED), {}
            possible = list(_relations(lane, end.lane, window.lanes))
            relations = possible if relations is None else [each for each in relations if each in possible]
            kind = kind_of(end.lane, window.lanes, self.edges)
            if after.setdefault(kind, end.after) != end.after:
                relations = []
        if not relations:
            raise NotRegular(f"{self._title(stage)} makes a block that ends in no regular place")
        return relations[0], after

    def _rules_of(self, kind: int) -> list[Rule | None]:
        """Return the rules of a lane's blocks, as of a micro-batch's."""
        phases = {window.micro_batch: window.phases[lane] for window, lane in self._lanes(kind)}
        (n, base), *others = sorted(phases.items(), reverse=True)
        if not others:
            return [Rule(event.bytes) for event in base.events if event.bytes > 0]
        return [step.rule for step in lift_phase(base, n, others) if step.rule is not None]

    def _moved(self, stage: int, kind: int) -> tuple[Rule | WindowRule, ...]:
        seen = {
            (window.micro_batch, window.lanes): window.moved.get((stage, lane), ())
            for window, lane in self._lanes(kind)
        }
        counts = {len(each) for each in seen.values()}
        if len(counts) > 1:
            raise NotRegular(f"{self._title(stage)} moves {min(counts)} to {max(counts)} tensors to the host")
        found = (_law_of({key: each[place] for key, each in seen.items()}) for place in range(min(counts)))
        rules = tuple(rule for rule in found if rule is not None)
        if len(rules) < min(counts):
            raise NotRegular(f"{self._title(stage)} moves a tensor to the host whose size isn't explained")
        return rules


def _relations(lane: int, target: int, lanes: int) -> Iterator[Relation]:
    """Yield ways to name a lane from another one, the likeliest first."""
    if target == ALL:
        yield Relation(SHARED)
        return
    if lane != ALL:
        near = {0: Relation(SAME), 1: Relation(NEXT), -1: Relation(BEFORE, 1), -2: Relation(BEFORE, 2)}
        if target - lane in near:
            yield near[target - lane]
    yield Relation(FROM_FIRST, target)
    yield Relation(FROM_LAST, lanes - 1 - target)


def _size(seen: Sequence[_Seen], rule: Rule | None) -> Rule | WindowRule | None:
    """Return a rule that explains a block in all windows, or None.

    Args:
        seen: The block in each window.
        rule: What is known of it by its size alone; None for a block of all lanes.
    """
    sizes = {(each.window.micro_batch, each.window.lanes): each.block.bytes for each in seen}
    by_samples = {n: size for (n, _), size in sizes.items()}
    if all(by_samples[n] == size for (n, _), size in sizes.items()):
        if rule is not None and all(rule.at(n) == size for n, size in by_samples.items()):
            return rule
        found = _rule_by_place(by_samples)
        if found is not None and (rule is not None or not found.per_sample):
            return found
        if rule is not None:  # it grows in steps: the law by size is the best that is known
            return rule
    return next((law for law in _window_laws(sizes) if _explains(law, sizes)), None)


def _law_of(sizes: Mapping[tuple[int, int], int]) -> Rule | WindowRule | None:
    """Return a law of sizes by samples and lanes, or None."""
    by_samples = {n: size for (n, _), size in sizes.items()}
    if all(by_samples[n] == size for (n, _), size in sizes.items()):
        found = _rule_by_place(by_samples)
        if found is not None:
            return found
    return next((law for law in _window_laws(sizes) if _explains(law, sizes)), None)


def _rule_by_place(sizes: Mapping[int, int]) -> Rule | None:
    """Return a place's rule: constant, proportional, or a line through three."""
    (n, size), *others = sorted(sizes.items(), reverse=True)
    laws = [Rule(size), Rule(0, per_sample=size, divisor=n)]
    if len(others) > 1:
        m, smaller = others[0]
        slope, uneven = divmod(size - smaller, n - m)
        laws += [] if uneven or slope < 0 else [Rule(size - slope * n, per_sample=slope)]
    return next((law for law in laws if all(law.at(m) == each for m, each in sizes.items())), None)


def _window_laws(sizes: Mapping[tuple[int, int], int]) -> Iterator[WindowRule]:
    """Yield the laws that a size may follow."""
    (n, lanes), size = max(sizes.items())
    samples = n * lanes
    yield WindowRule(size)
    yield WindowRule(0, per_lane=size, divisor=lanes)
    yield WindowRule(0, per_sample=size, divisor=samples)
    yield WindowRule(0, per_own=size, divisor=n * samples)
    yield WindowRule(0, per_pair=size, divisor=samples * samples)
    for (_, other), smaller in sizes.items():
        slope, uneven = divmod(size - smaller, lanes - other) if other != lanes else (0, 0)
        if slope > 0 and not uneven and slope * lanes < size:
            yield WindowRule(size - slope * lanes, per_lane=slope)


def _explains(law: WindowRule, sizes: Mapping[tuple[int, int], int]) -> bool:
    return all(law.of(n, lanes, n * lanes) == size for (n, lanes), size in sizes.items())
