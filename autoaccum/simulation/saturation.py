"""Handle sizes that grow in steps up to an unknown maximum.

A device runs a limited number of thread blocks at once, so such sizes have a maximum, unknown beyond the last
recording. A higher maximum isn't always the safe assumption: smaller blocks leave other gaps. So what must be certain
is checked for every possible maximum. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from .program import Step, StepProgram
from .recording import Recording
from .scaling import Rule

MIN_LARGE_BLOCK_BYTES = 1 << 20  # smaller blocks share segments of 2 MiB (CUDACachingAllocator.cpp: kSmallSize)


def may_saturate(program: StepProgram) -> bool:
    """Return whether large blocks step with the size and may saturate."""
    return any(_is_open(rule, program.recorded_at) for rule in _rules(program))


def predicts_large_blocks(program: StepProgram, recording: Recording) -> bool:
    """Return whether a program has every large block of a recording."""
    return all(
        Counter(size for event in phase.events if (size := event.bytes) > MIN_LARGE_BLOCK_BYTES)
        == Counter(
            size
            for each in program.phases.get(phase.name, ())
            if each.rule and (size := each.rule.at(recording.micro_batch)) > MIN_LARGE_BLOCK_BYTES
        )
        for phase in recording.phases
    )


def steps_until(program: StepProgram, n: int) -> int:
    """Return the most steps of any large block up to n samples."""
    at = program.recorded_at
    return max(((rule.at(n) - rule.at(at)) // _step(rule) for rule in _rules(program) if _is_open(rule, at)), default=0)


def saturated_after(program: StepProgram, steps: int) -> StepProgram:
    """Return the program whose large blocks saturate after that many more steps."""
    at = program.recorded_at

    def limit(step: Step) -> Step:
        if step.rule is None or not _is_open(step.rule, at):
            return step
        return step._replace(rule=step.rule._replace(max_bytes=step.rule.at(at) + steps * _step(step.rule)))

    return replace(program, phases={name: tuple(map(limit, phase)) for name, phase in program.phases.items()})


def grown_on(program: StepProgram, *, ended: bool) -> StepProgram | None:
    """Return the program whose uncertain blocks grow with the batch.

    A block that stood still between two recordings is constant. One that was seen at the largest alone may grow on.

    Args:
        program: The program.
        ended: Whether those grow, too, that other blocks show to have saturated.

    Returns:
        None where there are no such blocks.
    """
    at, found = program.recorded_at, False

    def grown(step: Step) -> Step:
        nonlocal found
        rule = step.rule
        if rule is None or rule.at(at) <= MIN_LARGE_BLOCK_BYTES:
            return step
        if not (rule.is_guess or (ended and rule.at(at) == rule.max_bytes)):
            return step
        found = True
        return step._replace(rule=Rule(0, per_sample=rule.at(at), divisor=at))

    phases = {name: tuple(map(grown, phase)) for name, phase in program.phases.items()}
    return replace(program, phases=phases) if found else None


def _rules(program: StepProgram) -> Iterator[Rule]:
    return (step.rule for phase in program.phases.values() for step in phase if step.rule is not None)


def _is_open(rule: Rule, n: int) -> bool:
    return rule.may_saturate and rule.at(n) > MIN_LARGE_BLOCK_BYTES


def _step(rule: Rule) -> int:
    """Return the bytes that one step adds."""
    return rule.unit_bytes if rule.unit_bytes > 1 else max(1, rule.per_sample // rule.divisor)
