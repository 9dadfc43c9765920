"""Attribute the bytes alive at each phase's peak to categories.

A recording has blocks, not tensors, so each is classified by when it is born and when it dies. That works without the
model and for a program of any device. No torch here.

    workspaces       cuBLAS's, released at the end of a phase; or born in the first micro-batch, never freed, and not
                     repeated by later ones: a library's, which each CUDA recording shows anew; present from the start
    optimizer state  left behind by the first optimizer step, before the window, workspaces excluded
    gradients        born in the first micro-batch, freed by the optimizer step
    data             the first blocks of a micro-batch, where they outlive it or have the sizes of its samples' tensors
    activations      born before the turn from forward to backward and freed after it; or left behind by a micro-batch
                     for the next one (a module's last output)
    temporaries      everything else that is alive for part of a phase

The turn is where backward begins. `loss.backward()` first allocates the gradient of the loss, a scalar, and soon after
the first parameter's gradient; so the turn is the last block of a scalar's size before the first gradient. A later
micro-batch has its turn at the same allocation, counted from its start: up to there it does the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..phases import FIRST, LATER, OPTIMIZER
from .program import Step, StepProgram, permanent_allocations, window
from .recording import Phase, kept_blocks
from .solver import Split

PROCESS, PARAMETERS, WORKSPACES, STATE, GRADIENTS, ACTIVATIONS, TEMPORARIES, DATA, CACHED = CATEGORIES = (
    "process",
    "parameters",
    "workspaces",
    "optimizer state",
    "gradients",
    "activations",
    "temporaries",
    "data",
    "cached",
)
SCALAR_BYTES = 8  # the loss, in the widest type
_Place = tuple[int, int]  # index of the phase, index of the event in it


def composition(program: StepProgram, split: Split, *, inputs: Sequence[int] = ()) -> dict[str, dict[str, int]]:
    """Return the bytes alive at each phase's peak, by category.

    Args:
        program: The step program.
        split: Samples in each micro-batch of the window.
        inputs: Bytes per sample of the tensors that each micro-batch first moves to the device; empty if none.

    Returns:
        By phase name, requested bytes by category, zeros left out; phases of one name share their highest instant. The
        sum is the peak of live bytes in that phase.
    """
    workspaces = permanent_allocations(program)
    names = {step.block for step in workspaces}
    steady = tuple(step for step in program.phases[FIRST] if step.block not in names)
    program = replace(program, phases={**program.phases, FIRST: steady})
    phases = window(program, split)
    kinds = _kinds(program, phases, split, inputs)
    now = dict.fromkeys(CATEGORIES, 0)
    now[WORKSPACES] = sum(step.rule.at(split[0]) for step in workspaces if step.rule is not None)
    now[STATE] = _state_bytes(program, workspaces)
    live = now[WORKSPACES] + now[STATE]
    highest: dict[str, int] = {}
    found: dict[str, dict[str, int]] = {}
    for phase in phases:
        if live > highest.get(phase.name, -1):
            highest[phase.name], found[phase.name] = live, dict(now)
        for block, size, _ in phase.events:
            now[kinds[block]] += size
            live += size
            if live > highest[phase.name]:
                highest[phase.name], found[phase.name] = live, dict(now)
    return {name: {kind: size for kind, size in parts.items() if size} for name, parts in found.items()}


def process_composition(
    parts: Mapping[str, Mapping[str, int]],
    phases: Mapping[str, int],
    *,
    baseline_bytes: int,
    parameter_bytes: int,
    input_bytes: int,
) -> dict[str, dict[str, int]]:
    """Return the same for the whole process, base and allocator overhead included.

    Args:
        parts: From `composition`.
        phases: The peak of each phase, base and data included.
        baseline_bytes: What the process takes before it trains, its parameters included.
        parameter_bytes: Parameters and buffers.
        input_bytes: The window's samples, where they are held outside of the recording.

    Returns:
        By phase's name, bytes by category in the order of `CATEGORIES`; they sum to the phase's peak.
    """
    found = {}
    for name, peak in phases.items():
        held = dict.fromkeys(CATEGORIES, 0) | dict(parts.get(name, {}))
        held[PARAMETERS] = min(parameter_bytes, baseline_bytes)
        held[PROCESS] = baseline_bytes - held[PARAMETERS]
        held[DATA] += input_bytes
        held[CACHED] = peak - sum(held.values())
        found[name] = {kind: held[kind] for kind in CATEGORIES if held[kind]}
    return found


def _state_bytes(program: StepProgram, workspaces: Sequence[Step]) -> int:
    """Return the bytes the first window leaves behind, program workspaces excluded."""
    known = Counter(step.rule.at(program.recorded_at) for step in workspaces if step.rule is not None)
    kept = Counter(event.bytes for event in kept_blocks(program.first_step_events))
    return sum(size * times for size, times in (kept - known).items())


def _kinds(program: StepProgram, phases: Sequence[Phase], split: Split, inputs: Sequence[int]) -> dict[int, str]:
    """Return the category of every block of a window."""
    births, deaths = _lives(phases)
    held = set(_held_inputs(phases, deaths, len(program.leftover)))
    gradients = {
        block
        for block, (phase, _) in births.items()
        if phases[phase].name == FIRST and block in deaths and phases[deaths[block][0]].name == OPTIMIZER
    } - held
    turns = _turns(phases, gradients, len(program.leftover))
    kinds = {}
    for block, born in births.items():
        dies = deaths.get(block)
        if block in gradients:
            kinds[block] = GRADIENTS
        elif phases[born[0]].name not in (FIRST, LATER):
            kinds[block] = TEMPORARIES
        elif dies is None or dies[0] != born[0]:
            kinds[block] = ACTIVATIONS  # left behind for the next micro-batch
        else:
            kinds[block] = ACTIVATIONS if born[1] < turns[born[0]] <= dies[1] else TEMPORARIES
    kinds.update(dict.fromkeys(_workspaces(program, phases), WORKSPACES))
    kinds.update(dict.fromkeys(held, DATA))
    kinds.update(dict.fromkeys(_data_blocks(phases, split, inputs, len(program.leftover)), DATA))
    return kinds


def _held_inputs(phases: Sequence[Phase], deaths: Mapping[int, _Place], leftover: int) -> Iterator[int]:
    """Yield the first blocks of micro-batches that outlive their phase.

    These are token ids, labels and masks, which are held until the next ones are copied or the step is done.
    """
    for index, phase in enumerate(phases):
        is_merged = all(event.bytes > 0 for event in phase.events)  # of many micro-batches, what they leave behind
        if phase.name not in (FIRST, LATER) or is_merged:
            continue
        made = [event.block for event in phase.events if event.bytes > 0]
        for block in made[leftover if phase.name == FIRST else 0 :]:
            if block not in deaths or deaths[block][0] == index:
                break
            yield block


def _workspaces(program: StepProgram, phases: Sequence[Phase]) -> Iterator[int]:
    """Yield the blocks that are cuBLAS's workspaces, by their place among allocations."""
    for phase in phases if program.workspaces else ():
        steps = [step for step in program.phases[phase.name] if step.rule is not None]
        made = [event.block for event in phase.events if event.bytes > 0]
        made = made[len(made) - len(steps) :]  # without the leftover blocks
        yield from (block for step, block in zip(steps, made, strict=True) if step.block in program.workspaces)


def _lives(phases: Sequence[Phase]) -> tuple[dict[int, _Place], dict[int, _Place]]:
    """Return where each block is born, and where it dies."""
    births: dict[int, _Place] = {}
    deaths: dict[int, _Place] = {}
    for phase, each in enumerate(phases):
        for index, event in enumerate(each.events):
            (births if event.bytes > 0 else deaths)[event.block] = (phase, index)
    return births, deaths


def _turns(phases: Sequence[Phase], gradients: set[int], leftover: int) -> list[int]:
    """Return for each phase the index where backward begins, or 0."""
    first = phases[0].events
    allocations = [(index, event) for index, event in enumerate(first) if event.bytes > 0][leftover:]
    turn = 0  # number of the allocation within a micro-batch
    for count, (_, event) in enumerate(allocations):
        if event.bytes <= SCALAR_BYTES:
            turn = count
        elif event.block in gradients:
            turn = turn or count
            break
    else:
        return [0] * len(phases)
    return [_allocation(phase, turn + (leftover if index == 0 else 0)) for index, phase in enumerate(phases)]


def _allocation(phase: Phase, number: int) -> int:
    """Return the event index of a phase's n-th allocation, or 0."""
    indices = [index for index, event in enumerate(phase.events) if event.bytes > 0]
    return indices[number] if number < len(indices) else 0


def _data_blocks(phases: Sequence[Phase], split: Split, inputs: Sequence[int], leftover: int) -> list[int]:
    """Return each micro-batch's leading blocks whose sizes match its tensors.

    Not by the micro-batch's place in the split: of a long run of equal ones that leave blocks behind, the middle is one
    phase.
    """
    found = []
    for phase in (phase for phase in phases if phase.name in (FIRST, LATER)):
        made = [event for event in phase.events if event.bytes > 0][leftover if phase.name == FIRST else 0 :]
        n = next((n for n in set(split) if made and inputs and made[0].bytes == inputs[0] * n), None)
        for event, sample_bytes in zip(made, inputs, strict=False):
            if n is None or event.bytes != sample_bytes * n:
                break
            found.append(event.block)
    return found
