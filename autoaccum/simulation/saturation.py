"""Limit sizes that grow in steps: devices run limited thread blocks.

Only so many blocks of threads run simultaneously.

Beyond the last recording nobody knows where. Another end isn't on the safe side by being higher: smaller blocks leave
other gaps. So what has to be sure is asked of every end there may be. No torch here.
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
    """Whether large blocks step with the size, without a known end.

    Only a recording nearer the answer shows it.
    """
    return any(_is_open(rule, program.recorded_at) for rule in _rules(program))


def predicts_large_blocks(program: StepProgram, recording: Recording) -> bool:
    """Whether a program has every large block of a recording, exactly."""
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
    """Return the most steps of a large block up to n.

    From the recorded size on; 0 where none steps.
    """
    at = program.recorded_at
    return max(((rule.at(n) - rule.at(at)) // _step(rule) for rule in _rules(program) if _is_open(rule, at)), default=0)


def saturated_after(program: StepProgram, steps: int) -> StepProgram:
    """Return the program whose large blocks stop after that many steps."""
    at = program.recorded_at

    def limit(step: Step) -> Step:
        if step.rule is None or not _is_open(step.rule, at):
            return step
        return step._replace(rule=step.rule._replace(max_bytes=step.rule.at(at) + steps * _step(step.rule)))

    return replace(program, phases={name: tuple(map(limit, phase)) for name, phase in program.phases.items()})


def _rules(program: StepProgram) -> Iterator[Rule]:
    return (step.rule for phase in program.phases.values() for step in phase if step.rule is not None)


def _is_open(rule: Rule, n: int) -> bool:
    return rule.may_saturate and rule.at(n) > MIN_LARGE_BLOCK_BYTES


def _step(rule: Rule) -> int:
    """Bytes that one step adds."""
    return rule.unit_bytes if rule.unit_bytes > 1 else max(1, rule.per_sample // rule.divisor)
