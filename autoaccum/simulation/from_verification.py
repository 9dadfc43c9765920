"""Use a verified window as a recording, where predictions missed it.

The window was the first of all after planning started over, of two or three micro-batches. Recordings are of windows of
two, once the optimizer has its state, so what differs is taken out. And where cuBLAS kept its workspaces in it,
recordings tell where it would have made and given back each of them. No torch here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..phases import LATER, OPTIMIZER
from .cuda_allocator.settings import SMALL_SEGMENT_BYTES
from .program import course
from .recording import Event, Phase, Recording, kept_blocks
from .solver import Split

CLOSE_SIZE_RATIO = 0.75  # of the larger one, for a smaller recording to be no close one


def verified_recording(seen: Recording, split: Split, known: Sequence[Recording]) -> Recording | None:
    """Return the window as a recording that can be lifted with others.

    Args:
        seen: What was recorded of it.
        split: Samples in its micro-batches.
        known: The recordings there are.

    Returns:
        A window of two micro-batches; None where it has but one or they aren't of one size, where that size is known,
        or where its optimizer step isn't the recordings' (a GradScaler may have skipped the first).
    """
    if len(split) < 2 or len(set(split)) > 1 or split[0] in (recording.micro_batch for recording in known):
        return None
    phases: list[Phase] | None = list(seen.phases)
    while phases is not None and sum(phase.name == LATER for phase in phases) > 1:
        phases = _without_last_later(phases)
    if phases is None:
        return None
    found = without_state(replace(seen, micro_batch=split[0], phases=tuple(phases), passes=2))
    same = not known or _is_same_step(found, known[-1])
    return found if same else None


def with_released_workspaces(seen: Recording, like: Recording) -> Recording | None:
    """Return the window with cuBLAS's workspaces released after each phase.

    Args:
        seen: A window in which they were kept: its first micro-batch made them, and nothing freed them.
        like: A recording of the same model in which they were given back: it tells the places.

    Returns:
        The window with them put in; None where the two don't do the same, workspaces apart.
    """
    there = {phase.name: phase for phase in like.phases}
    if [phase.name for phase in seen.phases] != list(there):
        return None
    kept = set(_kept_workspaces(seen, there[seen.phases[0].name], like.workspaces))
    names = itertools.count(1 + max(event.block for phase in seen.phases for event in phase.events))
    phases, workspaces = [], set()
    for phase in seen.phases:
        own = [event for event in phase.events if event.block not in kept]
        theirs = there[phase.name].events
        others = [event for event in theirs if event.block not in like.workspaces]
        if course(own) != course(others):
            return None
        named = {event.block: next(names) for event in theirs if event.block in like.workspaces}
        workspaces |= set(named.values())
        rest = iter(own)
        mixed = (e._replace(block=named[e.block]) if e.block in named else next(rest) for e in theirs)
        phases.append(Phase(phase.name, tuple(mixed)))
    return replace(seen, phases=tuple(phases), workspaces=frozenset(workspaces))


def _kept_workspaces(seen: Recording, like: Phase, workspaces: frozenset[int]) -> Iterator[int]:
    """Return the first micro-batch's workspaces: never freed, of workspace sizes."""
    freed = {event.block for phase in seen.phases for event in phase.events if event.bytes <= 0}
    sizes = Counter(event.bytes for event in like.events if event.bytes > 0 and event.block in workspaces)
    for event in seen.phases[0].events:
        if event.block not in freed and sizes[event.bytes] > 0:
            sizes[event.bytes] -= 1
            yield event.block


def distinct_recordings(known: Sequence[Recording], n: int) -> list[Recording]:
    """Return recordings that add information to one at n samples.

    In two that are close, sizes that step look constant.
    """
    found = [
        recording for recording in known if recording.micro_batch <= CLOSE_SIZE_RATIO * n or recording.micro_batch > n
    ]
    return found if len(found) > 1 else list(known)


def without_state(first_step: Recording) -> Recording:
    """Return a first window as if the optimizer had state."""
    steps = [phase for phase in first_step.phases if phase.name == OPTIMIZER]
    made = {event.block for phase in steps for event in kept_blocks(phase.events)}
    phases = tuple(
        Phase(phase.name, tuple(event for event in phase.events if event.block not in made))
        for phase in first_step.phases
    )
    return replace(first_step, phases=phases)


def _without_last_later(phases: Sequence[Phase]) -> list[Phase] | None:
    """Return one later micro-batch fewer.

    What it left behind replaces what the one before it left.

    None where the two didn't do the same.
    """
    last = max(index for index, phase in enumerate(phases) if phase.name == LATER)
    before, dropped = phases[last - 1].events, phases[last].events
    if [event.bytes for event in before] != [event.bytes for event in dropped]:
        return None
    twins = {theirs.block: ours.block for ours, theirs in zip(before, dropped, strict=True) if theirs.bytes > 0}
    return [
        phase if index < last else Phase(phase.name, _renamed(phase.events, twins))
        for index, phase in enumerate(phases)
        if index != last
    ]


def _renamed(events: Sequence[Event], names: dict[int, int]) -> tuple[Event, ...]:
    return tuple(event._replace(block=names.get(event.block, event.block)) for event in events)


def _is_same_step(one: Recording, other: Recording) -> bool:
    """Whether two optimizer steps allocate the same large blocks.

    And small ones that would share a segment.

    The very first one may differ in a few scalars; one that was skipped makes nothing.
    """
    made = [
        Counter(
            event.bytes for phase in each.phases if phase.name == OPTIMIZER for event in phase.events if event.bytes > 0
        )
        for each in (one, other)
    ]
    differing = (made[0] - made[1]) + (made[1] - made[0])
    return sum(size * count for size, count in differing.items()) < SMALL_SEGMENT_BYTES
