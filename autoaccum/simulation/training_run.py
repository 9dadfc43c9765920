"""Replay a training run until its windows repeat.

A caching allocator has memory: what a window finds depends on those before it. So windows are replayed in order from
the build on, until one leaves the allocator as it found it, or a few have passed. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ..phases import BETWEEN, BUILD, FIRST, LATER, OPTIMIZER
from .cuda_allocator.allocator import EMPTY, AllocatorState, CachingAllocator, CudaRules, PhaseResult
from .cuda_allocator.transitions import Outcome, Transitions
from .program import CompiledPhase, EventGenerator, Step, StepProgram, compile_phase, left_behind, permanent_allocations
from .recording import Event, Phase, Recording

MAX_WINDOWS = 6  # if windows don't repeat by then, the last two represent those to come


@dataclass(frozen=True)
class OneTimeAllocation:
    """Hold a block that the very first micro-batch makes and nothing frees.

    Attributes:
        after: Number of other allocations of that micro-batch before it.
        bytes: Its size.
        stream: Its stream.
    """

    after: int
    bytes: int
    stream: int


@dataclass(frozen=True)
class Training:
    """Hold a step program, and what happens once before windows repeat.

    Attributes:
        program: The step program, without its first micro-batch's permanent blocks: libraries' workspaces, which each
            recording shows anew since they are cleared before it.
        first: The very first micro-batch, workspaces included.
        one_time: Its other permanent blocks, as the very first window showed.
        build: The model's blocks in the order of their allocation.
        optimizer: The first optimizer step as recorded, which allocates the optimizer's state.
        gradients: The first micro-batch's blocks that this step frees: its name of each, and the program's.
        state_bytes: Bytes that stay from the first window on, beside the model.
    """

    program: StepProgram
    first: CompiledPhase
    one_time: tuple[OneTimeAllocation, ...]
    build: tuple[Event, ...]
    optimizer: tuple[Event, ...]
    gradients: Mapping[int, int]
    state_bytes: int


@dataclass(frozen=True)
class TrainingReplay:
    """Hold the peaks and retries of a replayed training run.

    Attributes:
        peak_reserved_bytes: Peak of reserved bytes.
        peak_allocated_bytes: Peak of allocated bytes.
        phases: Peak of reserved bytes by phase name, over all windows.
        retries: Number of cache flushes to make room, by window.
        out_of_memory: The phase in which memory ran out; None if it did not.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    phases: Mapping[str, int]
    retries: tuple[int, ...]
    out_of_memory: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it never ran out of memory, nor retried once windows repeat."""
        return self.out_of_memory is None and not any(self.retries[2:])


def training_of(program: StepProgram, first_step: Recording, build: tuple[Event, ...]) -> Training:
    """Combine recordings into a training run.

    Args:
        program: The step program.
        first_step: The very first window, of small micro-batches.
        build: The model's blocks in the order in which a new process allocates them.
    """
    events = {phase.name: phase.events for phase in first_step.phases}
    freed = {event.block for phase in first_step.phases for event in phase.events if event.bytes <= 0}
    workspaces = permanent_allocations(program)
    one_time = _made_once(events[FIRST], freed, program, workspaces, first_step.micro_batch)
    optimizer = events[OPTIMIZER]
    state = [event.bytes for event in optimizer if event.bytes > 0 and event.block not in freed]
    state += [block.bytes for block in one_time]
    state += [step.rule.at(1) for step in workspaces if step.rule is not None]
    names = {step.block for step in workspaces}
    steady = tuple(step for step in program.phases[FIRST] if step.block not in names)
    return Training(
        replace(program, phases={**program.phases, FIRST: steady}),
        program.compiled_phases[FIRST],
        one_time,
        build,
        optimizer,
        _gradients(events[FIRST], freed, program),
        sum(state),
    )


def with_kept_workspaces(training: Training) -> Training:
    """Return the run of a hand-written loop, in which cuBLAS keeps workspaces."""
    program = training.program
    if not program.workspaces:
        return training  # kept while recorded, if any: `first` has them, and the program hasn't
    first = (s for s in program.phases[FIRST] if s.rule is not None or s.block not in program.workspaces)
    others = {
        name: tuple(step for step in phase if step.block not in program.workspaces)
        for name, phase in program.phases.items()
    }
    return replace(training, program=replace(program, phases=others), first=compile_phase(tuple(first)))


def _made_once(
    first: Sequence[Event], freed: set[int], program: StepProgram, workspaces: Sequence[Step], n: int
) -> tuple[OneTimeAllocation, ...]:
    """Return the first micro-batch's permanent blocks beside the program's workspaces."""
    made = [event for event in first if event.bytes > 0]
    kept = [(index, event) for index, event in enumerate(made) if event.block not in freed]
    others = [event.bytes for event in made if event.block in freed]
    known = Counter(step.rule.at(program.recorded_at) for step in workspaces if step.rule is not None)
    plain = [step.rule for step in program.phases[FIRST] if step.rule is not None and step not in workspaces]
    sizes = [rule.at(n) for rule in plain]
    return tuple(
        OneTimeAllocation(_place(index - place, others, sizes), event.bytes, event.stream)
        for place, (index, event) in enumerate(kept)
        if not _taken(known, event.bytes)
    )


def _taken(counts: Counter[int], size: int) -> bool:
    """Return whether one of that size is left, and take it."""
    there = counts[size] > 0
    counts[size] -= there
    return there


def _gradients(first: Sequence[Event], freed: set[int], program: StepProgram) -> dict[int, int]:
    """Pair the blocks both first micro-batches leave to be freed, by size."""
    freed_here = {event.block for event in first if event.bytes <= 0}
    own: dict[int, list[int]] = {}
    for event in first:
        if event.bytes > 0 and event.block in freed and event.block not in freed_here:
            own.setdefault(event.bytes, []).append(event.block)
    theirs = left_behind(program.phases[FIRST], program.recorded_at)
    return {
        block: partner
        for size, blocks in own.items()
        for block, partner in zip(blocks, theirs.get(size, []), strict=False)
    }


def replay_training(
    training: Training,
    split: Sequence[int],
    rules: CudaRules,
    *,
    start: AllocatorState = EMPTY,
    windows: int = MAX_WINDOWS,
    stops_at_retry: bool = False,
    known: Transitions | None = None,
) -> TrainingReplay:
    """Train window after window of one split on an allocator model.

    Args:
        training: The training run; its build is skipped if the start holds the model.
        split: Samples in each micro-batch of a window.
        rules: The allocator and its capacity.
        start: The allocator's state before.
        windows: The most windows to replay.
        stops_at_retry: Whether to stop at the first retry.
        known: What earlier replays of the same training, rules and start found out; this one adds to it.
    """
    allocator = CachingAllocator(rules, start)
    run = _Run(allocator, TrainingWriter(training), Transitions() if known is None else known)
    if training.build and start == EMPTY:
        run.step((BUILD,), lambda: Phase(BUILD, training.build))
    before = None
    for index in range(windows if run.out_of_memory is None else 0):  # the model alone may not fit
        run.window(split, first=index == 0)
        after = run.at
        if run.out_of_memory is not None or (index >= 2 and after == before):
            break
        if run.retries[-1] and (stops_at_retry or index >= 2):  # it doesn't fit: see TrainingReplay.fits
            break
        before = after
    return TrainingReplay(
        max(run.phases.values(), default=allocator.reserved_bytes),
        run.peak_allocated_bytes,
        run.phases,
        tuple(run.retries),
        run.out_of_memory,
    )


class _Run:
    """Run phases on an allocator and accumulate their results.

    Phases whose outcome is known are left for later: they run only where another one follows that isn't.
    """

    def __init__(self, allocator: CachingAllocator, writer: TrainingWriter, known: Transitions) -> None:
        self.allocator, self.writer, self.known = allocator, writer, known
        self.phases: dict[str, int] = {}
        self.retries: list[int] = []
        self.peak_allocated_bytes = 0
        self.out_of_memory: str | None = None
        self.at = 0  # the number of the state
        self._left: list[Callable[[], Phase]] = []

    def step(self, what: tuple[object, ...], write: Callable[[], Phase], *, compares: bool = False) -> None:
        """Run a phase, or take its outcome from where it is known.

        Args:
            what: Describes the phase: equal ones do equal things in equal states.
            write: Writes its events; called in order.
            compares: Whether the state after it may be one that was there before.
        """
        found = self.known.outcomes.get((self.at, *what))
        if found is None:
            self._catch_up()
            result = self.allocator.run(write())
            looks = compares and not result.out_of_memory
            found = Outcome(result, self.known.number_of(self._key()) if looks else self.known.new())
            self.known.outcomes[self.at, *what] = found
        else:
            self._left.append(write)
        self._add(found.result)
        self.at = found.after

    def _catch_up(self) -> None:
        """Run the phases that were left."""
        for left in self._left:
            self.allocator.run(left())
        self._left.clear()

    def _add(self, result: PhaseResult) -> None:
        self.phases[result.name] = max(self.phases.get(result.name, 0), result.peak_reserved_bytes)
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, result.peak_allocated_bytes)
        if self.retries:
            self.retries[-1] += result.retries
        if result.out_of_memory:
            self.out_of_memory = result.name

    def _key(self) -> object:
        """Return a key, equal for moments from which the run continues alike."""
        live = [(role, event) for role, copies in sorted(self.writer.live.items()) for event in copies]
        roles = tuple((role, event.bytes, event.stream) for role, event in live)
        return roles, self.allocator.state_key(event.block for _, event in live)

    def window(self, split: Sequence[int], *, first: bool) -> None:
        writer, n, last = self.writer, split[0], split[-1]
        self.retries.append(0)
        steps: list[tuple[tuple[object, ...], Callable[[], Phase]]] = []
        if first:
            self.step(("very first", n), lambda: writer.first_of_all(n))
            steps.append((("first optimizer step",), writer.first_optimizer_step))
        else:
            self.step((FIRST, n, last), lambda: writer.first(n, last))
            steps.append(((OPTIMIZER, last), lambda: writer.phase(OPTIMIZER, last)))
        if BETWEEN in writer.program.phases:
            steps.append(((BETWEEN, last), lambda: writer.phase(BETWEEN, last)))
        for size, run in groupby(split[1:]):
            self._later(size, len(list(run)))
        for what, write in steps:
            if self.out_of_memory is None:
                self.step(what, write, compares=write is steps[-1][1])

    def _later(self, size: int, count: int) -> None:
        """Run later micro-batches of one size, leaving out cycles of states.

        Once a state returns, what follows is known: the same peaks, and as many retries in each cycle.
        """
        if self.writer.program.later_growth_bytes > 0:  # no state returns, and long runs are merged into few phases
            self._catch_up()  # before anything is written
            for place, phase in enumerate(self.writer.later(size, count)):
                if self.out_of_memory is None:
                    self.step((LATER, size, count, place), lambda phase=phase: phase)  # type: ignore[misc]
            return
        seen: dict[int, tuple[int, int]] = {}
        index = 0
        while index < count and self.out_of_memory is None:
            self.step((LATER, size), lambda: self.writer.phase(LATER, size), compares=True)
            index += 1
            if self.at in seen:
                at, retries = seen[self.at]
                cycles = (count - index) // (index - at)
                self.retries[-1] += cycles * (self.retries[-1] - retries)
                index += cycles * (index - at)
            seen[self.at] = index, self.retries[-1]


class TrainingWriter(EventGenerator):
    """Generate windows in order; the first includes what happens once."""

    def __init__(self, training: Training) -> None:
        super().__init__(training.program)
        self.training = training
        self.names = max([self.names, *(event.block for event in training.build)])

    def first_of_all(self, n: int) -> Phase:
        """Return the very first micro-batch, with its one-time blocks."""
        events: list[Event] = []
        waiting = list(self.training.one_time)
        made = 0
        for event in self.written(FIRST, self.training.first, n).events:
            allocates = event[1] > 0  # a plain tuple
            while allocates and waiting and made >= waiting[0].after:
                events.append(self._once(waiting.pop(0)))
            made += allocates
            events.append(event)
        return Phase(FIRST, (*events, *map(self._once, waiting)))

    def first(self, n: int, last: int) -> Phase:
        """Return the first micro-batch of a later window."""
        for block, rule, stream in self.program.leftover:
            assert rule is not None
            size = rule.at(last)
            for copies in self.live.values():
                found = next((event for event in copies if event.bytes == size and event.stream == stream), None)
                if found is not None:
                    copies.remove(found)
                    self.live[block] = [found]
                    break
        return self.phase(FIRST, n)

    def first_optimizer_step(self) -> Phase:
        """Return the recorded step that makes the state, then all frees."""
        events: list[Event] = []
        own: dict[int, Event] = {}
        for block, size, stream in self.training.optimizer:
            if size > 0:
                self.names += 1
                own[block] = Event(self.names, size, stream)
                events.append(own[block])
            elif block in own:
                events.append(_free(own.pop(block)))
            elif block in self.training.gradients:
                events += map(_free, self.freed(self.training.gradients[block], all_copies=True))
        for step in self.program.phases[OPTIMIZER]:
            if step.rule is None and step.block in self.live:
                events += map(_free, self.freed(step.block, all_copies=True))
        return Phase(OPTIMIZER, tuple(events))

    def _once(self, block: OneTimeAllocation) -> Event:
        self.names += 1
        return Event(self.names, block.bytes, block.stream)


def _place(after: int, recorded: Sequence[int], sizes: Sequence[int]) -> int:
    """Map a position in the very first micro-batch to the program.

    The same position if both start alike up to there; the same from the end if both end alike; else in proportion.
    """
    if len(recorded) == len(sizes) or tuple(sizes[:after]) == tuple(recorded[:after]):
        return after
    rest = len(recorded) - after
    if tuple(sizes[len(sizes) - rest :]) == tuple(recorded[after:]):
        return len(sizes) - rest
    return round(after * len(sizes) / len(recorded))


def _free(event: Event) -> Event:
    return Event(event.block, -event.bytes, event.stream)
