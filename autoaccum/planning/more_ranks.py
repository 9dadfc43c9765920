"""Find from how many ranks on a sharded model fits.

Shards shrink with the ranks: of parameters, gradients and the optimizer's state. Gathered blocks and activations don't.
So the blocks of what was recorded get the sizes that other ranks give them, and the smallest window is replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..ranks.shard_sizes import sizes_on, world_of
from ..ranks.sharded import sharded_modules
from ..simulation.program import Step, StepProgram
from ..simulation.recording import Event, Phase, Recording
from .predictor import VERIFIED_STEPS

if TYPE_CHECKING:
    from .predictor_cuda import CudaPredictor

MOST_TIMES = 4  # the first guess: beyond that, ranks don't help


def least_ranks(predictor: CudaPredictor, guess: int) -> int | None:
    """Return the fewest ranks whose smallest window fits, more than there are.

    Args:
        predictor: The predictor on the ranks there are, which a window doesn't fit.
        guess: An estimate, to begin with.

    Returns:
        The ranks; None where sizes on other ranks are not known, or four times the guess don't suffice.
    """
    low, most = predictor.request.world_size, MOST_TIMES * guess
    if not _can_be_resized(predictor):
        return None
    high, step = max(guess, low + 1), 1
    while not fits_on(predictor, high):
        if high >= most:
            return None
        low, high, step = high, min(most, high + step), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits_on(predictor, middle) else (middle, high)
    return high


def fits_on(predictor: CudaPredictor, ranks: int) -> bool:
    """Return whether the smallest window fits each of so many ranks."""
    request, evidence = predictor.request, predictor.evidence
    sizes = sizes_on(predictor.subject.context.model, ranks)
    assert evidence.first_step is not None
    there = replace(
        evidence,
        first_step=_recording_on(evidence.first_step, sizes),
        first_step_events=_events_on(evidence.first_step_events, sizes),
        small_recordings=[],
        _program=_program_on(evidence.program(request.least), sizes),
    )
    model_events = _events_on(predictor.model_events, sizes)
    request = replace(request, world_size=ranks, histories=("new_process",))
    samples = request.least if request.target_batch is None else max(1, request.target_batch // ranks)
    split = (request.least,) * min(VERIFIED_STEPS, max(1, samples // request.least))
    return replace(predictor, evidence=there, model_events=model_events, request=request).fits(split)


def _can_be_resized(predictor: CudaPredictor) -> bool:
    """Return whether all is sharded alike, and a program has the sizes."""
    model, ranks = predictor.subject.context.model, predictor.request.world_size
    parameters = list(model.parameters())
    sharded = bool(sharded_modules(model)) and all(hasattr(p, "device_mesh") for p in parameters)
    flat = sharded and all(p.device_mesh.ndim == 1 and world_of(p) == ranks for p in parameters)  # type: ignore[attr-defined]
    return flat and predictor.evidence.has_program and predictor.evidence.first_step is not None


def _program_on(program: StepProgram, sizes: Mapping[int, int]) -> StepProgram:
    """Return a program whose constant sizes are those of other ranks."""
    return replace(
        program,
        first_step_events=_events_on(program.first_step_events, sizes),
        phases={name: _steps_on(steps, sizes) for name, steps in program.phases.items()},
        leftover=_steps_on(program.leftover, sizes),
    )


def _steps_on(steps: Iterable[Step], sizes: Mapping[int, int]) -> tuple[Step, ...]:
    return tuple(
        step
        if step.rule is None or step.rule.per_sample or step.rule.per_pair
        else step._replace(rule=step.rule._replace(constant=sizes.get(step.rule.constant, step.rule.constant)))
        for step in steps
    )


def _recording_on(recording: Recording, sizes: Mapping[int, int]) -> Recording:
    phases = tuple(Phase(phase.name, _events_on(phase.events, sizes)) for phase in recording.phases)
    return replace(recording, phases=phases)


def _events_on(events: Iterable[Event], sizes: Mapping[int, int]) -> tuple[Event, ...]:
    return tuple(e._replace(bytes=sizes.get(e.bytes) or -sizes.get(-e.bytes, -e.bytes)) for e in events)
