"""Compare CUDA predictions with verified windows, and learn from those."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..devices.cuda.device import CudaMeasurement
from ..simulation import saturation
from ..simulation.from_verification import distinct_recordings, verified_recording, with_released_workspaces
from ..simulation.recording import Recording
from ..simulation.solver import Split
from ..simulation.training_run import TrainingReplay
from .predictor import AGREEMENT_FRACTION, OUT_OF_MEMORY_FACTOR

if TYPE_CHECKING:
    from .predictor_cuda import CudaPredictor


def contradiction(predictor: CudaPredictor, split: Split, measured: CudaMeasurement) -> str | None:
    """Return how a measurement contradicts the prediction; None where it confirms it.

    The retries have to be as predicted, and the peak within 2 %. Where compiled windows are predicted by a ratio, or
    without a program by the next larger recording, it is enough that the window fitted.
    """
    by_ratio = predictor.compiled_share != 1 or predictor.evidence.fallback_reason is not None
    if by_ratio and predictor.holds(measured):
        return None
    expected = predictor.replayed(split, "this_process", predictor.verified_within_bytes, kept=measured.kept)
    return disagreement(expected, measured)


def disagreement(expected: TrainingReplay, measured: CudaMeasurement) -> str | None:
    """Return how a measurement differs from a replay, or None."""
    retries, predicted = expected.retries[: len(measured.retries)], expected.peak_reserved_bytes
    if measured.retries != retries:
        return f"released its cache {measured.retries} times in its windows, not {retries}"
    if abs(measured.peak_bytes - predicted) > AGREEMENT_FRACTION * predicted:
        return f"reserved {measured.peak_bytes:,} bytes, not {predicted:,}"
    return None


def teaches(predictor: CudaPredictor, split: Split, measured: CudaMeasurement) -> bool:
    """Return whether a large block is unpredicted or grows in steps."""
    found = _as_recording(predictor, split, measured)
    if found is None:
        return False
    program = predictor.evidence.program(found.micro_batch)
    return predictor.may_saturate or not saturation.predicts_large_blocks(program, found)


def learn(predictor: CudaPredictor, split: Split, measured: CudaMeasurement | None) -> bool:
    """Add the verified window's recording where it explains the measurement."""
    evidence, found = predictor.evidence, _as_recording(predictor, split, measured)
    if found is None or measured is None:
        return False
    before = list(evidence.recordings)
    evidence.set_recordings([*distinct_recordings(before, found.micro_batch), found])
    predictor.forget()
    explained = predictor.confirms(split, measured) is None
    if not explained:
        evidence.set_recordings(before)
        predictor.forget()
    return explained


def _as_recording(predictor: CudaPredictor, split: Split, measured: CudaMeasurement | None) -> Recording | None:
    """Return the verified window as a recording like the others, or None."""
    if measured is None or measured.recording is None or not predictor.evidence.has_program:
        return None
    recordings = predictor.evidence.recordings
    if split[0] in (each.micro_batch for each in predictor.evidence.small_recordings):
        return None
    found = verified_recording(measured.recording, split, recordings)
    if found is not None and measured.kept and recordings and recordings[-1].workspaces:
        return with_released_workspaces(found, recordings[-1])  # as in the recordings that it joins
    return found


def correct_compiled_share(predictor: CudaPredictor, split: Split, measured: CudaMeasurement | None) -> None:
    """Correct the compiled share by the memory reserved above the model."""
    if measured is None:
        predictor.compiled_share *= OUT_OF_MEMORY_FACTOR
        return
    expected = predictor.replayed(split, "this_process", None, kept=measured.kept)
    expected_bytes = expected.peak_reserved_bytes - predictor.baseline_bytes
    reserved_bytes = measured.peak_bytes - predictor.baseline_bytes
    predictor.compiled_share = max(reserved_bytes, expected_bytes // 10) / expected_bytes
