"""Define the candidates: hand-picked, halving, the plan, a tuned plan."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...plan import Plan

HAND_PICKED, HALVING, PLAN, TUNED = "hand-picked", "halving until it fits", "autoaccum's plan", "the tuned plan"


@dataclass(frozen=True)
class Candidate:
    """Describe one way to train the target batch.

    Attributes:
        name: Its name in the table.
        micro_batch: Samples in a micro-batch; with `halves`, in the first attempt.
        steps: Micro-batches in a window; with `halves`, recomputed for each attempt.
        halves: Whether the micro-batch is halved after running out of memory.
        plan: The plan to train by; None for a plain loop of equal micro-batches.
    """

    name: str
    micro_batch: int
    steps: int
    halves: bool = False
    plan: Plan | None = None


@dataclass(frozen=True)
class Trained:
    """Hold a candidate's result.

    Attributes:
        name: The candidate's name.
        micro_batch: The largest micro-batch that was trained, or tried if it failed.
        steps: Micro-batches in a window.
        effective_batch: Samples in an optimizer step, as trained; 0 if it failed.
        window_seconds: Duration of each timed window; empty if it failed, or on a device without times.
        peak_bytes: Peak bytes committed by the process, or reserved on the GPU; up to the failure, if it failed.
        ooms: How often it ran out of memory.
        search_seconds: Time until something trained: failed attempts, or planning.
        malloc: The plan's setting of malloc, or "default"; empty on CUDA.
        why: Why it failed; empty if it trained.
        changes_numerics: The tuned choices beside the split; empty if there are none.
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
        """Whether the candidate trained."""
        return self.effective_batch > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Hold the results of all candidates.

    Attributes:
        workload: The workload's name.
        target_batch: Requested samples in an optimizer step.
        plan: autoaccum's plan.
        rows: The result of each candidate.
        left_out: Candidates that were not tried, with why.
        windows: The most windows timed of each.
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
    """Return powers of two around a micro-batch that fits.

    Accumulation steps are the target divided by the micro-batch, rounded down, as in most training scripts, so a target
    that isn't a multiple is missed.
    """
    below = 1 << (near.bit_length() - 1)
    sizes = [size for size in (below // 2, below, 2 * below, 4 * below) if 1 <= size <= target_batch]
    return tuple(Candidate(f"{HAND_PICKED}: {size}", size, target_batch // size) for size in sizes)


def candidates_for(plan: Plan, tuned: Plan | None = None) -> tuple[Candidate, ...]:
    """Return the candidates for a plan's target."""
    found = [*hand_picked(plan.target_batch, plan.micro_batch), Candidate(HALVING, plan.target_batch, 1, halves=True)]
    for name, each in ((PLAN, plan), (TUNED, tuned)):
        if each is not None:
            found.append(Candidate(name, each.micro_batch, each.accumulation_steps, plan=each))
    return tuple(found)


def median_of(values: Sequence[float]) -> float | None:
    """Return the median; None without values."""
    return statistics.median(values) if values else None
