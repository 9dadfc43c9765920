"""What is compared: sizes picked by hand, halving until it fits, autoaccum's plan, a tuned plan. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...plan import Plan

HAND, HALVING, PLAN, TUNED = "hand-picked", "halving until it fits", "autoaccum's plan", "the tuned plan"


@dataclass(frozen=True)
class Candidate:
    """A way to train the target.

    Attributes:
        name: What to call it.
        micro_batch: Samples in a micro-batch; where it is halved, to begin with.
        steps: Micro-batches in a window; where it is halved, as many as the micro-batch then divides the target into.
        halves: Whether running out of memory halves the micro-batch.
        plan: The plan that it trains by; None for a plain loop of equal micro-batches.
    """

    name: str
    micro_batch: int
    steps: int
    halves: bool = False
    plan: Plan | None = None


@dataclass(frozen=True)
class Trained:
    """What became of a candidate.

    Attributes:
        name: The candidate's.
        micro_batch: The largest micro-batch that was trained; of one that failed, that was tried.
        steps: Micro-batches in a window.
        effective_batch: Samples in an optimizer step, as really trained; 0 where none was.
        window_seconds: Of each window that was timed; empty where nothing trained, or on a device without times.
        peak_bytes: The most that it took: committed by the process, or reserved on the GPU. Of one that ran out of
            memory, what it had when it did.
        ooms: How often it ran out of memory.
        search_seconds: What was spent until something trained: failed attempts, or planning.
        malloc: Whose setting the C library's malloc had.
        why: Why it did not train, if it did not.
        changes_numerics: What it changes beside the split, if anything.
    """

    name: str
    micro_batch: int
    steps: int
    effective_batch: int
    window_seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    ooms: int = 0
    search_seconds: float = 0.0
    malloc: str = ""
    why: str = ""
    changes_numerics: str = ""

    @property
    def trains(self) -> bool:
        """Whether it did."""
        return self.effective_batch > 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        workload: Its name.
        target_batch: Samples in an optimizer step, as asked for.
        plan: autoaccum's.
        rows: What became of each candidate.
        left_out: Candidates that were not tried, and why.
        windows: Windows that were asked to be timed.
        environment: Versions and machine.
    """

    workload: str
    target_batch: int
    plan: Plan
    rows: tuple[Trained, ...]
    left_out: tuple[str, ...]
    windows: int
    environment: dict[str, str] = field(default_factory=dict)


def hand_picked(target_batch: int, near: int) -> tuple[Candidate, ...]:
    """Powers of two around a micro-batch that fits: half of the one below it, that one, and the next two above.

    Accumulation steps are the target divided by the micro-batch, rounded down, as in most training scripts: a target
    that isn't a multiple isn't met.
    """
    below = 1 << (near.bit_length() - 1)
    sizes = [size for size in (below // 2, below, 2 * below, 4 * below) if 1 <= size <= target_batch]
    return tuple(Candidate(f"{HAND}: {size}", size, target_batch // size) for size in sizes)


def candidates_for(plan: Plan, tuned: Plan | None = None) -> tuple[Candidate, ...]:
    """The candidates for a plan's target."""
    found = [*hand_picked(plan.target_batch, plan.micro_batch), Candidate(HALVING, plan.target_batch, 1, halves=True)]
    for name, each in ((PLAN, plan), (TUNED, tuned)):
        if each is not None:
            found.append(Candidate(name, each.micro_batch, each.accumulation_steps, plan=each))
    return tuple(found)


def median_of(values: Sequence[float]) -> float | None:
    """The median; None of none."""
    import statistics

    return statistics.median(values) if values else None
