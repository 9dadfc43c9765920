"""The plan: a frozen value with its reasons, and its JSON."""

from .entries import LeafForm, PeakRow, RankEntry, RecordingNote, SegmentRow, TimedSize, TimelinePart, window_peak_bytes
from .plan import Plan
from .sections import (
    FASTEST,
    FEWEST_STEPS,
    KIND,
    OBJECTIVES,
    SCHEMA_VERSION,
    DeviceSection,
    DistributionSection,
    EvidenceSection,
    MemorySection,
    ProvenanceSection,
    RequestSection,
    ScheduleSection,
    TimingSection,
)

__all__ = [
    "FASTEST",
    "FEWEST_STEPS",
    "KIND",
    "OBJECTIVES",
    "SCHEMA_VERSION",
    "DeviceSection",
    "DistributionSection",
    "EvidenceSection",
    "LeafForm",
    "MemorySection",
    "PeakRow",
    "Plan",
    "ProvenanceSection",
    "RankEntry",
    "RecordingNote",
    "RequestSection",
    "ScheduleSection",
    "SegmentRow",
    "TimedSize",
    "TimelinePart",
    "TimingSection",
    "window_peak_bytes",
]
