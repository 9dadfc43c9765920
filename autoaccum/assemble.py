"""Puts what planning found into a plan, with its reasons. The last step of `fit.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import observe
from .allocator import Replay
from .errors import DoesNotFit
from .identity import fingerprint, signature
from .plan import PeakRow, Plan
from .recording import BETWEEN, FIRST, LATER, OPTIMIZER, PHASE_TITLES
from .solve import Solution, Split, largest_micro_batch
from .units import show_bytes
from .workload import Workload

if TYPE_CHECKING:
    from .cpu import Measured
    from .fit import Outlook

TABLE_ROWS = 48


def plan(
    outlook: Outlook, solution: Solution, measured: Measured | None, workload: Workload, assumed: str | None
) -> Plan:
    """The plan of a solution, as it stands before everything is put back."""
    wish, observed, split = outlook.wish, outlook.observed, solution.split
    fresh = outlook.peak_bytes(split, "fresh")
    history = max(outlook.peak_bytes(split, name) for name in wish.histories) - fresh
    window = observe.peak_of(outlook.subject, observed, split, outlook.fresh)
    held = outlook.base_bytes + outlook.data_bytes(sum(split))
    phases = {phase.name: held + phase.bytes for phase in window.phases if phase.name in PHASE_TITLES}
    binding = max(phases, key=lambda name: phases[name])
    largest, capped = _largest(outlook, split)
    rows = _table(outlook, split, largest)
    verified = split[: len(split) if measured is None else 3]
    return Plan(
        target_batch=wish.target_batch or split[0] * wish.world_size,
        world_size=wish.world_size,
        micro_batch=split[0],
        accumulation_steps=len(split),
        split=split,
        largest_micro_batch=largest,
        largest_is_capped=capped,
        budget=outlook.budget,
        base_bytes=outlook.base_bytes,
        data_bytes=outlook.data_bytes(sum(split)),
        history_bytes=history,
        predicted_peak_bytes=outlook.worst_bytes(split),
        measured_peak_bytes=None if measured is None else _measured_peak(outlook, measured, split, verified),
        resident_peak_bytes=None if measured is None else measured.resident_bytes,
        phases=phases,
        binds=f"{PHASE_TITLES[binding]}, {'here' if history else 'fresh'}",
        exactness="unchecked",
        peaks=rows,
        signature=signature(workload.sample),
        fingerprint=fingerprint(outlook.subject.parts),
        device=outlook.subject.device.name,
        method=observed.method,
        mmap_threshold_bytes=outlook.subject.mmap_threshold_bytes,
        fresh_pages_share=None if measured is None else measured.system_share,
        window_seconds=None if measured is None else _window_seconds(measured, split, verified),
        recordings=tuple(observed.notes),
        reasons=_reasons(outlook, split, measured),
        notes=_notes(outlook, assumed),
        slack=outlook.slack,
        smallest_micro_batch=wish.least,
        workload=workload.name,
    )


def _measured_peak(outlook: Outlook, measured: Measured, split: Split, verified: Split) -> int:
    """What the verified windows took, and the samples that the rest of a whole window adds."""
    rest = outlook.data_bytes(sum(split)) - outlook.data_bytes(sum(verified))
    return outlook.base_bytes + measured.increment_bytes + rest


def _window_seconds(measured: Measured, split: Split, verified: Split) -> float:
    """Reckoned by samples: the verification ran one micro-batch and two windows."""
    ran = verified[0] + 2 * sum(verified)
    return measured.seconds * sum(split) / ran


def _largest(outlook: Outlook, split: Split) -> tuple[int, bool]:
    wish, observed = outlook.wish, outlook.observed
    recorded = observed.recordings[-1].micro_batch
    most = recorded if observed.doubt else max(split[0], wish.most if wish.samples else split[0])
    if len(split) == 1:
        return split[0], wish.samples is not None
    size = largest_micro_batch(outlook.fits, outlook.later_floor, budget_bytes=outlook.usable_bytes, most=most)
    return max(size, split[0]), size >= most


def _table(outlook: Outlook, split: Split, largest: int) -> tuple[PeakRow, ...]:
    """Peaks at the sizes that other numbers of steps would use, and at a grid up to twice the largest."""
    samples = sum(split)
    sizes = {size for size in (-(-samples // k) for k in range(1, min(samples, 4 * len(split)) + 1))}
    sizes |= {max(1, round(2 * largest * part / 16)) for part in range(1, 17)} | {1, split[0], split[-1], largest}
    if len(sizes) > TABLE_ROWS:
        needed = {split[0], split[-1], largest, -(-samples // max(1, len(split) - 1))}
        step = len(sizes) / TABLE_ROWS
        ordered = sorted(sizes)
        sizes = needed | {ordered[int(i * step)] for i in range(TABLE_ROWS)}
    rows = []
    for size in sorted(sizes):
        try:
            rows.append(_row(size, observe.peak_of(outlook.subject, outlook.observed, (size, size), outlook.fresh)))
        except LookupError:
            break
    return tuple(rows)


def _row(size: int, window: Replay) -> PeakRow:
    peaks = {phase.name: phase.bytes for phase in window.phases}
    return PeakRow(size, peaks[FIRST], peaks[LATER], peaks[OPTIMIZER], peaks.get(BETWEEN, 0))


def _reasons(outlook: Outlook, split: Split, measured: Measured | None) -> dict[str, str]:
    usable = show_bytes(outlook.usable_bytes)
    samples, steps = sum(split), len(split)
    reasons = {
        "accumulation_steps": (
            f"all {samples} samples fit at once"
            if steps == 1
            else f"the fewest that micro-batches of at most {outlook.wish.most} allow"
            if steps == -(-samples // outlook.wish.most)
            else f"the fewest whose own window fits {usable}, the budget less 2 %"
        ),
        "split": f"{samples} samples in {steps} micro-batches whose sizes differ by at most one, largest first",
        "largest_micro_batch": f"the largest of which a window of several fits {usable}",
        "base_bytes": "committed by this process before training: interpreter, libraries, the model",
        "data_bytes": f"{samples} samples of {outlook.sample_bytes:,} bytes, kept until their optimizer step is done",
        "predicted_peak_bytes": (
            f"the replay of this window; {outlook.observed.unrecorded_bytes:,} bytes of it are objects that no "
            "recording shows (autograd's graph above all), measured in a small window"
        ),
        "history_bytes": "holes that planning left in this process's heap and that large blocks can't use",
        "slack": f"{outlook.slack:.0%} of what training takes, for the fragmentation of malloc's default",
        "budget_bytes": f"the tightest of the limits ({outlook.budget.binds}) less the headroom",
    }
    reasons["method"] = outlook.observed.doubt or (
        "a step program lifted from recordings at " + ", ".join(str(n.micro_batch) for n in outlook.observed.notes)
    )
    reasons["measured_peak_bytes"] = (
        "not verified: nothing was run at this size"
        if measured is None
        else f"the first step and two windows of {min(steps, 3)} micro-batches were run for real in this process"
    )
    return reasons


def _notes(outlook: Outlook, assumed: str | None) -> tuple[str, ...]:
    notes = []
    if assumed is not None:
        notes.append(f"Assumed, as no sample was given: {assumed}.")
    if outlook.observed.doubt is not None:
        notes.append(f"Bracketed: {outlook.observed.doubt}.")
    if outlook.subject.mmap_threshold_bytes is None:
        notes.append(
            f"malloc is left at its default: {outlook.slack:.0%} of what training takes is reckoned on top, "
            "for its fragmentation."
        )
    return tuple(notes)


def does_not_fit(outlook: Outlook, split: Split, needed_bytes: int) -> DoesNotFit:
    """Not even the smallest window fits: by how much, and what would help."""
    budget = outlook.budget
    missing = max(1, needed_bytes - budget.bytes)
    state = outlook.observed.state_bytes
    helps: list[Callable[[], str | None]] = [
        lambda: (
            f"a budget of {show_bytes(int(needed_bytes * 1.001) + budget.headroom_bytes).replace(' ', '')} (--memory)"
            if budget.binds == "asked"
            else f"a higher limit ({budget.binds})"
        ),
        lambda: f"an optimizer without state (this one's is {show_bytes(state)})" if state > missing / 4 else None,
        lambda: "activation checkpointing, shorter samples, or a smaller model",
    ]
    told = ", ".join(text for text in (help() for help in helps) if text)
    return DoesNotFit(
        f"Not even a micro-batch of {split[0]} fits: its window needs {show_bytes(needed_bytes)}, "
        f"the budget is {show_bytes(budget.bytes)}; {show_bytes(missing)} ({missing:,} bytes) are missing.",
        f"{show_bytes(outlook.base_bytes)} of it are the process before training; "
        f"the limit that binds is {budget.binds}.",
        f"What would help: {told}.",
        missing_bytes=missing,
    )
