"""The plan: a frozen value with its reasons, and its JSON."""

from .entries import LeafForm, PeakRow, RecordingNote, TimedSize, TimelinePart, window_peak_bytes
from .plan import Plan
from .sections import (
    FASTEST,
    FEWEST_STEPS,
    KIND,
    OBJECTIVES,
    SCHEMA_VERSION,
    DeviceSection,
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
    "EvidenceSection",
    "LeafForm",
    "MemorySection",
    "PeakRow",
    "Plan",
    "ProvenanceSection",
    "RecordingNote",
    "RequestSection",
    "ScheduleSection",
    "TimedSize",
    "TimelinePart",
    "TimingSection",
    "window_peak_bytes",
]
