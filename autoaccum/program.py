"""Recordings -> a step program: the window's allocations as functions of the micro-batch.

Windows are recorded at *prime* micro-batches. A size that the prime divides scales with the batch; what it doesn't
divide is constant, saturated, or rounded up from something that scales, and a second recording at another prime tells
which, by size alone. So no events have to be paired, and the recording nearest the answer *is* the program: only its
sizes are rewritten. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

from .recording import BETWEEN, FIRST, LATER, OPTIMIZER, Event, Phase, Recording

EVERY = (2, 4, 8, 16, 32, 64, 128)  # samples to a step, where a size steps: powers of two, as blocks of threads are
TINY = 1 << 16  # the counters beside a reduction's buffer are of fewer bytes
ROUNDED_WITHIN = 0.03  # a size rounded up from something proportional (rows padded to 16) is that far off at most


class Rule(NamedTuple):
    """Bytes of a block at n samples: `constant + (per_sample * n + per_pair * n * n) // divisor`.

    Where `every` is more than 1, n counts in whole steps of so many samples, the last one begun; where `unit` is, the
    bytes are rounded up to whole units. `most` is where it saturates; 0 for nowhere.
    """

    constant: int
    per_sample: int = 0
    per_pair: int = 0
    divisor: int = 1
    every: int = 1
    most: int = 0
    unit: int = 1

    def at(self, n: int) -> int:
        """The bytes at a micro-batch of n samples, at least 1."""
        n = -(-n // self.every)
        size = max(1, self.constant + (self.per_sample * n + self.per_pair * n * n) // self.divisor)
        size = -(-size // self.unit) * self.unit
        return min(size, self.most) if self.most else size


Sized = tuple[int, Sequence[int]]  # a micro-batch, and the sizes of a phase recorded at it


class Step(NamedTuple):
    """An event whose size is a rule; None where it is a free."""

    block: int
    rule: Rule | None
    stream: int


@dataclass(frozen=True)
class StepProgram:
    """A window whose sizes follow the micro-batch.

    Attributes:
        recorded_at: The micro-batch of the recording that is the program.
        prelude: The first optimizer step, as recorded: it makes the optimizer's state.
        phases: By name: first and later micro-batch, optimizer step, and what runs between windows.
        successors: Blocks that outlive the first micro-batch and are freed in the next, each with the block of the
            later micro-batch that takes its place, so that a window can have any number of later micro-batches.
        later_growth_bytes: What a later micro-batch leaves behind, less what it takes away.
        leftover: What the window before left behind and the first micro-batch frees (a module that keeps its last
            activation): such blocks are there when a window begins.
    """

    recorded_at: int
    prelude: tuple[Event, ...]
    phases: Mapping[str, tuple[Step, ...]]
    successors: Mapping[int, int]
    later_growth_bytes: int = 0
    leftover: tuple[Step, ...] = ()

    @cached_property
    def scores(self) -> Mapping[str, Score]:
        """The phases made ready to be written."""
        return {name: score(steps) for name, steps in self.phases.items()}


def lift(recordings: Sequence[Recording], prelude: tuple[Event, ...] = ()) -> StepProgram:
    """Makes a step program of recordings at different primes.

    Args:
        recordings: At least two, each of a window of two micro-batches and its optimizer step. The largest is the
            program, the next largest sorts its sizes, and smaller ones confirm what two can only suggest.
        prelude: The events of the first optimizer step.
    """
    *_, base = ordered = sorted(recordings, key=lambda recording: recording.micro_batch)
    smaller = [
        (recording.micro_batch, {phase.name: _sizes(phase) for phase in recording.phases})
        for recording in reversed(ordered[:-1])
    ]
    phases = {}
    for phase in base.phases:
        others = [(m, sizes.get(phase.name, _sizes(phase))) for m, sizes in smaller]
        phases[phase.name] = _lift_phase(phase, base.micro_batch, others)
    other = ordered[-2]
    rules = size_rules(_leftover(base), base.micro_batch, _leftover(other), other.micro_batch)
    return _program(base, prelude, phases, rules)


def as_recorded(recording: Recording, prelude: tuple[Event, ...] = ()) -> StepProgram:
    """The program that a single recording is, good for its own micro-batch only."""
    phases = {
        phase.name: tuple(
            Step(e.block, Rule(e.bytes) if e.bytes > 0 else None, e.stream) for e in phase.events if e.bytes
        )
        for phase in recording.phases
    }
    return _program(recording, prelude, phases, {size: Rule(size) for size in _leftover(recording)})


def _program(
    recording: Recording,
    prelude: tuple[Event, ...],
    phases: Mapping[str, tuple[Step, ...]],
    leftover_rules: Mapping[int, Rule],
) -> StepProgram:
    successors = _successors(phases.get(FIRST, ()), phases.get(LATER, ()), recording.micro_batch)
    growth = sum(event.bytes for phase in recording.phases if phase.name == LATER for event in phase.events)
    leftover = tuple(Step(e.block, leftover_rules[-e.bytes], e.stream) for e in _foreign(recording))
    return StepProgram(recording.micro_batch, prelude, phases, successors, growth, leftover)


def _foreign(recording: Recording) -> list[Event]:
    """What the first micro-batch frees that was there before."""
    return [
        event
        for phase in recording.phases
        if phase.name == FIRST
        for event in phase.events
        if event.block < 0 and event.bytes
    ]


def _leftover(recording: Recording) -> list[int]:
    return [-event.bytes for event in _foreign(recording)]


def _lift_phase(phase: Phase, n: int, others: Sequence[Sized]) -> tuple[Step, ...]:
    (m, sizes), *further = others
    rules = size_rules(_sizes(phase), n, sizes, m, further)
    rules |= _saturating(phase.events, rules, [theirs for _, theirs in others])
    return tuple(Step(e.block, rules[e.bytes] if e.bytes > 0 else None, e.stream) for e in phase.events if e.bytes)


def _saturating(events: Sequence[Event], rules: Mapping[int, Rule], others: Sequence[Sequence[int]]) -> dict[int, Rule]:
    """Buffers of reductions that grow up to a size that others of them have reached.

    A reduction over rows allocates a buffer for partial results and counters right after it, and frees both
    (aten/src/ATen/native/cuda/Reduce.cuh). The buffer grows with the rows until there are as many blocks as the device
    runs at once: that many bytes are the same for all. It is known where one is that large here, and fewer were so in a
    smaller recording.
    """
    buffers = _reduction_buffers(events, rules)
    here = Counter(event.bytes for event in events)
    reached = [
        size for size in buffers if not rules[size].per_sample and any(here[size] > each.count(size) for each in others)
    ]
    most = max(reached, default=0)
    found = {}
    for size in buffers:
        rule = rules[size]
        if rule.per_sample and size < most:
            whole = rule.per_sample if rule.every > 1 else rule.unit  # blocks are counted up to whole ones
            found[size] = rule._replace(most=-(-most // whole) * whole)
    return found


def _reduction_buffers(events: Sequence[Event], rules: Mapping[int, Rule]) -> set[int]:
    """Sizes that are followed by a tiny constant each time, and freed within four events."""
    buffers: set[int] = set()
    others: set[int] = set()
    for index, event in enumerate(events):
        if event.bytes <= TINY:
            continue
        beside = next((other for other in events[index + 1 : index + 2] if 0 < other.bytes <= TINY), None)
        freed = any(other.block == event.block for other in events[index + 1 : index + 5])
        counters = beside is not None and rules[beside.bytes] == Rule(beside.bytes)
        (buffers if counters and freed else others).add(event.bytes)
    return buffers - others


def _sizes(phase: Phase) -> list[int]:
    return [event.bytes for event in phase.events if event.bytes > 0]


def size_rules(
    sizes: Sequence[int], n: int, other_sizes: Sequence[int], m: int, further: Sequence[Sized] = ()
) -> dict[int, Rule]:
    """Sorts the sizes of a phase recorded at n by those of the same phase recorded at m.

    Args:
        sizes: Bytes of each allocation at n samples, a prime.
        n: The prime.
        other_sizes: The same phase's at m samples, another prime.
        m: The other prime.
        further: Smaller recordings of the phase: their micro-batches, and their sizes.

    Returns:
        A rule for each distinct size.
    """
    here, there = Counter(sizes), Counter(other_sizes)
    rules = {size: _plain_rule(size, n, here[size], there, m) for size in here}
    unsure = [size for size in dict.fromkeys(sizes) if rules[size] is None]
    explained = {rule.at(m) for rule in rules.values() if rule is not None}
    rest = [size for size in dict.fromkeys(other_sizes) if size not in explained]
    seen = [(m, set(rest)), *((each, set(theirs)) for each, theirs in further)]
    scales = {rule.per_sample // n for rule in rules.values() if rule and rule.per_sample and rule.per_sample % n == 0}
    laws = {size: law for size in unsure if (law := _confirmed_law(size, n, seen, scales)) is not None}
    unsure = [size for size in unsure if size not in laws]
    explained = {law.at(m) for law in laws.values()}
    rest = [size for size in rest if size not in explained]
    settled = _paired_by_order(unsure, n, rest, m) or {size: _rounded_rule(size, n, rest, m) for size in unsure}
    return {size: rule or laws.get(size) or settled[size] for size, rule in rules.items()}


def _confirmed_law(size: int, n: int, seen: Sequence[tuple[int, set[int]]], scales: Iterable[int]) -> Rule | None:
    """The law that most other recordings bear out exactly, the nearest among them; None where there is none.

    Args:
        size: Bytes at n samples.
        n: The recording that is lifted.
        seen: The other recordings, the nearest first: their micro-batches and sizes.
        scales: Bytes per sample of what scales in this phase.
    """
    m, sizes = seen[0]

    def best(laws: Iterable[Rule]) -> tuple[int, Rule | None]:
        counts = {law: sum(law.at(each) in theirs for each, theirs in seen) for law in laws if law.at(m) in sizes}
        found = max(counts, key=lambda law: (counts[law], law.at(2 * n)), default=None)  # of equals the safer
        return (counts[found], found) if found is not None else (0, None)

    affine, line = best(_affine_laws(size, n, m, sizes))
    stepping, steps = best(_step_laws(size, n, m, sizes, scales))
    if affine > 1 and affine >= stepping:
        return line
    return steps


def _affine_laws(size: int, n: int, m: int, sizes: set[int]) -> Iterator[Rule]:
    """A + b n: workspaces of convolutions."""
    for partner in sizes:
        slope, uneven = divmod(size - partner, n - m)
        if slope > 0 and not uneven and slope * n < size:
            yield Rule(size - slope * n, per_sample=slope)


def _step_laws(size: int, n: int, m: int, sizes: set[int], scales: Iterable[int]) -> Iterator[Rule]:
    """What grows in steps of so many samples, or in whole units of something else that scales.

    A sum over rows keeps a partial result for each block of rows (aten/src/ATen/native/cuda/Reduce.cuh: ctas_per_output
    is rounded up); scratch comes in tiles, so many for each so many bytes of an input. A unit divides what was seen at
    both sizes, and what scales is one of the phase's own.
    """
    for every in EVERY:
        if size % -(-n // every) == 0 and every < n:
            yield Rule(0, per_sample=size // -(-n // every), every=every)
    if size <= TINY:
        return
    units = {gcd(size, partner) // part for partner in sizes if TINY < partner < size for part in range(1, 9)}
    for unit in units:
        if unit > TINY and not size % unit:
            for scale in scales:
                if -(-scale * n // unit) * unit == size and -(-scale * m // unit) * unit < size:
                    yield Rule(0, per_sample=scale, unit=unit)


def _plain_rule(size: int, n: int, times: int, there: Counter[int], m: int) -> Rule | None:
    """Constant, proportional or quadratic, where the other recording bears it out; None where it has to be guessed."""
    candidates = [Rule(size)]
    if size % n == 0:
        candidates.append(Rule(0, per_sample=size, divisor=n))
    if size % (n * n) == 0:
        candidates.append(Rule(0, per_pair=size, divisor=n * n))
    seen = [rule for rule in candidates if there[rule.at(m)]]
    if not seen:
        return candidates[1] if size % n == 0 else None
    # Two explanations: the one that stands there as often as here; else that which scales, to be on the safe side.
    return max(seen, key=lambda rule: (there[rule.at(m)] == times, rule.per_sample > 0, rule.per_pair > 0))


def _paired_by_order(unsure: Sequence[int], n: int, rest: Sequence[int], m: int) -> dict[int, Rule]:
    """Workspaces of the form a + b n: as many here as there, so the i-th distinct one is the same in both."""
    if len(unsure) != len(rest):
        return {}
    rules = {}
    for size, partner in zip(unsure, rest, strict=True):
        slope, per = size - partner, n - m
        if not 0 <= slope * n <= size * per * (1 + ROUNDED_WITHIN):  # falls with n, or rises faster than n does
            return {}
        rules[size] = Rule(size - slope * n // per, per_sample=slope, divisor=per)
    return rules


def _rounded_rule(size: int, n: int, rest: Sequence[int], m: int) -> Rule:
    """Saturated where something there grew faster than this one stands for; else it scales, on the safe side."""
    expected = [partner * n / m for partner in rest if partner <= size]
    if any(abs(each - size) <= ROUNDED_WITHIN * size for each in expected):
        return Rule(0, per_sample=size, divisor=n)  # rounded up from something proportional
    return Rule(size) if any(each > size for each in expected) else Rule(0, per_sample=size, divisor=n)


def _successors(first: Sequence[Step], later: Sequence[Step], n: int) -> dict[int, int]:
    """Which block of the later micro-batch takes the place of one that the first left behind and the later freed.

    Told by their sizes at n, the recorded micro-batch. Where a size was left behind as often by both, the i-th of one
    is the i-th of the other: a list that grows may hold blocks of the same size, and those replace nothing.
    """
    freed_later = {step.block for step in later if step.rule is None}
    before, after = left_behind(first, n), left_behind(later, n)
    successors = {}
    for size, blocks in before.items():
        heirs = after.get(size, [])
        if len(blocks) == len(heirs):
            pairs = zip(blocks, heirs, strict=True)
        else:
            pairs = zip((block for block in blocks if block in freed_later), heirs, strict=False)
        successors.update({block: heir for block, heir in pairs if block in freed_later})
    return successors


def left_behind(steps: Sequence[Step], n: int) -> dict[int, list[int]]:
    """By size at n: the blocks that a phase allocates and doesn't free, in order."""
    freed = {step.block for step in steps if step.rule is None}
    left: dict[int, list[int]] = {}
    for step in steps:
        if step.rule is not None and step.block not in freed:
            left.setdefault(step.rule.at(n), []).append(step.block)
    return left


def window(program: StepProgram, split: Sequence[int]) -> list[Phase]:
    """The events of one whole window.

    Args:
        program: The step program.
        split: Samples in each micro-batch, in order.

    Returns:
        Its phases: the first micro-batch, each later one, the optimizer step, and what runs between windows.
    """
    return [Phase(phase.name, tuple(map(Event._make, phase.events))) for phase in plain_window(program, split)]


def plain_window(program: StepProgram, split: Sequence[int]) -> list[Phase]:
    """The same with events that are plain tuples, for a replay: named ones take four times as long to make."""
    writer = Writer(program)
    left = writer.leftover(split[-1])
    first = writer.phase(FIRST, split[0])
    phases = [Phase(FIRST, left + first.events) if left else first]
    phases += [writer.phase(LATER, size) for size in split[1:]]
    phases += [writer.phase(name, split[-1]) for name in (OPTIMIZER, BETWEEN) if name in program.phases]
    return phases


class Score(NamedTuple):
    """A phase made ready to be written at any size.

    Attributes:
        rules: The distinct rules of its allocations.
        parts: Its events in order, each part ending with a block of an earlier phase that is freed (None at the end).
            An event is the place of its block among the phase's, the index of its size, and its stream; the sizes of
            allocations come first, then the same ones negative, for frees.
        kept: Blocks that the phase leaves: the recorded block, its place, the index of its size, its stream.
    """

    rules: tuple[Rule, ...]
    parts: tuple[tuple[tuple[tuple[int, int, int], ...], int | None], ...]
    kept: tuple[tuple[int, int, int, int], ...]
    blocks: int


def score(steps: Sequence[Step]) -> Score:
    """Makes a phase ready to be written."""
    rules: dict[Rule, int] = {}
    for step in steps:
        if step.rule is not None:
            rules.setdefault(step.rule, len(rules))
    own: dict[int, tuple[int, int, int]] = {}
    parts: list[tuple[tuple[tuple[int, int, int], ...], int | None]] = []
    events: list[tuple[int, int, int]] = []
    blocks = 0
    for block, rule, stream in steps:
        if rule is not None:
            blocks += 1
            own[block] = blocks, rules[rule], stream
            events.append(own[block])
        elif block in own:
            place, size, made_on = own.pop(block)
            events.append((place, size + len(rules), made_on))
        else:
            parts.append((tuple(events), block))
            events = []
    kept = tuple((block, *made) for block, made in own.items())
    return Score(tuple(rules), (*parts, (tuple(events), None)), kept, blocks)


class Writer:
    """Writes phases one after the other, and knows which copy of a recorded block is alive."""

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.predecessors = {after: before for before, after in program.successors.items()}
        self.live: dict[int, list[Event]] = {}  # recorded block -> what earlier phases left of it, oldest first
        self.names = max((event.block for event in program.prelude), default=0)

    def leftover(self, n: int) -> tuple[Event, ...]:
        """The blocks of the window before, whose last micro-batch had n samples."""
        events = []
        for block, rule, stream in self.program.leftover:
            assert rule is not None
            self.names += 1
            events.append(Event(self.names, rule.at(n), stream))
            self.live[block] = [events[-1]]
        return tuple(events)

    def phase(self, name: str, n: int) -> Phase:
        """The events of the next phase, at n samples."""
        return self.written(name, self.program.scores[name], n)

    def written(self, name: str, score: Score, n: int) -> Phase:
        """A score at n samples; events are plain tuples, since solving spends its time here."""
        base = self.names
        sizes = [rule.at(n) for rule in score.rules]
        sizes += [-size for size in sizes]
        events: list[tuple[int, int, int]] = []
        for part, freed in score.parts:
            events += [(base + place, sizes[size], stream) for place, size, stream in part]
            if freed is not None:
                copies = self.freed(freed, all_copies=name not in (FIRST, LATER))
                events += [(block, -size, stream) for block, size, stream in copies]
        self.names = base + score.blocks
        for block, place, size, stream in score.kept:
            self.live.setdefault(block, []).append(Event(base + place, sizes[size], stream))
        return Phase(name, tuple(events))  # type: ignore[arg-type]

    def freed(self, block: int, *, all_copies: bool) -> list[Event]:
        """The copies of earlier phases that a recorded free of `block` frees here.

        A micro-batch frees what the one before it left in that place, the oldest first. The optimizer step frees every
        copy. A block that isn't there (it was there before the recording began) frees nothing, on the safe side.
        """
        substitute = self.program.successors.get(block, self.predecessors.get(block, block))
        copies = self.live.get(block) or self.live.get(substitute, [])
        if all_copies:
            freed, copies[:] = list(copies), []
            return freed
        return [copies.pop(0)] if copies else []
