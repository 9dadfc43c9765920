"""Define the rows of a plan's tables. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LeafForm:
    """One tensor of a batch.

    Attributes:
        path: Its place in the batch, like "[0]" or "['ids']".
        dtype: Its dtype.
        trailing_shape: Its shape without the samples.
    """

    path: str
    dtype: str
    trailing_shape: tuple[int, ...]


@dataclass(frozen=True)
class PeakRow:
    """Peaks of a window of equal micro-batches, by phase.

    In bytes above the baseline, without a limit.

    Attributes:
        micro_batch: Samples in each micro-batch.
        first_bytes: Peak of a window's first micro-batch, while no gradients exist.
        later_bytes: Peak of the later micro-batches, while gradients exist.
        optimizer_bytes: Peak of the optimizer step.
        between_bytes: Peak of the work between windows; 0 where there is none.
    """

    micro_batch: int
    first_bytes: int
    later_bytes: int
    optimizer_bytes: int
    between_bytes: int = 0

    def peak_bytes(self, steps: int) -> int:
        """Return the peak of a window of `steps` such micro-batches."""
        later = self.later_bytes if steps > 1 else 0
        return max(self.first_bytes, later, self.optimizer_bytes, self.between_bytes)


def window_peak_bytes(first: PeakRow, second: PeakRow, last: PeakRow, steps: int) -> int:
    """Return the peak of a window of several sizes.

    Args:
        first: The row of its first micro-batch's size.
        second: The row of its second micro-batch's size.
        last: The row of its last micro-batch's size.
        steps: Its micro-batches.
    """
    later = max(second.later_bytes, last.later_bytes) if steps > 1 else 0
    return max(first.first_bytes, later, last.optimizer_bytes, last.between_bytes)


@dataclass(frozen=True)
class SegmentRow:
    """Segments of one size that the CUDA caching allocator holds.

    Attributes:
        bytes: The size of each.
        count: How many.
    """

    bytes: int
    count: int


@dataclass(frozen=True)
class RecordingNote:
    """A recording that the plan rests on.

    Attributes:
        micro_batch: Samples in each of its micro-batches.
        passes: Its micro-batches.
        seconds: How long recording took.
        measured_bytes: Its peak above the baseline.
        predicted_bytes: The same, predicted from the recordings before it; None for the first ones.
    """

    micro_batch: int
    passes: int
    seconds: float
    measured_bytes: int
    predicted_bytes: int | None = None


@dataclass(frozen=True)
class RankEntry:
    """One rank's part of an optimizer step.

    Attributes:
        device: Its device's name.
        split: Samples in each of its micro-batches, largest first.
        predicted_peak_bytes: Predicted peak of its window, baseline and inputs included.
        budget_bytes: Memory that its process may use.
        largest_micro_batch: The largest micro-batch of which a window of two or more fits there.
        measured_peak_bytes: Peak of its verification run; None unless verified.
        window_seconds: Time of its window, from the verification run; None unless verified.
    """

    device: str
    split: tuple[int, ...]
    predicted_peak_bytes: int
    budget_bytes: int
    largest_micro_batch: int
    measured_peak_bytes: int | None = None
    window_seconds: float | None = None

    @property
    def samples(self) -> int:
        """Samples of this rank in an optimizer step."""
        return sum(self.split)

    @property
    def micro_batch(self) -> int:
        """The largest micro-batch of its split, in samples."""
        return max(self.split)

    @property
    def accumulation_steps(self) -> int:
        """Its micro-batches in an optimizer step."""
        return len(self.split)


@dataclass(frozen=True)
class TimelinePart:
    """Live bytes during one phase of the window, thinned out.

    Attributes:
        phase: The phase's name.
        micro_batch: Samples in its micro-batch; for the optimizer step, in the last one.
        events: Allocations and frees of the phase.
        bytes: Live bytes above the baseline, as requested, in order of time. Each is the maximum of a stretch of
            events, so that their maximum is the phase's.
    """

    phase: str
    micro_batch: int
    events: int
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class TimedSize:
    """Measured time of an optimizer step with micro-batches of one size.

    Attributes:
        micro_batch: The largest micro-batch of the split.
        step_seconds: Median of the rounds.
        windows: Number of rounds.
        round_seconds: The time of each round; rounds of all sizes are paired by their index (planning/timing.py).
    """

    micro_batch: int
    step_seconds: float
    windows: int
    round_seconds: tuple[float, ...] = ()
