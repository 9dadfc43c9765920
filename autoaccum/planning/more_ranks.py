"""Find from how many ranks on a sharded model fits.

Shards shrink with the ranks: of parameters, gradients and the optimizer's state. Gathered blocks and activations don't.
So the blocks of what was recorded get the sizes that other ranks give them, and the smallest window is replayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..phases import FIRST, OPTIMIZER
from ..ranks.shard_sizes import Sizes, sizes_on, world_of
from ..ranks.sharded import sharded_modules
from ..simulation.program import Step, StepProgram
from ..simulation.recording import Event, Phase, Recording, kept_blocks
from .predictor import VERIFIED_STEPS

if TYPE_CHECKING:
    from .predictor_cuda import CudaPredictor

MOST_TIMES = 64  # the ranks that are asked for: where that many don't suffice, what isn't sharded is too large


def least_ranks(predictor: CudaPredictor, guess: int) -> int | None:
    """Return the fewest ranks whose smallest window fits, more than there are.

    Args:
        predictor: The predictor on the ranks there are, which a window doesn't fit.
        guess: An estimate, to begin with.

    Returns:
        The ranks; 0 where 64 times as many don't suffice, None where sizes on other ranks are not known.
    """
    if not _can_be_resized(predictor):
        return None
    low = predictor.request.world_size
    high, most = max(guess, low + 1), max(guess, MOST_TIMES * low)
    while not fits_on(predictor, high):
        if high >= most:
            return 0
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits_on(predictor, middle) else (middle, high)
    return high


def fits_on(predictor: CudaPredictor, ranks: int) -> bool:
    """Return whether the smallest window fits each of so many ranks."""
    request, evidence = predictor.request, predictor.evidence
    assert evidence.first_step is not None
    there = _Resizing(sizes_on(predictor.subject.context.model, ranks), evidence.first_step)
    resized = replace(
        evidence,
        first_step=there.recording(evidence.first_step),
        first_step_events=there.events(evidence.first_step_events, OPTIMIZER),
        small_recordings=[],
        _program=there.program(evidence.program(request.least)),
    )
    model_events = there.events(predictor.model_events, OPTIMIZER)
    request = replace(request, world_size=ranks, histories=("new_process",))
    samples = request.least if request.target_batch is None else max(1, request.target_batch // ranks)
    split = (request.least,) * min(VERIFIED_STEPS, max(1, samples // request.least))
    return replace(predictor, evidence=resized, model_events=model_events, request=request).fits(split)


def _can_be_resized(predictor: CudaPredictor) -> bool:
    """Return whether all is sharded alike, and a program has the sizes."""
    model, ranks = predictor.subject.context.model, predictor.request.world_size
    parameters = list(model.parameters())
    sharded = bool(sharded_modules(model)) and all(hasattr(p, "device_mesh") for p in parameters)
    flat = sharded and all(p.device_mesh.ndim == 1 and world_of(p) == ranks for p in parameters)  # type: ignore[attr-defined]
    return flat and predictor.evidence.has_program and predictor.evidence.first_step is not None


class _Resizing:
    """Give blocks the sizes that other ranks give them.

    Where a size is that of a shard and of something gathered, it is a shard's in the optimizer's step, and on the
    stream on which gradients are reduced.

    Args:
        sizes: The sizes on other ranks.
        first_step: The first window, whose first micro-batch leaves reduced gradients behind.
    """

    def __init__(self, sizes: Sizes, first_step: Recording) -> None:
        self._sizes = sizes
        left = [event for phase in first_step.phases if phase.name == FIRST for event in kept_blocks(phase.events)]
        self._reducing = {event.stream for event in left if event.stream and event.bytes in sizes.shards}

    def _size(self, size: int, stream: int, phase: str) -> int:
        sizes = self._sizes
        if phase == OPTIMIZER or stream in self._reducing:
            return sizes.shards.get(size) or sizes.gathered.get(size, size)
        return sizes.gathered.get(size) or sizes.shards.get(size, size)

    def program(self, program: StepProgram) -> StepProgram:
        """Return a program whose constant sizes are those of other ranks."""
        return replace(
            program,
            first_step_events=self.events(program.first_step_events, OPTIMIZER),
            phases={name: self._steps(steps, name) for name, steps in program.phases.items()},
            leftover=self._steps(program.leftover, OPTIMIZER),
        )

    def _steps(self, steps: Iterable[Step], phase: str) -> tuple[Step, ...]:
        return tuple(
            step
            if step.rule is None or step.rule.per_sample or step.rule.per_pair
            else step._replace(rule=step.rule._replace(constant=self._size(step.rule.constant, step.stream, phase)))
            for step in steps
        )

    def recording(self, recording: Recording) -> Recording:
        """Return a recording with the sizes of other ranks."""
        phases = tuple(Phase(phase.name, self.events(phase.events, phase.name)) for phase in recording.phases)
        return replace(recording, phases=phases)

    def events(self, events: Iterable[Event], phase: str) -> tuple[Event, ...]:
        """Return events with the sizes of other ranks."""
        found = ((event, self._size(abs(event.bytes), event.stream, phase)) for event in events)
        return tuple(event._replace(bytes=size if event.bytes > 0 else -size) for event, size in found)
