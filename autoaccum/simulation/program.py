"""Lift recordings into a step program: allocations as functions of the micro-batch.

Windows are recorded at *prime* micro-batches, so that sizes alone show how they scale (scaling.py). Events need not be
paired: the recording nearest the answer *is* the program, and only its sizes are rewritten. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from ..phases import BETWEEN, FIRST, LATER, OPTIMIZER
from .recording import Event, Phase, Recording
from .scaling import Rule, proportional, reduction_buffers, saturating, size_rules

MAX_EXPLICIT_MICRO_BATCHES = 16  # of a run of equal micro-batches that each leave blocks behind

MAX_GROWTH_BLOCKS = 64  # merged blocks in place of what the other micro-batches leave behind


class Step(NamedTuple):
    """Hold an event whose size is a rule; None for a free."""

    block: int
    rule: Rule | None
    stream: int


@dataclass(frozen=True)
class StepProgram:
    """Hold a window whose sizes follow the micro-batch.

    Attributes:
        recorded_at: The micro-batch of the recording that is the program.
        first_step_events: The first optimizer step as recorded; it allocates the optimizer's state.
        phases: By name: first and later micro-batch, optimizer step, and the code between windows.
        successors: Blocks that outlive the first micro-batch and are freed in the next, each with the block of the
            later micro-batch that takes its place, so that a window can have any number of later micro-batches.
        later_growth_bytes: Net bytes that a later micro-batch leaves behind.
        workspaces: Blocks that are cuBLAS's workspaces, released at the end of each phase.
        leftover: Blocks of the window before that the first micro-batch frees (a module that keeps its last
            activation); they exist when a window starts.
    """

    recorded_at: int
    first_step_events: tuple[Event, ...]
    phases: Mapping[str, tuple[Step, ...]]
    successors: Mapping[int, int]
    later_growth_bytes: int = 0
    leftover: tuple[Step, ...] = ()
    workspaces: frozenset[int] = frozenset()

    @cached_property
    def compiled_phases(self) -> Mapping[str, CompiledPhase]:
        """The phases, compiled for generating events."""
        return {name: compile_phase(steps) for name, steps in self.phases.items()}


def lift(
    recordings: Sequence[Recording], first_step_events: tuple[Event, ...] = (), least: int | None = None
) -> StepProgram:
    """Make a step program from recordings at different primes.

    Args:
        recordings: At least two, each of a window of two micro-batches and its optimizer step. The largest is the
            program, the next largest determines its rules, and smaller ones confirm them.
        first_step_events: The events of the first optimizer step.
        least: The program is the smallest recording of at least so many samples, where that is given.
    """
    ordered = sorted(recordings, key=lambda recording: recording.micro_batch)
    base = ordered[-1] if least is None else next(each for each in ordered if each.micro_batch >= least)
    at = ordered.index(base)
    rest = (*reversed(ordered[:at]), *ordered[at + 1 :])
    smaller = [(each.micro_batch, {phase.name: phase for phase in each.phases}) for each in rest]
    phases = {}
    for phase in base.phases:
        others = [(m, theirs.get(phase.name, phase)) for m, theirs in smaller]
        phases[phase.name] = lift_phase(phase, base.micro_batch, others)
    rules = size_rules(_leftover(base), base.micro_batch, _leftover(rest[0]), rest[0].micro_batch)
    return _program(base, first_step_events, phases, rules)


def as_recorded(recording: Recording, first_step_events: tuple[Event, ...] = ()) -> StepProgram:
    """Make the program of a single recording, valid for its micro-batch only."""
    phases = {
        phase.name: tuple(
            Step(e.block, Rule(e.bytes) if e.bytes > 0 else None, e.stream) for e in phase.events if e.bytes
        )
        for phase in recording.phases
    }
    return _program(recording, first_step_events, phases, {size: Rule(size) for size in _leftover(recording)})


def _program(
    recording: Recording,
    first_step_events: tuple[Event, ...],
    phases: Mapping[str, tuple[Step, ...]],
    leftover_rules: Mapping[int, Rule],
) -> StepProgram:
    successors = _successors(phases.get(FIRST, ()), phases.get(LATER, ()), recording.micro_batch)
    growth = sum(event.bytes for phase in recording.phases if phase.name == LATER for event in phase.events)
    leftover = tuple(Step(e.block, leftover_rules[-e.bytes], e.stream) for e in _foreign(recording))
    return StepProgram(
        recording.micro_batch, first_step_events, phases, successors, growth, leftover, recording.workspaces
    )


def _foreign(recording: Recording) -> list[Event]:
    """Return the first micro-batch's frees of blocks that existed before."""
    return [
        event
        for phase in recording.phases
        if phase.name == FIRST
        for event in phase.events
        if event.block < 0 and event.bytes
    ]


def _leftover(recording: Recording) -> list[int]:
    return [-event.bytes for event in _foreign(recording)]


def lift_phase(phase: Phase, n: int, others: Sequence[tuple[int, Phase]]) -> tuple[Step, ...]:
    """Give each allocation its rule; buffers of reductions are handled separately.

    Args:
        phase: As recorded at n samples.
        n: Its samples.
        others: The phase in smaller recordings, the largest of them first.
    """
    buffers = reduction_buffers(phase.events)
    rules: dict[bool, Mapping[int, Rule]] = {}
    for reductions in (False, True):
        sizes = _sizes(phase, reductions=reductions)
        (m, theirs), *further = ((m, _sizes(other, reductions=reductions)) for m, other in others)
        inputs = proportional(rules[False], n) if reductions else ()
        found = size_rules(sizes, n, theirs, m, further, reductions=reductions, inputs=inputs)
        found |= saturating(sizes, found, [theirs, *(each for _, each in further)], reductions=reductions)
        rules[reductions] = found
    sized = [Step(e.block, rules[e.block in buffers][e.bytes] if e.bytes > 0 else None, e.stream) for e in phase.events]
    by_place = _rules_by_place(phase, n, others)
    return tuple(
        step._replace(rule=by_place.get(index, step.rule))
        for index, (step, event) in enumerate(zip(sized, phase.events, strict=True))
        if event.bytes
    )


def _rules_by_place(phase: Phase, n: int, others: Sequence[tuple[int, Phase]]) -> dict[int, Rule]:
    """Separate sizes that are constant in one place and scale in another.

    If both occur in another recording, only the place distinguishes them; places agree if the courses do.
    """
    here = {event.bytes for event in phase.events if event.bytes > 0 and event.bytes % n == 0}
    for m, other in others:
        there = {event.bytes for event in other.events if event.bytes > 0}
        double = {size for size in here if size in there and size // n * m in there}
        if double and course(phase.events) == course(other.events):
            found = {}
            for index, (event, beside) in enumerate(zip(phase.events, other.events, strict=True)):
                if event.bytes in double and beside.bytes == event.bytes:
                    found[index] = Rule(event.bytes)
                elif event.bytes in double and beside.bytes == event.bytes // n * m:
                    found[index] = Rule(0, per_sample=event.bytes, divisor=n)
            return found
    return {}


def course(events: Sequence[Event]) -> list[int]:
    """Return what happens, without sizes: 0 for an allocation, a free's distance."""
    made: dict[int, int] = {}
    course = []
    for index, event in enumerate(events):
        if event.bytes > 0:
            made[event.block] = index
        course.append(0 if event.bytes > 0 else index - made[event.block] if event.block in made else -1)
    return course


def _sizes(phase: Phase, *, reductions: bool) -> list[int]:
    buffers = reduction_buffers(phase.events)
    return [event.bytes for event in phase.events if event.bytes > 0 and (event.block in buffers) == reductions]


def _successors(first: Sequence[Step], later: Sequence[Step], n: int) -> dict[int, int]:
    """Pair blocks the first micro-batch left behind with those that replace them.

    Matched by size at n, the recorded micro-batch. If both left a size behind equally often, the i-th matches the
    i-th; otherwise only freed blocks count: a growing list may hold blocks of the same size, which replace nothing.
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


def permanent_allocations(program: StepProgram) -> list[Step]:
    """Return what a window's first micro-batch alone allocates and nothing frees."""
    freed = {step.block for phase in program.phases.values() for step in phase if step.rule is None}
    kept = {
        name: [step for step in program.phases.get(name, ()) if step.rule is not None and step.block not in freed]
        for name in (FIRST, LATER)
    }
    growing = Counter(step.rule for step in kept[LATER])
    found = []
    for step in kept[FIRST]:
        if growing[step.rule]:
            growing[step.rule] -= 1
        else:
            found.append(step)
    return found


def left_behind(steps: Sequence[Step], n: int) -> dict[int, list[int]]:
    """Return the blocks that a phase allocates and doesn't free, by size."""
    freed = {step.block for step in steps if step.rule is None}
    left: dict[int, list[int]] = {}
    for step in steps:
        if step.rule is not None and step.block not in freed:
            left.setdefault(step.rule.at(n), []).append(step.block)
    return left


def window(program: StepProgram, split: Sequence[int]) -> list[Phase]:
    """Generate the events of one window.

    Args:
        program: The step program.
        split: Samples in each micro-batch, in order.

    Returns:
        Its phases: the first micro-batch, each later one, the optimizer step, and what runs between windows.
    """
    return [Phase(phase.name, tuple(map(Event._make, phase.events))) for phase in plain_window(program, split)]


def plain_window(program: StepProgram, split: Sequence[int]) -> list[Phase]:
    """Generate one window with events as plain tuples, four times as fast."""
    writer = EventGenerator(program)
    left = writer.leftover(split[-1])
    first = writer.phase(FIRST, split[0])
    phases = [Phase(FIRST, left + first.events) if left else first]
    for size, run in groupby(split[1:]):
        phases += writer.later(size, len(list(run)))
    phases += [writer.phase(name, split[-1]) for name in (OPTIMIZER, BETWEEN) if name in program.phases]
    return phases


def window_growth(program: StepProgram, split: Sequence[int], *, workspaces: bool = False) -> int:
    """Return the bytes a window leaves behind, net; 0 in steady state.

    Args:
        program: The step program.
        split: Samples in each micro-batch.
        workspaces: Whether each recording's first micro-batch allocates the libraries' workspaces anew (on CUDA),
            which isn't growth.
    """
    made = sum(event[1] for phase in plain_window(program, split) for event in phase.events)
    one_time = permanent_allocations(program) if workspaces else []
    replaced = [step.rule.at(split[-1]) for step in program.leftover if step.rule is not None]
    return made - sum(replaced) - sum(step.rule.at(split[0]) for step in one_time if step.rule is not None)


class CompiledPhase(NamedTuple):
    """Hold a phase ready for generating events at any size.

    Attributes:
        rules: The distinct rules of its allocations.
        parts: Its events in order, each part ending with a block of an earlier phase that is freed (None at the end).
            An event is the place of its block among the phase's, the index of its size, and its stream; the sizes of
            allocations come first, then the same ones negative, for frees.
        kept: Blocks that the phase leaves: the recorded block, its place, the index of its size, its stream.
        blocks: Number of its allocations.
    """

    rules: tuple[Rule, ...]
    parts: tuple[tuple[tuple[tuple[int, int, int], ...], int | None], ...]
    kept: tuple[tuple[int, int, int, int], ...]
    blocks: int


def compile_phase(steps: Sequence[Step]) -> CompiledPhase:
    """Prepare a phase for generating events at any size."""
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
    return CompiledPhase(tuple(rules), (*parts, (tuple(events), None)), kept, blocks)


class EventGenerator:
    """Generate phases in order, tracking which copy of a block is alive."""

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.predecessors = {after: before for before, after in program.successors.items()}
        self.live: dict[int, list[Event]] = {}  # recorded block -> what earlier phases left of it, oldest first
        self.names = max((event.block for event in program.first_step_events), default=0)

    def leftover(self, n: int) -> tuple[Event, ...]:
        """Return the previous window's blocks, for a last micro-batch of n samples."""
        events = []
        for block, rule, stream in self.program.leftover:
            assert rule is not None
            self.names += 1
            events.append(Event(self.names, rule.at(n), stream))
            self.live[block] = [events[-1]]
        return tuple(events)

    def phase(self, name: str, n: int) -> Phase:
        """Return the events of the next phase at n samples."""
        return self.written(name, self.program.compiled_phases[name], n)

    def later(self, n: int, count: int) -> Iterator[Phase]:
        """Yield that many later micro-batches of n samples.

        If each leaves blocks behind for the rest of the window, the middle of a long run is reduced to those blocks:
        its other allocations repeat those of the neighbours.
        """
        growing = self.growing if count > MAX_EXPLICIT_MICRO_BATCHES and self.program.later_growth_bytes > 0 else ()
        for _ in range(MAX_EXPLICIT_MICRO_BATCHES - 1 if growing else count):
            yield self.phase(LATER, n)
        if growing:
            yield Phase(LATER, tuple(self._grown(n, count - MAX_EXPLICIT_MICRO_BATCHES)))
            yield self.phase(LATER, n)

    def _grown(self, n: int, count: int) -> Iterator[Event]:
        """Yield the blocks that many micro-batches leave behind, merged into few."""
        blocks = min(count, MAX_GROWTH_BLOCKS)
        for index in range(blocks):
            together = count // blocks + (index < count % blocks)
            for block, rule, stream in self.growing:
                self.names += 1
                event = Event(self.names, together * rule.at(n), stream)
                self.live.setdefault(block, []).append(event)
                yield event

    @cached_property
    def growing(self) -> tuple[tuple[int, Rule, int], ...]:
        """The blocks a later micro-batch leaves and the next doesn't free."""
        steps = self.program.phases.get(LATER, ())
        freed = {step.block for step in steps if step.rule is None} | set(self.program.successors.values())
        return tuple((s.block, s.rule, s.stream) for s in steps if s.rule is not None and s.block not in freed)

    def written(self, name: str, compiled: CompiledPhase, n: int) -> Phase:
        """Return a compiled phase's events at n samples, as plain tuples."""
        base = self.names
        sizes = [rule.at(n) for rule in compiled.rules]
        sizes += [-size for size in sizes]
        events: list[tuple[int, int, int]] = []
        for part, freed in compiled.parts:
            events += [(base + place, sizes[size], stream) for place, size, stream in part]
            if freed is not None:
                copies = self.freed(freed, all_copies=name not in (FIRST, LATER))
                events += [(block, -size, stream) for block, size, stream in copies]
        self.names = base + compiled.blocks
        for block, place, size, stream in compiled.kept:
            self.live.setdefault(block, []).append(Event(base + place, sizes[size], stream))
        return Phase(name, tuple(events))  # type: ignore[arg-type]

    def freed(self, block: int, *, all_copies: bool) -> list[Event]:
        """Return the earlier copies that a recorded free of `block` frees here.

        A micro-batch frees what the one before it left in that place, the oldest first. The optimizer step frees every
        copy. A block from before the recording frees nothing, on the safe side.
        """
        substitute = self.program.successors.get(block, self.predecessors.get(block, block))
        copies = self.live.get(block) or self.live.get(substitute, [])
        if all_copies:
            freed, copies[:] = list(copies), []
            return freed
        return [copies.pop(0)] if copies else []
