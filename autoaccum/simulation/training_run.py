"""Replay a training run until its windows repeat.

A caching allocator has memory: what a window finds depends on those before it. So windows are replayed in order from
the build on, until one leaves the allocator as it found it, or a few have passed. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ..phases import BETWEEN, BUILD, FIRST, LATER, OPTIMIZER
from .cuda_allocator.allocator import EMPTY, AllocatorState, CachingAllocator, CudaRules
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
        fatal_micro_batches: How many micro-batches of the very first window it took to run out of memory, so that each
            window that begins with them does; 0 where it ran out elsewhere, or not.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    phases: Mapping[str, int]
    retries: tuple[int, ...]
    out_of_memory: str | None = None
    fatal_micro_batches: int = 0

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
) -> TrainingReplay:
    """Train window after window of one split on an allocator model.

    Args:
        training: The training run; its build is skipped if the start holds the model.
        split: Samples in each micro-batch of a window.
        rules: The allocator and its capacity.
        start: The allocator's state before.
        windows: The most windows to replay.
        stops_at_retry: Whether to stop at the first retry.
    """
    allocator = CachingAllocator(rules, start)
    run = _Run(allocator, _Writer(training))
    if training.build and start == EMPTY:
        run.phase(Phase(BUILD, training.build))
    before = None
    for index in range(windows if run.out_of_memory is None else 0):  # the model alone may not fit
        run.window(split, first=index == 0)
        after = run.state() if run.out_of_memory is None else None
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
        run.fatal_micro_batches,
    )


class _Run:
    """Run phases on an allocator and accumulate their results."""

    def __init__(self, allocator: CachingAllocator, writer: _Writer) -> None:
        self.allocator, self.writer = allocator, writer
        self.phases: dict[str, int] = {}
        self.retries: list[int] = []
        self.peak_allocated_bytes = 0
        self.out_of_memory: str | None = None
        self.fatal_micro_batches = 0
        self._done = 0  # micro-batches of the window that are over, those that were left out included

    def phase(self, phase: Phase) -> None:
        result = self.allocator.run(phase)
        self.phases[phase.name] = max(self.phases.get(phase.name, 0), result.peak_reserved_bytes)
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, result.peak_allocated_bytes)
        if self.retries:
            self.retries[-1] += result.retries
        if result.out_of_memory:
            self.out_of_memory = phase.name

    def window(self, split: Sequence[int], *, first: bool) -> None:
        self.retries.append(0)
        self._done = 0
        for phase in self._phases(split, first):
            self.phase(phase)
            if self.out_of_memory is not None:
                merges = self.writer.program.later_growth_bytes > 0  # what is left behind, by how many there are
                if first and phase.name in (FIRST, LATER) and not merges:
                    self.fatal_micro_batches = self._done + 1
                return
            self._done += 1

    def state(self) -> object:
        """Return a key, equal for moments from which the run continues alike."""
        live = [(role, event) for role, copies in sorted(self.writer.live.items()) for event in copies]
        roles = tuple((role, event.bytes, event.stream) for role, event in live)
        return roles, self.allocator.state_key(event.block for _, event in live)

    def _phases(self, split: Sequence[int], first: bool) -> Iterator[Phase]:
        writer = self.writer
        yield writer.first_of_all(split[0]) if first else writer.first(split[0], split[-1])
        for size, run in groupby(split[1:]):
            count = len(list(run))
            yield from self._alike(size, count) if writer.program.later_growth_bytes <= 0 else writer.later(size, count)
        yield writer.first_optimizer_step() if first else writer.phase(OPTIMIZER, split[-1])
        if BETWEEN in writer.program.phases:
            yield writer.phase(BETWEEN, split[-1])

    def _alike(self, size: int, count: int) -> Iterator[Phase]:
        """Yield later micro-batches of one size, leaving out whole cycles of states.

        Equal micro-batches on equal states do equal things, so once a state returns, what follows is known: the same
        peaks, and as many retries in each cycle. One earlier state is compared with, taken anew at powers of two, which
        finds cycles of any length (Brent, "An improved Monte Carlo factorization algorithm", 1980, section 2).
        """
        known: object = None
        at, reach, retries, index = 0, 1, 0, 0
        while index < count:
            yield self.writer.phase(LATER, size)
            index += 1
            if reach == 0 or index == count:
                continue
            state = self.state()
            if state == known:
                cycles, rest = divmod(count - index, index - at)
                self.retries[-1] += cycles * (self.retries[-1] - retries)
                self._done += count - index - rest
                index, reach = count - rest, 0
            elif index - at == reach:
                known, at, reach, retries = state, index, 2 * reach, self.retries[-1]


class _Writer(EventGenerator):
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
