"""Ask what fits by every program that the recordings leave open.

Some blocks grow in steps, up to a maximum that isn't known yet; others were seen at the largest recording alone, and
are taken for constant. What a plan says of its largest micro-batch has to hold wherever the former end and if the
latter grow. A recording has to fit even if what seems to have saturated grows on, since it can't be taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..simulation import saturation
from ..simulation.program import StepProgram

if TYPE_CHECKING:
    from .predictor_cuda import CudaPredictor

MAX_ENDS = 8  # of a block that grows in steps: so many possible upper ends are tried
GUESSES_GROW, ALL_GROW = "guesses grow", "all grow"


def every_end(predictor: CudaPredictor, n: int) -> Iterator[CudaPredictor]:
    """Yield a predictor for each possible end of stepping blocks.

    The first is the predictor itself; the last one's guesses grow with the batch.
    """
    yield predictor
    if not predictor.evidence.has_program or n <= (program := predictor.evidence.program()).recorded_at:
        return
    for steps in range(min(MAX_ENDS, saturation.steps_until(program, n))):
        yield _by(predictor, steps, lambda steps=steps: saturation.saturated_after(program, steps))  # type: ignore[misc]
    grown = _by(predictor, GUESSES_GROW, lambda: saturation.grown_on(program, ended=False))
    if grown is not predictor:
        yield grown


def is_sure_to_record(predictor: CudaPredictor, n: int) -> bool:
    """Return whether n samples fit, even if uncertain blocks grow."""
    program = predictor.evidence.program()
    if n <= program.recorded_at:
        return _has_room(predictor, n)
    grown = _by(predictor, ALL_GROW, lambda: saturation.grown_on(program, ended=True))
    return _has_room(predictor, n) and (grown is predictor or _has_room(grown, n))


def _by(predictor: CudaPredictor, key: int | str, program: Callable[[], StepProgram | None]) -> CudaPredictor:
    """Return the predictor by another program; itself where there is none."""
    if key not in predictor.by_program:
        made = program()
        other = predictor if made is None else replace(predictor, evidence=predictor.evidence.with_program(made))
        predictor.by_program[key] = other
    return predictor.by_program[key]


def _has_room(predictor: CudaPredictor, n: int) -> bool:
    room, split = predictor.usable_bytes - predictor.leaked_bytes, (n, n)
    unlimited = predictor.replayed(split, "new_process", None).peak_reserved_bytes <= room
    return unlimited or predictor.replayed(split, "new_process", room).out_of_memory is None
