"""Describe predictions for the CPU: a plan's reasons, notes and remedies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import process_memory
from ..devices.cpu.page_cache import JEMALLOC
from ..simulation.solver import Split
from ..units import show_bytes
from .growth import WINDOWS

if TYPE_CHECKING:
    from .predictor_cpu import CpuPredictor

HOLES_FRACTION = 0.01  # of budget or baseline, the larger: smaller holes in the heap are not mentioned


def reasons(predictor: CpuPredictor, split: Split) -> dict[str, str]:
    """Return the reasons for baseline, input, history and budget, in committed bytes."""
    return {
        "baseline_bytes": "committed by this process before training: interpreter, libraries, the model",
        "input_bytes": (
            f"{sum(split)} samples of {predictor.sample_bytes:,} bytes, kept until their optimizer step is done"
        ),
        "predicted_peak_bytes": (
            f"the replay of this window; {predictor.evidence.unrecorded_bytes:,} bytes of it are objects that no "
            "recording shows (autograd's graph above all), measured in a small window"
        ),
        "history_bytes": _history_words(predictor, split),
        "budget_bytes": f"the tightest of the limits ({predictor.budget.binding_constraint}) less the headroom",
    }


def _history_words(predictor: CpuPredictor, split: Split) -> str:
    own = predictor.own_bytes - predictor.leaked_bytes
    text = (
        f"planning's own objects and threads in this process ({own:,} bytes), and holes in its heap that large "
        "blocks can't use"
    )
    if predictor.evidence.growth is None:
        return text
    return (
        f"what the {WINDOWS - 1} windows before keep ({predictor.kept_bytes(split):,} bytes); what planning's own "
        f"windows left ({predictor.leaked_bytes:,} bytes); {text}"
    )


def notes(predictor: CpuPredictor) -> list[str]:
    """Return notes about holes in the heap and about malloc."""
    subject, setting = predictor.subject, predictor.device.setting
    if subject.mmap_threshold_bytes is not None:
        if setting.reason:
            return [
                f"Large tensors come from no cache of pages: {setting.reason.rstrip('.')}. Each is mapped anew, which "
                "takes the kernel's time and keeps memory predictable."
            ]
        if not _has_large_holes(predictor):
            return []
        return [
            f"{show_bytes(subject.filled_bytes)} of this process's heap are holes left by what ran before. They count "
            "as used, since it depends on chance whether a large tensor fits one of them. A new process has no such "
            "holes, so more fits there: restart the kernel and plan first, or run autoaccum plan."
        ]
    name = process_memory.malloc_name()
    if setting.name == JEMALLOC and setting.reason:
        return [
            f"Large tensors come from no cache of pages: {setting.reason.rstrip('.')}. {name} is preloaded in its "
            "place: it keeps freed memory too, but no recording shows how, so "
            f"{predictor.malloc_overhead:.0%} of training's memory is added."
        ]
    if name != "glibc":
        return [
            f"malloc is {name}, not the C library's: it keeps freed memory in its own way, which no recording "
            f"shows, so {predictor.malloc_overhead:.0%} of training's memory is added. For a prediction within 1 % "
            "plan and train without it (LD_PRELOAD)."
        ]
    return [
        f"malloc is left at its default: {predictor.malloc_overhead:.0%} of training's memory is added for its "
        "fragmentation."
    ]


def remedies(predictor: CpuPredictor, needed_bytes: int) -> list[str]:
    """Recommend a new process where this one's heap has large holes.

    Or where what planning left in it is more than the budget lacks.
    """
    if _has_large_holes(predictor):
        return [f"a new process, without the {show_bytes(predictor.subject.filled_bytes)} of holes in this one's heap"]
    inside, trains_here = predictor.inside_bytes, "this_process" in predictor.request.histories
    if trains_here and inside >= needed_bytes - predictor.budget.bytes:
        return [
            f"training in another process than planning, which left {show_bytes(inside)} in this one's heap "
            "(train_in_new_process=True, and the plan in a file)"
        ]
    return []


def _has_large_holes(predictor: CpuPredictor) -> bool:
    largest = max(predictor.budget.bytes, predictor.baseline_bytes)
    return predictor.subject.filled_bytes >= HOLES_FRACTION * largest
