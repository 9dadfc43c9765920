"""Turn a verified window into a recording to learn from.

The verified window is the first one of a restarted training, with two or three micro-batches. Recordings have two
micro-batches and existing optimizer state, so the difference is removed. If cuBLAS kept its workspaces, recordings show
where it would have allocated and released them. No torch here.
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

CLOSE_SIZE_RATIO = 0.75  # between two close sizes a stepping size looks constant


def verified_recording(seen: Recording, split: Split, known: Sequence[Recording]) -> Recording | None:
    """Convert a verified window into a recording of two micro-batches.

    Args:
        seen: The window's recording.
        split: Samples in its micro-batches.
        known: The earlier recordings.

    Returns:
        A window of two micro-batches; None if it has one, if sizes differ, if the size is recorded already, or if its
        optimizer step differs from the recordings' (a GradScaler may have skipped it).
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
    """Rewrite a window as if cuBLAS released its workspaces after each phase.

    Args:
        seen: A window whose first micro-batch allocated workspaces that nothing freed.
        like: A recording of the same model with released workspaces, which gives their places.

    Returns:
        The rewritten window; None if the two differ in more than workspaces.
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
    """Yield the first micro-batch's blocks that are workspaces: unfreed, of workspace sizes."""
    freed = {event.block for phase in seen.phases for event in phase.events if event.bytes <= 0}
    sizes = Counter(event.bytes for event in like.events if event.bytes > 0 and event.block in workspaces)
    for event in seen.phases[0].events:
        if event.block not in freed and sizes[event.bytes] > 0:
            sizes[event.bytes] -= 1
            yield event.block


def distinct_recordings(known: Sequence[Recording], n: int) -> list[Recording]:
    """Return the recordings far enough from size n to be informative."""
    found = [
        recording for recording in known if recording.micro_batch <= CLOSE_SIZE_RATIO * n or recording.micro_batch > n
    ]
    return found if len(found) > 1 else list(known)


def without_state(first_step: Recording) -> Recording:
    """Remove from the first window the blocks that become optimizer state."""
    steps = [phase for phase in first_step.phases if phase.name == OPTIMIZER]
    made = {event.block for phase in steps for event in kept_blocks(phase.events)}
    phases = tuple(
        Phase(phase.name, tuple(event for event in phase.events if event.block not in made))
        for phase in first_step.phases
    )
    return replace(first_step, phases=phases)


def _without_last_later(phases: Sequence[Phase]) -> list[Phase] | None:
    """Drop the last later micro-batch; what it left behind is renamed.

    None if the two differ.
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
    """Return whether two optimizer steps allocate alike, up to small blocks.

    The very first step may differ in a few scalars; a skipped step allocates nothing.
    """
    made = [
        Counter(
            event.bytes for phase in each.phases if phase.name == OPTIMIZER for event in phase.events if event.bytes > 0
        )
        for each in (one, other)
    ]
    differing = (made[0] - made[1]) + (made[1] - made[0])
    return sum(size * count for size, count in differing.items()) < SMALL_SEGMENT_BYTES
